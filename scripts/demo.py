#!/usr/bin/env python3
"""Train short, test long: ALiBi against sinusoidal positions, on text that Python brings along.

Splits the help topics and docstrings of Python's standard library into words and punctuation (or
takes three files of your own), trains a small language model with each of the two position methods
on sequences of 64 tokens (fairseq-preprocess, fairseq-train), and evaluates both on sequences up to
16 times as long (fairseq-extrapolate). What is done already is reused; a run that was interrupted
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fairseq.utils import make_writable_folder

TOKEN = re.compile(r"\w+|[^\w\s]")

# Of the lines that the commands log, those that tell how far they are.
NEWS = (
    "train_inner |",
    "train |",
    "valid |",
    "fairseq_cli.preprocess |",
    "fairseq_cli.extrapolate |",
)

METHODS = ("alibi", "sinusoidal")


def documents_of_python() -> Iterator[tuple[str, str]]:
    """Yields (name, text) of the help topics and of each standard module's docstrings."""
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        yield f"topic {name}", text
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3", "config", "pydoc_data"}
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if skipped & set(relative.parts) or "dist-packages" in relative.parts:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docstrings = [ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, kinds)]
        yield str(relative), "\n".join(docstrings)


def write_python_text(folder: Path, most_tokens: int) -> list[Path]:
    """Writes train, valid and test text; whole documents go to one of them, by a hash of the name.

    Args:
        folder: where the three files are written.
        most_tokens: most tokens of the training text.

    Returns:
        The three paths.
    """
    lines: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    num_tokens = 0
    for name, text in documents_of_python():
        bucket = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20
        split = {0: "valid", 1: "test"}.get(bucket, "train")
        document = [" ".join(TOKEN.findall(line)) for line in text.splitlines()]
        document = [line for line in document if line]
        if not document or (split == "train" and num_tokens > most_tokens):
            continue
        if split == "train":
            num_tokens += sum(len(line.split()) + 1 for line in document)
        lines[split] += [*document, ""]
    folder.mkdir(parents=True, exist_ok=True)
    for split, content in lines.items():
        (folder / f"{split}.txt").write_text("\n".join(content) + "\n", encoding="utf-8")
    return [folder / f"{split}.txt" for split in ("train", "valid", "test")]


def run(command: str) -> None:
    """Runs one of the project's commands, showing it and what tells how far it is."""
    print(f"\n$ {command}", flush=True)
    argv = shlex.split(command)
    module = argv[0].replace("fairseq-", "fairseq_cli.").replace("-", "_")
    program = [sys.executable, "-c", f"from {module} import cli_main; cli_main()", *argv[1:]]
    last: deque[str] = deque(maxlen=5)
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line)
            is_warning = " | WARNING | " in line
            _, is_info, shown = line.partition(" | INFO | ")
            is_news = bool(is_info) and shown.startswith(NEWS) and "Namespace(" not in shown
            if is_warning or is_news:
                print("  " + (line if is_warning else shown), end="", flush=True)
    if process.returncode:
        sys.stdout.writelines(last)
        raise SystemExit(f"{argv[0]} ended with exit code {process.returncode}")


def prepare(options: argparse.Namespace, folder: Path) -> Path:
    """Makes the binarized data if it is not there; returns its folder."""
    if options.text:
        texts = [Path(name).resolve() for name in options.text]
        for path in texts:
            if not path.is_file():
                raise SystemExit(f"--text: there is no file {path}")
    else:
        texts = [folder / "text" / f"{split}.txt" for split in ("train", "valid", "test")]
        if not all(path.exists() for path in texts):
            print("Taking the text from this Python's standard library ...", flush=True)
            texts = write_python_text(folder / "text", options.most_tokens)
    identity = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in texts]
    data = folder / "data-bin"
    stamp = data / "made-from.json"
    if stamp.exists() and json.loads(stamp.read_text()) == identity:
        print(f"Using the binarized text in {data}.")
        return data
    if data.exists():
        known = {"dict.txt", "preprocess.log", "made-from.json"}
        for path in data.iterdir():
            if path.name in known or path.suffix in (".bin", ".idx"):
                path.unlink()
    train, valid, test = (shlex.quote(str(path)) for path in texts)
    run(
        f"fairseq-preprocess --only-source --trainpref {train} --validpref {valid} "
        f"--testpref {test} --destdir {shlex.quote(str(data))} --thresholdsrc 3 --workers 2"
    )
    stamp.write_text(json.dumps(identity))
    return data


def train(options: argparse.Namespace, method: str, data: Path, folder: Path) -> Path:
    """Trains a model, or goes on training it; returns its last checkpoint."""
    identity = hashlib.sha256((data / "dict.txt").read_bytes()).hexdigest()[:8]
    name = f"{method}-L{options.length}-{options.updates}-updates-{identity}"
    checkpoints = folder / "checkpoints" / name
    last = checkpoints / "checkpoint_last.pt"
    if (checkpoints / "finished").exists() and last.exists():
        print(f"Using the trained model {last}.")
        return last
    num_words = sum(1 for _ in (data / "dict.txt").open(encoding="utf-8")) + 4
    cutoffs = f"{num_words // 8},{num_words // 2}"
    run(
        f"fairseq-train --task language_modeling {shlex.quote(str(data))} "
        f"--save-dir {shlex.quote(str(checkpoints))} --arch transformer_lm_wiki103 "
        f"--position-method {method} --seed 1 "
        "--decoder-layers 4 --decoder-embed-dim 128 --decoder-ffn-embed-dim 512 "
        "--decoder-attention-heads 8 "
        f"--adaptive-input-cutoff {cutoffs} --adaptive-softmax-cutoff {cutoffs} "
        "--dropout 0.1 --attention-dropout 0 --activation-dropout 0 --adaptive-softmax-dropout 0 "
        "--criterion adaptive_loss --ddp-backend legacy_ddp "
        "--optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 --lr 0.002 "
        f"--lr-scheduler polynomial_decay --warmup-updates {options.updates // 10} "
        f"--total-num-update {options.updates} --max-update {options.updates} "
        f"--tokens-per-sample {options.length} --max-tokens 2048 "
        "--required-batch-size-multiple 1 --sample-break-mode none "
        "--no-epoch-checkpoints --save-interval-updates 200 --keep-interval-updates 1 "
        "--validate-interval-updates 200 --log-format simple --log-interval 50"
    )
    (checkpoints / "finished").touch()
    return last


def sweep(options: argparse.Namespace, data: Path, checkpoints: list[Path]) -> Path:
    """Evaluates the models at every length; returns the folder of the report."""
    report = checkpoints[0].parents[2] / "extrapolation"
    run(
        f"fairseq-extrapolate {shlex.quote(str(data))} "
        f"--path {shlex.quote(os.pathsep.join(map(str, checkpoints)))} --gen-subset test "
        f"--strides {options.strides} "
        f"--sample-break-mode none --max-tokens 4096 --results-path {shlex.quote(str(report))}"
    )
    return report


def print_table(rows: list[dict[str, Any]], stride: int | str) -> None:
    """Prints perplexities, models down, lengths across."""
    rows = [row for row in rows if row["stride"] == stride]
    lengths = sorted({row["eval_length"] for row in rows})
    print(f"  {'':<12}" + "".join(f"{length:>10,}" for length in lengths))
    for method in METHODS:
        found = {r["eval_length"]: r["perplexity"] for r in rows if r["position_method"] == method}
        print(f"  {method:<12}" + "".join(f"{found[length]:>10.2f}" for length in lengths))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", nargs=3, metavar=("TRAIN", "VALID", "TEST"), help="text files to use instead"
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of all results")
    parser.add_argument("--length", type=int, default=64, help="training length (default: 64)")
    parser.add_argument("--updates", type=int, default=500, help="updates of each training")
    parser.add_argument(
        "--quick", action="store_true", help="a minute only: less text, 60 updates each"
    )
    options = parser.parse_args()
    options.most_tokens = 40_000 if options.quick else 1_000_000
    if options.quick:
        options.updates = min(options.updates, 60)
    options.strides = "length" if options.quick else f"length,{options.length}"
    folder = (options.out / ("quick" if options.quick else "full")).resolve()
    try:
        make_writable_folder(folder, "--out")
    except OSError as error:
        raise SystemExit(f"{error.strerror}: {error.filename}") from None
    began = time.monotonic()
    data = prepare(options, folder)
    checkpoints = [train(options, method, data, folder) for method in METHODS]
    report = sweep(options, data, checkpoints)
    rows = json.loads((report / "report.json").read_text())
    minutes, seconds = divmod(math.ceil(time.monotonic() - began), 60)
    print(f"\nTrained on sequences of {options.length} tokens; perplexity of the test text in")
    print("windows of so many tokens, one after the other:\n")
    print_table(rows, "length")
    if not options.quick:
        print(f"\n... and in windows that slide by {options.length} tokens:\n")
        print_table(rows, options.length)
    print(f"\npicture  {report / 'extrapolation.png'}\n         {report / 'by_position.png'}")
    print(f"report   {report / 'report.md'}\ntook {minutes} min {seconds} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
