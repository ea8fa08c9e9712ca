"""FIRE: functional interpolation for relative positions (Li et al., ICLR 2024, arXiv:2310.04418).

Shapes: `B` rows, `H` heads, `T` queries, `S` keys, `W` hidden width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from fairseq.attention import AttentionBias, Positions
from fairseq.attention.coordinates import position_tensor
from fairseq.positions.base import Surroundings, WeightedMethod

__all__ = ["Fire", "FireBias"]

HIDDEN_WIDTH = 32
_FIRST_C = 0.1
_LARGEST_FIRST_THRESHOLD = 512


class Fire(WeightedMethod):
    """The bias f(psi(d) / psi(max(L0, i))) of a query at position i, psi(x) = log(1 + c x).

    f is a trained net from 1 number over 32 hidden ones (ReLU) to one for each head; c and L0 are
    trained too. A distance counts as a share of what the query can look back on, so that shares
    beyond the training length are those of training. Positions count from 0, without padding.

    Weights: `hidden.*`, `output.*`, `c` (1,), 0.1 at first, and `threshold_factor` (1,), 1 at
    first, by which the first L0 is multiplied. That is a quarter of the training length, 512 at
    most, and is stored as `first_threshold` (1,).
    """

    name = "fire"
    is_relative = False

    def __init__(self, model: Surroundings) -> None:
        super().__init__(model)
        self.hidden = nn.Linear(1, HIDDEN_WIDTH)
        self.output = nn.Linear(HIDDEN_WIDTH, model.num_heads)
        self.c = nn.Parameter(torch.full((1,), _FIRST_C))
        self.threshold_factor = nn.Parameter(torch.ones(1))
        threshold = min(_LARGEST_FIRST_THRESHOLD, (model.train_length or 2048) / 4)
        self.first_threshold: torch.Tensor
        self.register_buffer("first_threshold", torch.full((1,), float(threshold)))

    def bias(self, sequence_length: int | None = None) -> FireBias:
        threshold = (self.threshold_factor.float() * self.first_threshold.float()).abs()
        weights = [*self.hidden.parameters(), *self.output.parameters()]
        return FireBias(self.c.float().abs(), threshold, *(each.float() for each in weights))


class FireBias(AttentionBias):
    """The bias of FIRE, which depends on the query's own position besides distance.

    Args:
        c: steepness of psi, (1,).
        threshold: L0, (1,).
        hidden_weight: (W, 1).
        hidden_bias: (W,).
        output_weight: (H, W).
        output_bias: (H,).
    """

    is_learned = True

    def __init__(
        self,
        c: torch.Tensor,
        threshold: torch.Tensor,
        hidden_weight: torch.Tensor,
        hidden_bias: torch.Tensor,
        output_weight: torch.Tensor,
        output_bias: torch.Tensor,
    ) -> None:
        self.c = c
        self.threshold = threshold
        self.hidden = (hidden_weight, hidden_bias)
        self.output = (output_weight, output_bias)
        self.num_heads = len(output_bias)

    def dense(
        self,
        query_positions: Positions,
        key_positions: Positions,
        *,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        query = position_tensor(query_positions, device).unsqueeze(-1)  # (T, 1) or (B, T, 1)
        key = position_tensor(key_positions, device).unsqueeze(-2)
        span = torch.maximum(query, self.threshold)
        share = (self.c * (query - key).abs_()).log1p() / (self.c * span).log1p()  # (..., T, S)
        hidden = F.linear(share.unsqueeze(-1), *self.hidden).relu()  # (..., T, S, W)
        return F.linear(hidden, *self.output).movedim(-1, -3)  # (..., H, T, S)

    def heads(self, which: slice) -> FireBias:
        weight, bias = self.output
        return FireBias(self.c, self.threshold, *self.hidden, weight[which], bias[which])

    def through(self, function: Callable[[torch.Tensor], torch.Tensor]) -> FireBias:
        return FireBias(*map(function, (self.c, self.threshold, *self.hidden, *self.output)))
