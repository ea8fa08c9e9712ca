#!/usr/bin/env python3
"""Counts the documents in a text, which blank lines separate, and their mean lines and tokens."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fairseq.data.text_documents import documents, open_text
from fairseq_cli._run import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script with command-line arguments.

    Raises:
        ValueError: there is no document in the text.
    """
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("input", help="the text")
    parser.add_argument("--gzip", action="store_true", help="it is compressed by gzip")
    args = parser.parse_args(arguments)
    num_docs = num_lines = num_tokens = 0
    with open_text(args.input, is_gzip=args.gzip) as text:
        for document in documents(text):
            num_docs += 1
            num_lines += len(document)
            num_tokens += sum(len(line.split()) for line in document)
    if not num_docs:
        raise ValueError(f"{args.input} holds nothing but blank lines")
    print(f"found {num_docs} docs")
    print(f"average num lines per doc: {num_lines / num_docs}")
    print(f"average num toks per doc: {num_tokens / num_docs}")


if __name__ == "__main__":
    run_command(main)
