"""Words as white space separates them."""

from __future__ import annotations

from typing import Any

from fairseq.registry import TOKENIZERS
from fairseq.tokenizer import tokenize_line

__all__ = ["SpaceTokenizer"]


@TOKENIZERS.register("space")
class SpaceTokenizer:
    """Makes every run of white space one space."""

    def __init__(self, cfg: Any = None) -> None:
        pass

    def encode(self, text: str) -> str:
        """Returns the words of a line, separated by single spaces."""
        return " ".join(tokenize_line(text))

    def decode(self, text: str) -> str:
        """Returns the text as it is."""
        return text
