"""The relative position bias of T5 (Raffel et al., JMLR 2020, section 2.1)."""

from __future__ import annotations

import math

import torch
from torch import nn

from fairseq.positions.base import Surroundings, WeightedMethod
from fairseq.positions.distance_bias import DistanceBias

__all__ = ["T5", "bucket_starts"]

NUM_BUCKETS = 32
MAX_DISTANCE = 128


class T5(WeightedMethod):
    """A trained number for each head and bucket of distances, shared by all layers.

    The first half of the buckets holds one distance each, the other half ranges that grow in
    proportion to distance, the last one everything from 128 on. Weight: `buckets` (H, 32).
    """

    name = "t5"

    def __init__(self, model: Surroundings) -> None:
        super().__init__(model)
        width = model.num_heads * model.head_dim
        self.buckets = nn.Parameter(torch.empty(model.num_heads, NUM_BUCKETS))
        nn.init.normal_(self.buckets, std=width**-0.5)
        self._starts = torch.tensor(bucket_starts(), dtype=torch.float32, device="cpu")

    def bias(self, sequence_length: int | None = None) -> DistanceBias:
        return DistanceBias(self._look_up, self.buckets.float(), is_learned=True)

    def _look_up(self, distance: torch.Tensor, buckets: torch.Tensor) -> torch.Tensor:
        starts = self._starts.to(distance.device)
        which = torch.bucketize(distance, starts, right=True) - 1  # (..., 1, T, S)
        # Heads last, then in the place of the axis that was left for them.
        return buckets.t()[which.squeeze(-3)].movedim(-1, -3)


def bucket_starts(num_buckets: int = NUM_BUCKETS, max_distance: int = MAX_DISTANCE) -> list[int]:
    """Returns the smallest distance of each bucket."""
    exact = num_buckets // 2
    growth = math.log(max_distance / exact) / (num_buckets - exact)
    coarse = [math.ceil(exact * math.exp(growth * k)) for k in range(1, num_buckets - exact)]
    return [*range(exact + 1), *coarse]
