"""Settings of a model, whole, from whatever a caller or a checkpoint has of them."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from fairseq.dataclass import FairseqDataclass, is_interpolated

__all__ = ["complete"]

C = TypeVar("C", bound=FairseqDataclass)


def complete(cfg: Any, config_class: type[C]) -> C:
    """Returns the settings with every field set, as a dataclass; older settings lack some.

    Args:
        cfg: any object with attributes named as the fields.
        config_class: the dataclass.
    """
    filled: dict[str, Any] = {}
    for each in dataclasses.fields(config_class):
        default = config_class.default_of(each)
        default = None if is_interpolated(default) else default
        value = getattr(cfg, each.name, default)
        filled[each.name] = default if value is None or is_interpolated(value) else value
    return config_class(**filled)
