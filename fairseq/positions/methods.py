"""The table of position methods."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

from fairseq.positions.alibi import Alibi
from fairseq.positions.alibi_log import AlibiLog
from fairseq.positions.base import PositionMethod
from fairseq.positions.fire import Fire
from fairseq.positions.ggd import GeneralisedGaussian
from fairseq.positions.kerple_log import KerpleLog
from fairseq.positions.kerple_power import KerplePower
from fairseq.positions.learned import Learned
from fairseq.positions.no_positions import NoPositions
from fairseq.positions.rotary import Rotary
from fairseq.positions.sandwich import Sandwich
from fairseq.positions.settings import PositionConfig
from fairseq.positions.sinusoidal import Sinusoidal
from fairseq.positions.t5 import T5
from fairseq.positions.xpos import XPos

__all__ = ["METHODS", "check_settings", "find_method", "foreign_settings"]

METHODS: dict[str, type[PositionMethod]] = {
    method.name: method
    for method in (
        Alibi,
        Sinusoidal,
        Learned,
        NoPositions,
        Rotary,
        XPos,
        T5,
        KerpleLog,
        KerplePower,
        Sandwich,
        Fire,
        AlibiLog,
        GeneralisedGaussian,
    )
}


def find_method(name: str) -> type[PositionMethod]:
    """Returns the class of a position method.

    Raises:
        ValueError: no method has that name.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3)
        known = ", ".join([*near, *(other for other in METHODS if other not in near)])
        raise ValueError(f"--position-method: unknown method {name!r}; known are {known}")
    return METHODS[name]


def foreign_settings(cfg: Any) -> Iterable[str]:
    """Yields the settings of position methods that are set but not read by the chosen one."""
    own = {"_name", "position_method", "train_length", *find_method(cfg.position_method).settings}
    for each in dataclasses.fields(PositionConfig):
        if each.name not in own and getattr(cfg, each.name, each.default) != each.default:
            yield each.name


def check_settings(cfg: Any) -> None:
    """Checks that the settings belong to the chosen method.

    Raises:
        ValueError: the method is unknown, or a setting is one of other methods alone.
    """
    for name in foreign_settings(cfg):
        flag = "--" + name.replace("_", "-")
        owners = [method.name for method in METHODS.values() if name in method.settings]
        raise ValueError(
            f"{flag} does not belong to --position-method {cfg.position_method}; it is a setting "
            f"of {', '.join(owners)}"
        )
