#!/usr/bin/env python3
"""Draws k documents of a text for validation, each with equal chance; the rest is for training.

The text is read once, and only the drawn documents are kept in memory.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq.data.text_documents import documents, open_text, write_document
from fairseq_cli._run import run_command


class _Output:
    """A file of documents, or of lines."""

    def __init__(self, out: TextIO, by_lines: bool) -> None:
        self._out = out
        self._by_lines = by_lines
        self._is_first = True

    def write(self, document: Sequence[str]) -> None:
        write_document(self._out, document, is_first=self._is_first or self._by_lines)
        self._is_first = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script with command-line arguments.

    Raises:
        ValueError: there are fewer documents than are to be drawn.
    """
    args = get_parser().parse_args(arguments)
    rng = random.Random(args.seed)
    drawn: list[list[str]] = []
    with (
        open_text(args.input) as text,
        open(args.remainder_output, "w", encoding="utf-8", newline="\n") as rest,
    ):
        remainder = _Output(rest, args.lines)
        for number, document in enumerate(_units(text, by_lines=args.lines)):
            if len(drawn) < args.k:
                drawn.append(document)
                continue
            place = rng.randrange(number + 1)  # algorithm R: Vitter 1985
            if place < args.k:
                drawn[place], document = document, drawn[place]
            remainder.write(document)
    if len(drawn) < args.k:
        unit = "lines" if args.lines else "documents"
        raise ValueError(f"-k {args.k}: {args.input} has only {len(drawn)} {unit}")
    with open(args.sample_output, "w", encoding="utf-8", newline="\n") as out:
        sample = _Output(out, args.lines)
        for document in drawn:
            sample.write(document)


def _units(text: TextIO, *, by_lines: bool) -> Iterator[list[str]]:
    yield from ([line] for line in text) if by_lines else documents(text)


def get_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("input", help="the text")
    parser.add_argument("sample_output", help="file for the k documents")
    parser.add_argument("remainder_output", help="file for the others")
    parser.add_argument("-k", type=int, required=True, help="documents to draw")
    parser.add_argument("--lines", action="store_true", help="draw lines instead of documents")
    parser.add_argument(
        "--seed", type=int, help="draw the same every time; without it, others each time"
    )
    return parser


if __name__ == "__main__":
    run_command(main)
