"""Which position method a checkpoint's model was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairseq.checkpoint.format import ALIBI_KEY

__all__ = ["PositionMethod", "position_method_of"]


@dataclass(frozen=True)
class PositionMethod:
    """A position method and how it is known.

    Attributes:
        name: registered name of the method.
        reason: how it is known, in words for a log line.
        is_certain: False if the file does not tell and the ALiBi fork's reading was taken.
    """

    name: str
    reason: str
    is_certain: bool = True


def position_method_of(state: Mapping[str, Any]) -> PositionMethod:
    """Reads the position method from a checkpoint's dictionary, as it is in the file.

    A file of this project says it. In one with a nested `cfg`, the ALiBi fork shows by `max_tokens`
    in the model's section; without that, upstream fairseq's flags decide. A file with the flat
    `args` of older versions holds the options of every component and does not tell.
    """
    recorded = (state.get(ALIBI_KEY) or {}).get("position_method")
    if recorded:
        return PositionMethod(recorded, "recorded in the checkpoint")
    cfg = state.get("cfg")
    model = cfg.get("model") if isinstance(cfg, Mapping) else None
    if not isinstance(model, Mapping) or state.get("args") is not None:
        return PositionMethod("alibi", "the checkpoint does not tell", is_certain=False)
    if "max_tokens" in model:
        return PositionMethod("alibi", "max_tokens in the checkpoint's model settings")
    if model.get("no_token_positional_embeddings"):
        return PositionMethod("none", "no_token_positional_embeddings in the checkpoint")
    if model.get("decoder_learned_pos"):
        return PositionMethod("learned", "decoder_learned_pos in the checkpoint")
    return PositionMethod("sinusoidal", "upstream fairseq's settings in the checkpoint")
