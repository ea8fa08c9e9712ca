#!/usr/bin/env python3
"""Cuts text into the pieces of a sentencepiece model, in one file or in several line by line."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq_cli._run import run_command


def load_model(path: str) -> Any:
    """Loads a sentencepiece model.

    Raises:
        ImportError: sentencepiece is not installed.
        FileNotFoundError: there is no such file.
        ValueError: it is no model.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError("sentencepiece is needed: pip install sentencepiece") from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"--model: there is no {path}")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"--model: {path} is no sentencepiece model") from error


Encode = Callable[[str], list[str]]


def encoder(model: Any, output_format: str) -> Encode:
    """Returns what cuts a line into pieces, or into the ids of pieces."""
    if output_format == "piece":
        return lambda line: model.encode(line, out_type=str)
    return lambda line: [str(number) for number in model.encode(line, out_type=int)]


def encode_lines(
    lines: Sequence[str], encode: Encode, args: argparse.Namespace, left_out: Counter[str]
) -> list[str] | None:
    """Encodes lines that belong together; None if one of them is empty or of another length."""
    encoded = []
    for line in map(str.strip, lines):
        pieces = encode(line)
        if not line:
            left_out["empty"] += 1
            return None
        too_short = args.min_len is not None and len(pieces) < args.min_len
        too_long = args.max_len is not None and len(pieces) > args.max_len
        if too_short or too_long:
            left_out["filtered"] += 1
            return None
        encoded.append(" ".join(pieces))
    return encoded


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script with command-line arguments.

    Raises:
        ValueError: the inputs have different numbers of lines.
    """
    parser = get_parser()
    args = parser.parse_args(arguments)
    if len(args.inputs) != len(args.outputs):
        parser.error("as many --outputs as --inputs are needed")
    encode = encoder(load_model(args.model), args.output_format)
    left_out: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        inputs = [open_stream(stack, name, "r") for name in args.inputs]
        outputs = [open_stream(stack, name, "w") for name in args.outputs]
        for number, lines in enumerate(zip(*inputs, strict=False), start=1):
            encoded = encode_lines(lines, encode, args, left_out)
            for out, line in zip(outputs, encoded or [], strict=encoded is not None):
                print(line, file=out)
            if number % 10000 == 0:
                print(f"processed {number} lines", file=sys.stderr)
        if any(stream.readline() for stream in inputs):
            raise ValueError("--inputs: the files do not have equally many lines")
    for reason, count in sorted(left_out.items()):
        print(f"{reason}: {count} lines left out", file=sys.stderr)


def open_stream(stack: contextlib.ExitStack, name: str, mode: str) -> Any:
    """Opens a file for the time of a stack; - is standard input or output."""
    if name == "-":
        return sys.stdin if mode == "r" else sys.stdout
    return stack.enter_context(open(name, mode, encoding="utf-8", newline="\n"))


def get_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="the sentencepiece model")
    parser.add_argument("--inputs", nargs="+", default=["-"], metavar="FILE", help="- is stdin")
    parser.add_argument("--outputs", nargs="+", default=["-"], metavar="FILE", help="- is stdout")
    parser.add_argument("--output_format", choices=["piece", "id"], default="piece")
    parser.add_argument("--min-len", type=int, metavar="N", help="leave out lines of fewer pieces")
    parser.add_argument("--max-len", type=int, metavar="N", help="leave out lines of more pieces")
    return parser


if __name__ == "__main__":
    run_command(main)
