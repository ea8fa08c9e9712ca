"""Biases that depend on distance alone, each head by a formula with numbers of its own.

Shapes: `H` heads, `T` queries, `S` keys, `N` distances.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fairseq.attention import AttentionBias, Positions
from fairseq.attention.coordinates import signed_distance

__all__ = ["DistanceBias", "per_head"]

Formula = Callable[..., torch.Tensor]


def per_head(numbers: torch.Tensor) -> torch.Tensor:
    """Returns one number for each head (H,) as float32 (H, 1, 1), against distances (1, T, S)."""
    return numbers.float().view(-1, 1, 1)


class DistanceBias(AttentionBias):
    """The bias formula(|query position - key position|, numbers of the head).

    Between ranges of positions there are T + S - 1 distances at most: the formula is computed once
    for each and its values are laid out as the rows of a Toeplitz matrix.

    Args:
        formula: called with distances (..., 1, T, S) in float32 and `numbers`; returns
            (..., H, T, S).
        *numbers: tensors with one row for each head, (H, ...).
        is_learned: whether gradients flow into the numbers.
    """

    is_relative = True

    def __init__(self, formula: Formula, *numbers: torch.Tensor, is_learned: bool = False) -> None:
        self.formula = formula
        self.numbers = numbers
        self.num_heads = len(numbers[0])
        self.is_learned = is_learned

    def dense(
        self,
        query_positions: Positions,
        key_positions: Positions,
        *,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        query, key = query_positions, key_positions
        if isinstance(query, range) and isinstance(key, range) and query.step == key.step == 1:
            return self._toeplitz(query, key, device)
        distance = signed_distance(query, key, device).abs_()  # (T, S) or (B, T, S)
        return self._values(distance.unsqueeze(-3))

    def _toeplitz(self, query: range, key: range, device: torch.device | None) -> torch.Tensor:
        if len(query) == 0 or len(key) == 0:
            return torch.zeros(self.num_heads, len(query), len(key), device=device)
        # Query t and key s are first - t + s apart, so row t starts t before the end.
        first = key.start - query.start
        offsets = torch.arange(
            first - len(query) + 1, first + len(key), dtype=torch.float32, device=device
        )
        values = self._values(offsets.abs_().view(1, 1, -1)).squeeze(-2)  # (H, N)
        return values.unfold(-1, len(key), 1).flip(-2)

    def _values(self, distance: torch.Tensor) -> torch.Tensor:
        numbers = (each.to(distance.device) for each in self.numbers)
        return self.formula(distance, *numbers)

    def heads(self, which: slice) -> DistanceBias:
        chosen = (each[which] for each in self.numbers)
        return DistanceBias(self.formula, *chosen, is_learned=self.is_learned)

    def through(self, function: Callable[[torch.Tensor], torch.Tensor]) -> DistanceBias:
        if not self.is_learned:
            return self
        return DistanceBias(self.formula, *map(function, self.numbers), is_learned=True)
