"""ALiBi with distances in logarithms."""

from __future__ import annotations

import torch

from fairseq.positions.alibi_slopes import alibi_slopes
from fairseq.positions.base import PositionMethod, Surroundings
from fairseq.positions.distance_bias import DistanceBias, per_head

__all__ = ["AlibiLog"]


class AlibiLog(PositionMethod):
    """The bias -m_h log(1 + d), with the slopes of ALiBi; no weights.

    Far keys keep a weight that falls as a power of distance instead of exponentially, so that it
    does not underflow.
    """

    name = "alibi-log"
    settings = ("alibi_bias_max",)

    def __init__(self, model: Surroundings) -> None:
        slopes = alibi_slopes(model.num_heads, model.settings.alibi_bias_max)
        self._bias = DistanceBias(_logarithmic, per_head(torch.tensor(slopes, device="cpu")))


def _logarithmic(distance: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    return -slopes * distance.log1p()
