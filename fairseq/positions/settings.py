"""What can be set of position methods; each method says which of these settings it reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass.base import II, FairseqDataclass

__all__ = ["INTERPOLATIONS", "ROTARY_SCALINGS", "PositionConfig"]

INTERPOLATIONS = ["none", "linear", "ntk"]
ROTARY_SCALINGS = ["none", "linear", "ntk", "yarn"]


def _option(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, "extension": True, **metadata})


@dataclass
class PositionConfig(FairseqDataclass):
    """The position method and its settings; none of them is known to the original."""

    position_method: str = _option("alibi", "how the model knows the order of tokens")
    alibi_bias_max: float = _option(8.0, "the gentlest of n heads has slope 2 ** -this")
    alibi_learned_slopes: bool = _option(False, "train the slopes, starting from the fixed ones")
    alibi_interpolation: str = _option(
        "none",
        "how slopes shrink for sequences longer than in training: all alike (linear), or the "
        "gentlest head most and the steepest not at all (ntk)",
        choices=INTERPOLATIONS,
    )
    alibi_interpolation_factor: float | None = _option(
        None, "fixed factor of the interpolation, for fine-tuning (default: from the lengths)"
    )
    alibi_train_length: int | None = _option(
        None, "training length of the interpolation (default: as stored in the checkpoint)"
    )
    rotary_base: float = _option(10000.0, "base of the wavelengths of rotary and xpos")
    rotary_scaling: str = _option(
        "none", "how rotary angles shrink for longer sequences", choices=ROTARY_SCALINGS
    )
    rotary_scaling_factor: float | None = _option(
        None, "fixed factor of the scaling, for fine-tuning (default: from the lengths)"
    )
    rotary_train_length: int | None = _option(
        None, "training length of the scaling (default: as stored in the checkpoint)"
    )
    # Filled from a checkpoint, where it is read before any override; no option.
    train_length: int | None = field(default=II("task.train_length"), metadata={"extension": True})
