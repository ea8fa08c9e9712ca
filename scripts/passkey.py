#!/usr/bin/env python3
"""Passkey and copy: does a model find what lies far back, also beyond its training length?

  generate  writes train.txt and valid.txt, to be binarized by fairseq-preprocess
  evaluate  asks a checkpoint, and prints its accuracy by length and depth of the key
  run       does everything: text, data, a small model for each position method, the table

docs/diagnosis.md has a measured example.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq.evaluation.passkey import TASKS, Accuracy, documents, evaluate, vocabulary
from fairseq.evaluation.plot_passkey import plot_accuracy
from fairseq_cli._run import run_command


def generate(options: argparse.Namespace, folder: Path) -> None:
    """Writes the training and validation text of a task."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, number, seed in (
        ("train", options.documents, options.seed),
        ("valid", max(1, options.documents // 50), options.seed + 1_000_000),
    ):
        lines = documents(options.task, number, options.length, seed)
        with (folder / f"{split}.txt").open("w", encoding="utf-8") as file:
            file.writelines(" ".join(line.words) + "\n" for line in lines)
    # One dictionary for every task and length, so that a model can be asked about all of them.
    words = "".join(f"{word} 1\n" for word in vocabulary())
    (folder / "words.txt").write_text(words, encoding="utf-8")


def ask(options: argparse.Namespace, checkpoint: Path, data: Path) -> list[Accuracy]:
    """Evaluates a checkpoint."""
    from fairseq import checkpoint_utils, tasks

    state = checkpoint_utils.load_checkpoint_to_cpu(checkpoint)
    state["cfg"].task.data = str(data)
    task = tasks.setup_task(state["cfg"].task)
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoint)], task=task, state=state
    )
    rows = []
    for row in evaluate(
        models[0].eval(),
        task.source_dictionary,
        options.task,
        lengths=options.lengths,
        depths=options.depths,
        num_documents=options.samples,
        seed=options.seed,
    ):
        rows.append(row)
        if sys.stderr.isatty():
            print(f"\r  length {row.length}, depth {row.depth} ", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return rows


def table(rows: Sequence[Accuracy]) -> str:
    """Returns lengths down, depths across: the share of answers that are right."""
    lengths = list(dict.fromkeys(row.length for row in rows))
    depths = list(dict.fromkeys(row.depth for row in rows))
    by_cell = {(row.length, row.depth): row for row in rows}
    named = [f"depth {depth:g}" if depth is not None else "exact" for depth in depths]
    lines = ["| length | " + " | ".join(named) + " | tokens |", "|---" * (len(named) + 2) + "|"]
    for length in lengths:
        cells = [by_cell[length, depth] for depth in depths]
        tokens = sum(cell.tokens for cell in cells) / len(cells)
        shares = [f"{cell.exact:.0%}" for cell in cells]
        lines.append(f"| {length} | " + " | ".join(shares) + f" | {tokens:.0%} |")
    return "\n".join(lines)


def call(command: str) -> None:
    """Runs one of the project's commands; a terminal shows its progress, not its log."""
    print(f"$ {command}", flush=True)
    argv = shlex.split(command)
    module = argv[0].replace("fairseq-", "fairseq_cli.").replace("-", "_")
    program = [sys.executable, "-c", f"from {module} import cli_main; cli_main()", *argv[1:]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(program, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{argv[0]} ended with exit code {done.returncode}")


def run(options: argparse.Namespace) -> None:
    """Trains a small model for each method and asks all of them; training that is done is kept."""
    folder = options.out.resolve()
    text, data = folder / "text", folder / "data-bin"
    generate(options, text)
    train, valid, words, destination = (
        shlex.quote(str(path))
        for path in (text / "train.txt", text / "valid.txt", text / "words.txt", data)
    )
    call(
        f"fairseq-preprocess --only-source --trainpref {train} --validpref {valid} "
        f"--srcdict {words} --destdir {destination}"
    )
    report = []
    drawn: dict[str, list[Accuracy]] = {}
    for method in options.methods:
        save_dir = folder / f"{options.task}-{method}"
        started_at = time.monotonic()
        call(
            f"fairseq-train {destination} --task language_modeling --arch transformer_lm_gpt "
            f"--position-method {shlex.quote(method)} "
            f"--decoder-layers {options.layers} --decoder-embed-dim 64 --decoder-ffn-embed-dim 256 "
            "--decoder-attention-heads 8 --dropout 0 --attention-dropout 0 "
            "--share-decoder-input-output-embed --sample-break-mode eos "
            f"--tokens-per-sample {options.length} --max-tokens 2048 "
            f"--max-update {options.updates} "
            "--optimizer adam --adam-betas '(0.9, 0.98)' --lr 0.003 "
            "--lr-scheduler polynomial_decay --warmup-updates 100 --clip-norm 1.0 "
            f"--total-num-update {options.updates} "
            f"--no-epoch-checkpoints --disable-validation --seed {options.seed} "
            f"--cpu --num-workers 0 --save-dir {shlex.quote(str(save_dir))}"
        )
        seconds = time.monotonic() - started_at
        rows = ask(options, save_dir / "checkpoint_last.pt", data)
        print(
            f"\n{method}, trained at length {options.length} in {seconds:.0f} s\n\n{table(rows)}\n"
        )
        report.append(
            {
                "position_method": method,
                "seconds": seconds,
                "rows": [*map(dataclasses.asdict, rows)],
            }
        )
        (folder / f"{options.task}.json").write_text(json.dumps(report, indent=1) + "\n")
        drawn[method] = rows
    draw(options, drawn, folder / f"{options.task}.png")


def draw(options: argparse.Namespace, models: dict[str, list[Accuracy]], picture: Path) -> None:
    """Draws the heat map; without matplotlib says what is missing."""
    try:
        plot_accuracy(models, f"{options.task}: answers that are right", picture)
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
    else:
        print(f"picture   {picture}")


def numbers(kind: type) -> type:
    """Returns argparse's reader of numbers separated by commas."""

    def read(text: str) -> list[int | float]:
        return [kind(part) for part in text.split(",")]

    read.__name__ = f"comma-separated {kind.__name__}"
    return read


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making, asking = (
        argparse.ArgumentParser(add_help=False),
        argparse.ArgumentParser(add_help=False),
    )
    for each in (making, asking):
        each.add_argument("--task", choices=TASKS, default="passkey")
        each.add_argument("--seed", type=int, default=1)
    making.add_argument("--out", type=Path, required=True, help="folder for the text")
    making.add_argument("--length", type=int, default=64, help="tokens of the longest document")
    making.add_argument("--documents", type=int, default=40_000, help="training documents")
    asking.add_argument("--lengths", type=numbers(int), default=[64, 128, 256, 512, 1024])
    asking.add_argument("--depths", type=numbers(float), default=[0, 0.25, 0.5, 0.75, 1])
    asking.add_argument("--samples", type=int, default=100, help="documents a length and depth")
    commands.add_parser("generate", parents=[making], help="write text")
    evaluating = commands.add_parser("evaluate", parents=[asking], help="ask a checkpoint")
    evaluating.add_argument("data", type=Path, help="folder of the binarized text")
    evaluating.add_argument("--path", type=Path, required=True, help="checkpoint")
    evaluating.add_argument("--results-path", type=Path, help="file for the rows, as JSON")
    evaluating.add_argument("--picture", type=Path, help="file for a heat map")
    running = commands.add_parser(
        "run", parents=[making, asking], conflict_handler="resolve", help="everything"
    )
    running.add_argument(
        "--methods", type=lambda text: text.split(","), default=["alibi", "sinusoidal", "none"]
    )
    running.add_argument("--updates", type=int, default=1500, help="updates of training")
    running.add_argument("--layers", type=int, default=2, help="layers of the models")
    options = parser.parse_args()
    if options.command == "generate":
        generate(options, options.out)
    elif options.command == "run":
        run(options)
    else:
        rows = ask(options, options.path, options.data)
        print(table(rows))
        if options.results_path is not None:
            report = [dataclasses.asdict(row) for row in rows]
            options.results_path.write_text(json.dumps(report, indent=1) + "\n")
        if options.picture is not None:
            draw(options, {options.path.parent.name: rows}, options.picture)


if __name__ == "__main__":
    run_command(main)
