#!/usr/bin/env python3
"""Prints a binarized dataset, one item per line: words, or ids where no dictionary is given."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq.data import indexed_dataset
from fairseq.data.dictionary import Dictionary
from fairseq_cli._run import run_command


def get_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--input", metavar="PREFIX", required=True, help="what precedes .idx, .bin")
    parser.add_argument("--dict", metavar="FILE", help="dictionary; without one, ids are printed")
    parser.add_argument(
        "--dataset-impl",
        choices=indexed_dataset.get_available_dataset_impl(),
        help="format of the dataset; without it, the files tell",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Prints what the arguments name.

    Raises:
        FileNotFoundError: there is no such dataset or dictionary.
        ValueError: a file is damaged, or an id is beyond the dictionary.
    """
    dictionary = Dictionary.load(args.dict) if args.dict else None
    impl = args.dataset_impl or indexed_dataset.infer_dataset_impl(args.input)
    dataset = None
    if impl is not None:
        dataset = indexed_dataset.make_dataset(
            args.input, impl, fix_lua_indexing=True, dictionary=dictionary
        )
    if dataset is None:
        raise FileNotFoundError(f"Dataset not found: {args.input} (no .idx and .bin, no raw text)")
    for index in range(len(dataset)):
        ids = dataset.read(index)
        if dictionary is None:
            print(" ".join(map(str, ids)))
            continue
        if ids.size and ids.max() >= len(dictionary):
            raise ValueError(
                f"{args.input}: item {index} has the id {ids.max()}, but {args.dict} has only "
                f"{len(dictionary)} words; it is the dictionary of another dataset"
            )
        print(dictionary.string(ids))


if __name__ == "__main__":
    run_command(lambda: main(get_parser().parse_args()))
