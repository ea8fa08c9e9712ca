#!/usr/bin/env python3
"""Deals the documents of a text, which blank lines separate, to several files in turn."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq.data.text_documents import documents, open_text, write_document
from fairseq_cli._run import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script with command-line arguments; writes `<input>.shard<i>`."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("input", help="the text")
    parser.add_argument("--num-shards", type=int, required=True, metavar="N", help="2 or more")
    args = parser.parse_args(arguments)
    if args.num_shards < 2:
        parser.error(f"--num-shards is {args.num_shards}; it must be at least 2")
    with contextlib.ExitStack() as stack:
        text = stack.enter_context(open_text(args.input))
        shards = [
            stack.enter_context(open(f"{args.input}.shard{i}", "w", encoding="utf-8", newline="\n"))
            for i in range(args.num_shards)
        ]
        for number, document in enumerate(documents(text)):
            shard = shards[number % args.num_shards]
            write_document(shard, document, is_first=number < args.num_shards)


if __name__ == "__main__":
    run_command(main)
