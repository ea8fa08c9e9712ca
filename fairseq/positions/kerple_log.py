"""The logarithmic bias of KERPLE (Chi, Fan, Ramadge, Rudnicky, NeurIPS 2022)."""

from __future__ import annotations

import torch
from torch import nn

from fairseq.positions.base import Surroundings, WeightedMethod
from fairseq.positions.distance_bias import DistanceBias, per_head

__all__ = ["KerpleLog"]


class KerpleLog(WeightedMethod):
    """The bias -r1 log(1 + r2 d) with trained r1, r2 > 0 for each head.

    Weights, (H,) each: `log_r1` and `log_r2`, the logarithms, so that any value is allowed. r1
    is drawn from (0, 2), r2 from (0, 1) at first.
    """

    name = "kerple-log"

    def __init__(self, model: Surroundings) -> None:
        super().__init__(model)
        self.log_r1 = nn.Parameter(log_uniform(model.num_heads, 2.0))
        self.log_r2 = nn.Parameter(log_uniform(model.num_heads, 1.0))

    def bias(self, sequence_length: int | None = None) -> DistanceBias:
        r1, r2 = (per_head(each.float().exp()) for each in (self.log_r1, self.log_r2))
        return DistanceBias(_logarithmic, r1, r2, is_learned=True)


def log_uniform(num_heads: int, high: float, low: float = 0.01) -> torch.Tensor:
    """Draws the logarithms of numbers that are uniform between `low` and `high`, (H,)."""
    return torch.empty(num_heads).uniform_(low, high).log_()


def _logarithmic(distance: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor) -> torch.Tensor:
    return -r1 * (r2 * distance).log1p()
