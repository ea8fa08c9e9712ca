"""Sandwich (Chi, Fan, Rudnicky, Ramadge, ACL 2023, arXiv:2212.10356)."""

from __future__ import annotations

import torch

from fairseq.positions.base import PositionMethod, Surroundings
from fairseq.positions.distance_bias import DistanceBias, per_head

__all__ = ["Sandwich"]

NUM_FREQUENCIES = 64


class Sandwich(PositionMethod):
    """The inner product of two sinusoidal embeddings of width 128, divided by 8 h / H for head h.

    The bias is H / (8 h) * (sum over k < 64 of cos(d / 10000 ** (k / 64)) - 64), h = 1 ... H. The
    64, the sum at distance 0, makes no difference to a softmax, and keeps numbers small where they
    count. No weights.
    """

    name = "sandwich"

    def __init__(self, model: Surroundings) -> None:
        heads = torch.arange(1, model.num_heads + 1, dtype=torch.float32, device="cpu")
        self._bias = DistanceBias(_waves, per_head(model.num_heads / (8 * heads)))


def _waves(distance: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    total = torch.full_like(distance, -float(NUM_FREQUENCIES))
    for k in range(NUM_FREQUENCIES):  # one at a time, or memory would be 64 times as much
        total += torch.cos(distance * 10000.0 ** (-k / NUM_FREQUENCIES))
    return strengths * total
