#!/usr/bin/env python3
"""Downloads the checkpoints that the authors of ALiBi published for WikiText-103."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq.checkpoint import download
from fairseq_cli._run import run_command, set_up_logging


def get_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    lengths = [str(published.train_length) for published in download.PUBLISHED.values()]
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "lengths",
        nargs="*",
        metavar="LENGTH",
        choices=[*lengths, "all", []],
        help=f"training length of the model: {', '.join(lengths)}, or all",
    )
    parser.add_argument(
        "--dir", metavar="DIR", help="where they go; without it, the cache that the hub reads"
    )
    parser.add_argument(
        "--sha256", type=_sha256, help="what the hash of the file must be; for a single length"
    )
    parser.add_argument("--logs", action="store_true", help="download the training logs too")
    parser.add_argument(
        "--keep-dict",
        metavar="FILE",
        help="copy this dictionary of WikiText-103 (a dict.txt that fairseq-preprocess wrote) to "
        "the cache, where the hub looks for it",
    )
    return parser


def _sha256(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 64 hexadecimal digits")
    return text.lower()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script with command-line arguments.

    Raises:
        ValueError: a file is not what it should be.
        OSError: a file cannot be had or written.
    """
    parser = get_parser()
    args = parser.parse_args(arguments)
    names = [
        name
        for name, published in download.PUBLISHED.items()
        if "all" in args.lengths or str(published.train_length) in args.lengths
    ]
    if not names and args.keep_dict is None:
        parser.error("name a length, such as 512, or all")
    if args.sha256 is not None and len(names) != 1:
        parser.error("--sha256 is the hash of one file; name a single length")
    for name in names:
        path = download.published_checkpoint(name, folder=args.dir, sha256=args.sha256)
        print(path)
        if args.logs:
            print(download.published_log(name, folder=args.dir))
    if args.keep_dict is not None:
        print(download.keep_dictionary(args.keep_dict))


if __name__ == "__main__":
    set_up_logging(sys.stderr)
    run_command(main)
