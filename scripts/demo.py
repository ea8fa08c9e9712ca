#!/usr/bin/env python3
"""Train short, test long: the whole pipeline on text that every Python brings along.

Splits the help topics and docstrings of Python's standard library into words and punctuation (or
takes three files of your own), then runs fairseq-preprocess, fairseq-train and fairseq-eval-lm: an
ALiBi language model is trained on short sequences and evaluated on sequences up to 16 times as
long. What is done already is reused; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

TOKEN = re.compile(r"\w+|[^\w\s]")

# Of the lines that the commands log, those that tell how far they are.
NEWS = ("train_inner |", "train |", "valid |", "fairseq_cli.preprocess |")


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


def run(command: str, *, quiet: bool = False) -> str:
    """Runs one of the project's commands, showing it and its output; returns what it printed."""
    print(f"\n$ {command}", flush=True)
    argv = shlex.split(command)
    module = argv[0].replace("fairseq-", "fairseq_cli.").replace("-", "_")
    program = [sys.executable, "-c", f"from {module} import cli_main; cli_main()", *argv[1:]]
    printed = []
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            is_warning = " | WARNING | " in line
            _, is_info, shown = line.partition(" | INFO | ")
            is_news = bool(is_info) and shown.startswith(NEWS) and "Namespace(" not in shown
            if is_warning or (is_news and not quiet):
                print("  " + (line if is_warning else shown), end="", flush=True)
    if process.returncode:
        sys.stdout.writelines(printed[-5:] if quiet else [])
        raise SystemExit(f"{argv[0]} ended with exit code {process.returncode}")
    return "".join(printed)


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


def train(options: argparse.Namespace, data: Path, folder: Path) -> Path:
    """Trains the model, or goes on training it; returns its last checkpoint."""
    identity = hashlib.sha256((data / "dict.txt").read_bytes()).hexdigest()[:8]
    name = f"alibi-L{options.length}-{options.updates}-updates-{identity}"
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


def evaluate(options: argparse.Namespace, data: Path, checkpoint: Path) -> list[dict[str, float]]:
    """Evaluates the model at each length; returns a row for each."""
    results = checkpoint.parent / "results.json"
    rows = json.loads(results.read_text()) if results.exists() else []
    for length in options.lengths:
        if any(row["length"] == length for row in rows):
            continue
        began = time.monotonic()
        printed = run(
            f"fairseq-eval-lm {shlex.quote(str(data))} --path {shlex.quote(str(checkpoint))} "
            f"--gen-subset test --sample-break-mode none --tokens-per-sample {length} "
            f"--max-tokens {max(length, 4096)}",
            quiet=True,
        )
        tokens = int(re.search(r"Evaluated ([\d,]+) tokens", printed)[1].replace(",", ""))
        bits = float(re.search(r"Loss \(base 2\): ([\d.]+)", printed)[1])
        seconds = time.monotonic() - began
        rows.append({"length": length, "tokens": tokens, "bits": bits, "seconds": seconds})
        results.write_text(json.dumps(rows, indent=1))
        print(f"  length {length}: perplexity {2**bits:.2f}", flush=True)
    return sorted(rows, key=lambda row: row["length"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", nargs=3, metavar=("TRAIN", "VALID", "TEST"), help="text files to use instead"
    )
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder of all results")
    parser.add_argument("--length", type=int, default=64, help="training length (default: 64)")
    parser.add_argument("--updates", type=int, default=1200, help="updates of training")
    parser.add_argument("--quick", action="store_true", help="a minute only: less text, 60 updates")
    options = parser.parse_args()
    options.most_tokens = 40_000 if options.quick else 1_000_000
    if options.quick:
        options.updates = min(options.updates, 60)
    options.lengths = [options.length * 2**k for k in range(5)]
    folder = (options.out / ("quick" if options.quick else "full")).resolve()
    began = time.monotonic()
    data = prepare(options, folder)
    checkpoint = train(options, data, folder)
    rows = evaluate(options, data, checkpoint)
    minutes, seconds = divmod(math.ceil(time.monotonic() - began), 60)
    print(f"\nTrained on sequences of {options.length} tokens, tested on the test text:\n")
    print("  test length   perplexity   bits per token   tokens")
    for row in rows:
        length, bits = f"{row['length']:,}", row["bits"]
        print(f"  {length:>11}   {2**bits:>10.2f}   {bits:>14.4f}   {row['tokens']:,}")
    print(
        f"\nmodel    {checkpoint}\ndata     {data}\nresults  {checkpoint.parent / 'results.json'}"
    )
    print(f"took {minutes} min {seconds} s", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
