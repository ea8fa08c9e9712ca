"""Linear biases for queries that also see what comes after them: encoders and prefixes.

Each carries the rule it is meant for. Let i be a query's position, j a key's, and m_h the slope of
head h. Shapes: `B` rows, `H` heads, `T` queries, `S` keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fairseq.attention.bias import AttentionBias, LinearBias, Slopes
from fairseq.attention.coordinates import Positions, signed_distance
from fairseq.attention.rules import BIDIRECTIONAL, PrefixRule, SplitHeadsRule

__all__ = ["PrefixBias", "SplitHeadsBias", "SymmetricBias", "TwoSlopeBias"]

Numbers = Sequence[float] | torch.Tensor


class SymmetricBias(LinearBias):
    """-m_h |i - j| both ways; left and right are told apart by nothing.

    Args:
        slopes: one number for each head.
    """

    rule = BIDIRECTIONAL

    def heads(self, which: slice) -> SymmetricBias:
        return SymmetricBias(self.slopes[which])


class SplitHeadsBias(LinearBias):
    """-m_h |i - j|; some heads see only what is left of a query, the others only what is right.

    Every head sees the query's own position.

    Args:
        slopes: one number for each head. Where both halves are to reach as far,
            `2 * alibi_slopes(num_heads // 2)`.
        looks_left: whether a head looks left; by default the first half of the heads does, or one
            more.

    Raises:
        ValueError: the two do not have the same length.
    """

    rule: SplitHeadsRule

    def __init__(self, slopes: Numbers, looks_left: Sequence[bool] | None = None) -> None:
        super().__init__(slopes)
        if looks_left is None:
            self.rule = SplitHeadsRule.halves(self.num_heads)
        else:
            self.rule = SplitHeadsRule(tuple(looks_left))
        _check_heads("looks_left", len(self.rule.looks_left), self.num_heads)

    def heads(self, which: slice) -> SplitHeadsBias:
        return SplitHeadsBias(self.slopes[which], self.rule.heads(which).looks_left)


class TwoSlopeBias(AttentionBias):
    """-left_h (i - j) for keys on the left, -right_h (j - i) for keys on the right.

    Args:
        left_slopes: one number for each head.
        right_slopes: one number for each head.

    Raises:
        ValueError: the two do not have the same length.
    """

    rule = BIDIRECTIONAL
    is_relative = True

    def __init__(self, left_slopes: Numbers, right_slopes: Numbers) -> None:
        self.left_slopes = torch.as_tensor(left_slopes, dtype=torch.float32, device="cpu")  # (H,)
        self.right_slopes = torch.as_tensor(right_slopes, dtype=torch.float32, device="cpu")
        self.num_heads = len(self.left_slopes)
        _check_heads("right_slopes", len(self.right_slopes), self.num_heads)

    def decay(self) -> Slopes:
        return self.linear_slopes()

    def linear_slopes(self) -> Slopes:
        return Slopes(self.left_slopes, self.right_slopes)

    def dense(
        self,
        query_positions: Positions,
        key_positions: Positions,
        *,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        distance = signed_distance(query_positions, key_positions, device).unsqueeze(-3)
        left, right = (
            slopes.to(distance.device).view(-1, 1, 1)
            for slopes in (self.left_slopes, self.right_slopes)
        )
        return right * distance.clamp(max=0) - left * distance.clamp(min=0)

    def heads(self, which: slice) -> TwoSlopeBias:
        return TwoSlopeBias(self.left_slopes[which], self.right_slopes[which])


class PrefixBias(LinearBias):
    """-m_h |i - j|, both ways within a prefix and causal after it (prefix language models).

    Args:
        slopes: one number for each head.
        lengths: positions below this number are the prefix: one number, or int (B,), one for each
            row.
    """

    rule: PrefixRule

    def __init__(self, slopes: Numbers, lengths: int | Sequence[int] | torch.Tensor) -> None:
        super().__init__(slopes)
        self.rule = PrefixRule(lengths)

    def heads(self, which: slice) -> PrefixBias:
        return PrefixBias(self.slopes[which], self.rule.lengths)


def _check_heads(name: str, given: int, num_heads: int) -> None:
    if given != num_heads:
        raise ValueError(f"{name} has {given} values for {num_heads} heads; give one for each head")
