"""How a vocabulary, sorted by frequency, is cut into bands."""

from __future__ import annotations

import ast

__all__ = ["band_limits", "parse_cutoffs"]


def parse_cutoffs(text: str, flag: str) -> list[int]:
    """Reads cutoffs such as "20000,60000".

    Raises:
        ValueError: the text is no list of ascending positive whole numbers; the message names
            `flag`.
    """
    try:
        parsed = ast.literal_eval(text.strip())
    except (SyntaxError, ValueError):
        parsed = None
    cutoffs = list(parsed) if isinstance(parsed, (list, tuple)) else [parsed]
    is_whole = bool(cutoffs) and all(type(cutoff) is int and cutoff > 0 for cutoff in cutoffs)
    if not is_whole or cutoffs != sorted(set(cutoffs)):
        raise ValueError(
            f"{flag} {text!r} is not a list of ascending positive whole numbers such as 20000,60000"
        )
    return cutoffs


def band_limits(cutoffs: list[int], vocab_size: int, flag: str) -> list[int]:
    """Returns the end of each band; the last one is the size of the vocabulary.

    Args:
        cutoffs: ends of the bands but the last, ascending; the last one may be the vocabulary's.
        vocab_size: number of words V.
        flag: the option the cutoffs come from.

    Raises:
        ValueError: the vocabulary is smaller than the last cutoff.
    """
    given = ",".join(map(str, cutoffs))
    if vocab_size < cutoffs[-1]:
        raise ValueError(
            f"{flag} {given} goes beyond the vocabulary, which has {vocab_size} words; the last "
            f"cutoff must be at most {vocab_size}: choose smaller cutoffs, or the dictionary that "
            "the model was trained with"
        )
    return cutoffs if vocab_size == cutoffs[-1] else [*cutoffs, vocab_size]
