#!/usr/bin/env python3
"""Joins the pieces of a sentencepiece model to text again."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from spm_encode import load_model, open_stream

from fairseq_cli._run import run_command

# How fairseq-generate spells an unknown word of a reference.
_UNKNOWN, _UNKNOWN_ID = "<<unk>>", 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script with command-line arguments.

    Raises:
        ValueError: with ids, a word is no number of the model.
    """
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="the sentencepiece model")
    parser.add_argument("--input", default="-", metavar="FILE", help="pieces or ids; - is stdin")
    parser.add_argument("--input_format", choices=["piece", "id"], default="piece")
    args = parser.parse_args(arguments)
    model = load_model(args.model)
    with contextlib.ExitStack() as stack:
        stream = open_stream(stack, args.input, "r")
        for number, line in enumerate(stream, start=1):
            words = line.split()
            if args.input_format == "id":
                print(model.decode([_id_of(w, number, model.get_piece_size()) for w in words]))
            else:
                print(model.decode(words))


def _id_of(word: str, line: int, size: int) -> int:
    if word == _UNKNOWN:
        return _UNKNOWN_ID
    if not word.isdigit() or int(word) >= size:
        raise ValueError(f"--input_format id: line {line} has {word!r}, no id below {size}")
    return int(word)


if __name__ == "__main__":
    run_command(main)
