#!/usr/bin/env python3
"""Deletes the checkpoints under folders, but for the best, the last, and those asked to be kept."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq_cli._run import run_command

_CHECKPOINT = re.compile(r"checkpoint(\d+|_\d+_\d+|_[a-z]+)\.pt")
_BY_EPOCH = re.compile(r"checkpoint(\d+)\.pt")
_BY_UPDATE = re.compile(r"checkpoint_\d+_(\d+)\.pt")


def newest_first(names: Sequence[str]) -> list[str]:
    """Returns the checkpoints of updates, or if there are none those of epochs, newest first."""
    for pattern in (_BY_UPDATE, _BY_EPOCH):
        found = [(int(match[1]), name) for name in names if (match := pattern.fullmatch(name))]
        if found:
            return [name for _, name in sorted(found, reverse=True)]
    return []


def kept_in(folder: str, names: Sequence[str], args: argparse.Namespace) -> set[str]:
    """Returns which checkpoints of a folder stay."""
    if args.preserve_test and os.path.basename(folder).startswith("test_"):
        return set(names)
    numbered = newest_first(names)
    kept = set(numbered[: args.save_last])
    if args.save_every:
        kept |= set(numbered[:: args.save_every])
    kept |= {"checkpoint_last.pt"} if not args.delete_last else set()
    kept |= {"checkpoint_best.pt"} if not args.delete_best else set()
    return kept


def checkpoints_under(roots: Sequence[str], args: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    """Yields the path of each checkpoint and whether it stays."""
    for root in roots:
        for folder, _, files in os.walk(root):
            names = sorted(name for name in files if _CHECKPOINT.fullmatch(name))
            kept = kept_in(folder, names, args)
            yield from ((os.path.join(folder, name), name in kept) for name in names)


def delete(path: str, *, dereference: bool) -> None:
    """Deletes a file; of a symbolic link, also what it points to."""
    if dereference and os.path.islink(path) and os.path.exists(path):
        os.remove(os.path.realpath(path))
    os.remove(path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script with command-line arguments.

    Raises:
        FileNotFoundError: a folder is not there.
    """
    args = get_parser().parse_args(arguments)
    for root in args.root_dirs:
        if not os.path.isdir(root):
            raise FileNotFoundError(f"{root} is no folder")
    found = list(checkpoints_under(args.root_dirs, args))
    doomed = [path for path, stays in found if not stays]
    for heading, stays in (("Files to preserve:", True), ("Files to delete:", False)):
        print(heading, *(f"  {path}" for path, is_kept in found if is_kept == stays), sep="\n")
    if not doomed:
        print("Nothing to delete")
        return
    if input(f"Delete {len(doomed)} files? Type YES to do it: ") != "YES":
        print("Nothing was deleted")
        return
    linked = [os.path.realpath(path) for path, stays in found if stays]
    for path in doomed:
        # What a checkpoint that stays points to, stays too.
        delete(path, dereference=not args.no_dereference and os.path.realpath(path) not in linked)
    print(f"Deleted {len(doomed)} files")


def get_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("root_dirs", nargs="+", help="folders, with all folders in them")
    parser.add_argument(
        "--save-last", type=int, default=0, metavar="N", help="keep the newest N with numbers"
    )
    parser.add_argument(
        "--save-every",
        type=int,
        default=0,
        metavar="N",
        help="keep every Nth with a number, from the newest on",
    )
    parser.add_argument(
        "--preserve-test", action="store_true", help="keep all in folders whose name starts test_"
    )
    parser.add_argument("--delete-best", action="store_true", help="delete checkpoint_best.pt too")
    parser.add_argument("--delete-last", action="store_true", help="delete checkpoint_last.pt too")
    parser.add_argument(
        "--no-dereference",
        action="store_true",
        help="delete symbolic links, not the files that they point to",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
