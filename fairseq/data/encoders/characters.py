"""Text as a sequence of characters."""

from __future__ import annotations

from typing import Any

from fairseq.registry import BPES

__all__ = ["Characters"]

_SPACE, _WORD_START = " ", "\u2581"


@BPES.register("characters")
class Characters:
    """Writes each character as a token of its own, and a space as U+2581."""

    def __init__(self, cfg: Any = None) -> None:
        pass

    def encode(self, text: str) -> str:
        """Returns the characters, separated by single spaces."""
        return _SPACE.join(text.replace(_SPACE, _WORD_START))

    def decode(self, text: str) -> str:
        """Joins characters to text."""
        return text.replace(_SPACE, "").replace(_WORD_START, _SPACE)
