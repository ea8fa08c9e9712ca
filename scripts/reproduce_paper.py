#!/usr/bin/env python3
"""The WikiText-103 numbers of the ALiBi paper, from the published checkpoints, ours beside theirs.

Downloads text and checkpoints, binarizes the text, evaluates, and writes paper.md and paper.json.
What is done already is not done again, so the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq.checkpoint.download import PUBLISHED, published_checkpoint
from fairseq.checkpoint.writing import write_atomically
from fairseq_cli._run import run_command, set_up_logging

ROOT = Path(__file__).resolve().parent.parent
# Press, Smith, Lewis 2022, table 5: perplexity on the validation set, non-overlapping; training
# length -> {evaluation length: perplexity}.
_LENGTHS = (64, 128, 256, 512, 1024, 1536, 2048, 3072)
_TABLE_5 = {
    64: (28.46, 24.70, 22.88, 22.09, 21.73, 21.63, 21.59, 21.53),
    128: (23.98, 21.70, 20.67, 20.36, 20.29, 20.31, 20.28),
    256: (21.29, 19.89, 19.29, 19.13, 19.10, 19.03),
    512: (19.73, 18.81, 18.50, 18.48, 18.40),
    1024: (18.66, 18.20, 18.05, 17.96),
    1536: (18.12, 17.90, 17.72),
    2048: (17.91, 17.64),
    3072: (17.60,),
}


@dataclass(frozen=True)
class Figure:
    """A number of the paper, and how it is measured.

    Attributes:
        table: where it stands in the paper.
        train_length: of the model.
        eval_length: tokens in a window.
        stride: new tokens in a window; None is all of them.
        subset: split.
        perplexity: the paper's.
    """

    table: str
    train_length: int
    eval_length: int
    stride: int | None
    subset: str
    perplexity: float


def _grid() -> list[Figure]:
    return [
        Figure("5", trained, length, None, "valid", perplexity)
        for trained, row in _TABLE_5.items()
        for length, perplexity in zip(_LENGTHS[-len(row) :], row, strict=True)
    ]


_TEST = [
    Figure("6", 512, 3072, None, "test", 19.08),
    Figure("6", 3072, 3072, None, "test", 18.30),
]
_SLIDING = [
    Figure("7", 512, 3072, 512, "valid", 18.30),
    Figure("7", 512, 3072, 512, "test", 19.01),
    Figure("7", 3072, 3072, 512, "valid", 16.97),
    Figure("7", 3072, 3072, 512, "test", 17.66),
]
# One token at a time: each costs a whole window.
_ONE_BY_ONE = {
    512: {512: 17.98, 1024: 17.92, 1536: 18.2, 2048: 18.28, 3072: 18.3},
    1024: {1024: 17.46, 1536: 17.47, 2048: 17.62, 3072: 17.92},
    3072: {3072: 16.96},
}
PAPER = [*_grid(), *_TEST, *_SLIDING]
PAPER_ONE_BY_ONE = [
    Figure("13-15", trained, length, 1, "valid", perplexity)
    for trained, row in _ONE_BY_ONE.items()
    for length, perplexity in row.items()
]


# ---- the steps ----


def run(*words: object) -> None:
    """Runs a command of this project, after showing it.

    Raises:
        RuntimeError: it failed; it has said why.
    """
    command = [str(word) for word in words]
    print("$ " + shlex.join(command), flush=True)
    module = "fairseq_cli." + command[0].removeprefix("fairseq-").replace("-", "_")
    program = f"from {module} import cli_main; cli_main()"
    program_words = [sys.executable, "-c", program, *command[1:]]
    code = subprocess.run(program_words).returncode
    if code:
        raise RuntimeError(f"{command[0]} ended with exit code {code}")


def prepare_data(options: argparse.Namespace) -> Path:
    """Returns the folder with the binarized text, after making it where there is none.

    Raises:
        RuntimeError: a step failed.
    """
    if options.data is not None:
        return Path(options.data)
    data = options.dir / "data-bin"
    if (data / "preprocess.log").exists():
        return data
    text = options.dir / "wikitext-103"
    script = ROOT / "examples/language_model/prepare-wikitext-103.sh"
    command = ["bash", str(script), str(text), *(["--any-text"] if options.any_text else [])]
    print("$ " + shlex.join(command), flush=True)
    if subprocess.run(command).returncode:
        raise RuntimeError("the text could not be prepared; --data names data that is there")
    prefixes = [
        word
        for split in ("train", "valid", "test")
        for word in (f"--{split}pref", text / f"wiki.{split}.tokens")
    ]
    run("fairseq-preprocess", "--only-source", *prefixes, "--destdir", data, "--workers", 4)
    return data


def evaluate(options: argparse.Namespace, data: Path, figures: Sequence[Figure]) -> list[float]:
    """Evaluates one model in one way at several lengths.

    Args:
        options: of the command line.
        data: folder with the binarized text.
        figures: with one training length, stride and subset.

    Returns:
        Our perplexities.
    """
    first = figures[0]
    checkpoint = published_checkpoint(f"alibi_wt103_L{first.train_length}", folder=options.models)
    stride = "length" if first.stride is None else str(first.stride)
    results = options.dir / f"L{first.train_length}-{first.subset}-{stride}"
    rows = max(1, 4096 // max(figure.eval_length for figure in figures))
    run(
        *("fairseq-extrapolate", data, "--path", checkpoint, "--gen-subset", first.subset),
        *("--lengths", ",".join(str(figure.eval_length) for figure in figures)),
        *("--strides", stride, "--max-sentences", rows, "--sample-break-mode", "none"),
        *("--results-path", results, "--no-plots", "--num-workers", 0),
        *(["--cpu"] if options.cpu else []),
    )
    measured = {row["eval_length"]: row["perplexity"] for row in _rows_in(results)}
    return [measured[figure.eval_length] for figure in figures]


def _rows_in(results: Path) -> list[dict[str, Any]]:
    content = json.loads((results / "report.json").read_text(encoding="utf-8"))
    return content if isinstance(content, list) else content["rows"]


# ---- the report ----

Result = tuple[Figure, float]


def table(results: Iterable[Result]) -> str:
    """Returns ours beside the paper's as a Markdown table."""
    lines = [
        "| table | trained at | evaluated at | windows | set | paper | ours | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for figure, ours in results:
        windows = "non-overlapping" if figure.stride is None else f"sliding by {figure.stride}"
        lines.append(
            f"| {figure.table} | {figure.train_length} | {figure.eval_length} | {windows} | "
            f"{figure.subset} | {figure.perplexity:.2f} | {ours:.2f} | "
            f"{ours - figure.perplexity:+.2f} |"
        )
    return "\n".join(lines) + "\n"


def write_report(folder: Path, results: Sequence[Result]) -> str:
    """Writes paper.md and paper.json; returns the table."""
    text = table(results)
    rows = [{**vars(figure), "ours": ours} for figure, ours in results]
    content = {"paper.md": text, "paper.json": json.dumps(rows, indent=1) + "\n"}
    for name, written in content.items():
        write_atomically(folder / name, lambda out, w=written: out.write(w.encode()))  # type: ignore[misc]
    return text


def figures_of(options: argparse.Namespace) -> list[list[Figure]]:
    """Returns the figures to reproduce, those of one evaluation together.

    Raises:
        ValueError: no figure is left.
    """
    chosen = [*PAPER, *(PAPER_ONE_BY_ONE if options.one_by_one else [])]
    groups: dict[tuple[int, str, int | None], list[Figure]] = {}
    for figure in chosen:
        if figure.train_length in options.lengths and figure.eval_length <= options.longest:
            key = (figure.train_length, figure.subset, figure.stride)
            groups.setdefault(key, []).append(figure)
    if not groups:
        raise ValueError("--lengths and --longest leave no number of the paper to reproduce")
    return list(groups.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script with command-line arguments."""
    options = get_parser().parse_args(arguments)
    groups = figures_of(options)
    options.dir.mkdir(parents=True, exist_ok=True)
    data = prepare_data(options)
    results: list[Result] = []
    for figures in groups:
        results += zip(figures, evaluate(options, data, figures), strict=True)
        write_report(options.dir, results)
    print("\n" + table(results), end="")
    print(f"\nwritten to {options.dir / 'paper.md'} and {options.dir / 'paper.json'}")


def get_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    lengths = [published.train_length for published in PUBLISHED.values()]
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--dir", type=Path, default=Path("paper"), help="where everything goes")
    parser.add_argument("--data", help="binarized WikiText-103, if there is some already")
    parser.add_argument("--models", metavar="DIR", help="folder of the checkpoints (the cache)")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        choices=lengths,
        default=lengths,
        metavar="L",
        help=f"models by their training length: {', '.join(map(str, lengths))} (all)",
    )
    parser.add_argument(
        "--longest", type=int, default=3072, metavar="L", help="longest evaluation length (3072)"
    )
    parser.add_argument(
        "--one-by-one",
        action="store_true",
        help="also tables 13 to 15, a window for each of 217,646 tokens: hours on a GPU",
    )
    parser.add_argument("--cpu", action="store_true", help="evaluate without a GPU")
    parser.add_argument(
        "--any-text", action="store_true", help="go on with another text than WikiText-103"
    )
    return parser


if __name__ == "__main__":
    set_up_logging(sys.stderr)
    run_command(main)
