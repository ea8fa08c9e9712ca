"""The power bias of KERPLE (Chi, Fan, Ramadge, Rudnicky, NeurIPS 2022)."""

from __future__ import annotations

import torch
from torch import nn

from fairseq.positions.base import Surroundings, WeightedMethod
from fairseq.positions.distance_bias import DistanceBias, per_head
from fairseq.positions.kerple_log import log_uniform

__all__ = ["KerplePower"]


class KerplePower(WeightedMethod):
    """The bias -r1 d ** r2 with trained r1 > 0 and 0 < r2 < 2 for each head; ALiBi has r2 = 1.

    Weights, (H,) each: `log_r1`, the logarithm of r1, which is drawn from (0, 2) at first, and
    `r2_logits`, with r2 = 2 sigmoid(r2_logits), 0 at first.
    """

    name = "kerple-power"

    def __init__(self, model: Surroundings) -> None:
        super().__init__(model)
        self.log_r1 = nn.Parameter(log_uniform(model.num_heads, 2.0))
        self.r2_logits = nn.Parameter(torch.zeros(model.num_heads))

    def bias(self, sequence_length: int | None = None) -> DistanceBias:
        r1, r2 = self.log_r1.float().exp(), 2 * self.r2_logits.float().sigmoid()
        return DistanceBias(_power, per_head(r1), per_head(r2), is_learned=True)


def _power(distance: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor) -> torch.Tensor:
    is_zero = distance == 0
    # The gradient of 0 ** r2 for r2 would have the logarithm of 0 in it.
    power = distance.masked_fill(is_zero, 1.0) ** r2
    return -r1 * power.masked_fill(is_zero, 0.0)
