"""What is added to attention scores, as a function of positions.

A bias is a small object without any L x L tensor in it; an attention backend turns it into what its
kernel needs. Shapes: `B` rows, `H` heads, `T` queries, `S` keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fairseq.attention.coordinates import Positions, position_tensor, signed_distance
from fairseq.attention.rules import CAUSAL, AttentionRule

__all__ = [
    "AttentionBias",
    "LinearBias",
    "Positions",
    "Slopes",
    "ZeroBias",
    "position_tensor",
]


@dataclass(frozen=True)
class Slopes:
    """How much a term falls with each step of distance, for each head.

    Attributes:
        left: towards keys before the query, float32 (H,).
        right: towards keys after it, float32 (H,).
    """

    left: torch.Tensor
    right: torch.Tensor


class AttentionBias(ABC):
    """A term for each head, query position and key position, added before the softmax.

    Attributes:
        num_heads: number of heads.
        rule: who may see whom where this bias is meant to be used; `prepare` takes it apart from
            the bias, so that each can be changed without the other.
        is_learned: whether gradients flow into the bias; such a bias is never cached.
        is_per_row: whether rows differ at the same positions; such a bias is never cached.
        is_relative: whether it depends on query position - key position alone.
    """

    num_heads: int
    rule: AttentionRule = CAUSAL
    is_learned: bool = False
    is_per_row: bool = False
    is_relative: bool = False

    def decay(self) -> Slopes | None:
        """Returns how steeply the term falls with distance; None if that is not known.

        At distance d it is at most the term at distance 0, minus d times the slope of that side.
        """
        return None

    def linear_slopes(self) -> Slopes | None:
        """Returns slopes if the term is exactly -slope * distance on each side, else None."""
        return None

    @abstractmethod
    def dense(
        self,
        query_positions: Positions,
        key_positions: Positions,
        *,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Returns the bias as a new tensor, (H, T, S) or (B, H, T, S), in float32.

        A term that is the same for all heads, or all queries, may have size 1 there.
        """

    @abstractmethod
    def heads(self, which: slice) -> AttentionBias:
        """Returns the bias of some of the heads, for a worker that computes only those."""

    def through(self, function: Callable[[torch.Tensor], torch.Tensor]) -> AttentionBias:
        """Returns the bias with `function` applied to every tensor that gradients flow into.

        Raises:
            NotImplementedError: the bias is learned and does not say what its tensors are.
        """
        if self.is_learned:
            raise NotImplementedError(
                f"{type(self).__name__} is learned, but has no through(), which workers that share "
                "the heads of a layer need"
            )
        return self


class ZeroBias(AttentionBias):
    """No bias: the method tells the order of tokens elsewhere, or not at all."""

    is_relative = True

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads

    def decay(self) -> Slopes:
        return self.linear_slopes()

    def linear_slopes(self) -> Slopes:
        flat = torch.zeros(self.num_heads, dtype=torch.float32, device="cpu")
        return Slopes(flat, flat)

    def dense(
        self,
        query_positions: Positions,
        key_positions: Positions,
        *,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        distance = signed_distance(query_positions, key_positions, device)
        return distance.zero_().unsqueeze(-3)  # (1, T, S) or (B, 1, T, S)

    def heads(self, which: slice) -> ZeroBias:
        return ZeroBias(len(range(*which.indices(self.num_heads))))


class LinearBias(AttentionBias):
    """A penalty in proportion to distance: -slope * |query position - key position|.

    Distance is relative, so that a term is as small as it can be where it matters: the absolute
    form slope * key position differs by a constant for each query, which softmax cancels, but is
    wrong in half precision beyond a few hundred positions.

    Args:
        slopes: one number for each head.
    """

    is_relative = True

    def __init__(self, slopes: Sequence[float] | torch.Tensor) -> None:
        self.slopes = torch.as_tensor(slopes, dtype=torch.float32, device="cpu")  # (H,)
        self.num_heads = len(self.slopes)

    def decay(self) -> Slopes:
        return self.linear_slopes()

    def linear_slopes(self) -> Slopes:
        return Slopes(self.slopes, self.slopes)

    def dense(
        self,
        query_positions: Positions,
        key_positions: Positions,
        *,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        distance = signed_distance(query_positions, key_positions, device).abs_()
        slopes = -self.slopes.to(distance.device).view(-1, 1, 1)
        return slopes * distance.unsqueeze(-3)  # (H, T, S) or (B, H, T, S)

    def heads(self, which: slice) -> LinearBias:
        return LinearBias(self.slopes[which])
