#!/usr/bin/env python3
"""Trains a sentencepiece model; options as in `spm_train --help` of sentencepiece itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Hands the arguments to sentencepiece."""
    try:
        import sentencepiece
    except ImportError:
        sys.exit("spm_train: error: sentencepiece is needed: pip install sentencepiece")
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] in ("-h", "--help"):
        print(
            __doc__, "\n\nusage: spm_train.py --input=FILE --model_prefix=NAME --vocab_size=N ..."
        )
        sys.exit(0 if words else 2)
    try:
        sentencepiece.SentencePieceTrainer.Train(" ".join(words))
    except (RuntimeError, OSError) as error:
        sys.exit(f"spm_train: error: {error}")


if __name__ == "__main__":
    main()
