"""How a line of text falls into tokens, and how words come back from pieces."""

from __future__ import annotations

__all__ = ["post_process", "tokenize_line"]

_WORD_START = "\u2581"


def tokenize_line(line: str) -> list[str]:
    """Splits a line at runs of Unicode white space; returns its tokens.

    The rule is the regular expression `\\s+`; `str.split` follows it for every code point.
    """
    return line.split()


def post_process(sentence: str, symbol: str | None) -> str:
    """Joins the pieces of words again.

    Args:
        sentence: tokens separated by single spaces.
        symbol: what marks the pieces: `subword_nmt` or `@@ `, `sentencepiece`, `wordpiece`,
            `letter`, `_EOW`; None or `none` leaves the sentence as it is.

    Raises:
        NotImplementedError: the symbol is none of these.
    """
    if symbol in (None, "none"):
        return sentence
    if symbol in ("subword_nmt", "@@ "):
        return (sentence + " ").replace("@@ ", "").rstrip()
    pieces = sentence.replace(" ", "")
    if symbol == "sentencepiece":
        return pieces.replace(_WORD_START, " ").strip()
    separators = {"wordpiece": "_", "letter": "|", "_EOW": "_EOW"}
    if symbol not in separators:
        known = "subword_nmt, '@@ ', sentencepiece, wordpiece, letter, _EOW, none"
        raise NotImplementedError(f"unknown post-processing {symbol!r}; known are {known}")
    return pieces.replace(separators[symbol], " ")
