"""The table of position methods."""

from __future__ import annotations

import difflib

from fairseq.positions.alibi import Alibi
from fairseq.positions.base import PositionMethod
from fairseq.positions.learned import Learned
from fairseq.positions.no_positions import NoPositions
from fairseq.positions.sinusoidal import Sinusoidal

__all__ = ["METHODS", "find_method"]

METHODS: dict[str, type[PositionMethod]] = {
    method.name: method for method in (Alibi, Sinusoidal, Learned, NoPositions)
}


def find_method(name: str) -> type[PositionMethod]:
    """Returns the class of a position method.

    Raises:
        ValueError: no method has that name.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        known = ", ".join([*near, *(other for other in METHODS if other not in near)])
        raise ValueError(f"--position-method: unknown method {name!r}; known are {known}")
    return METHODS[name]
