"""Who may see whom: which keys a query may attend to, by head and position.

A rule holds numbers, not functions, so that a backend can read from it what its kernel needs.
Shapes: `B` rows, `H` heads, `T` queries, `S` keys.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fairseq.attention.coordinates import Positions, position_tensor, signed_distance

__all__ = [
    "BIDIRECTIONAL",
    "CAUSAL",
    "AttentionRule",
    "MaskRule",
    "PrefixRule",
    "SplitHeadsRule",
]


class AttentionRule(ABC):
    """Which keys a query may see. By every rule a query may see a key at its own position.

    Attributes:
        is_per_row: whether rows differ; what is made of such a rule is not kept.
        is_relative: whether it depends on query position - key position alone.
    """

    is_per_row: bool = False
    is_relative: bool = False

    @abstractmethod
    def is_allowed(
        self,
        query_positions: Positions,
        key_positions: Positions,
        *,
        device: torch.device | None = None,
    ) -> torch.Tensor | None:
        """Returns which keys are seen, as a new tensor; None if every key is.

        Returns:
            bool (H or 1, T, S) or (B, H or 1, T, S), True where seen.
        """

    def heads(self, which: slice) -> AttentionRule:
        """Returns the rule of some of the heads, for a worker that computes only those."""
        return self


@dataclass(frozen=True)
class MaskRule(AttentionRule):
    """The same for all heads and rows, by distance alone.

    Attributes:
        is_causal: only keys at its own position and before.
        window: only keys nearer than this many positions; 1 is its own position alone. None sees
            any distance.
    """

    is_causal: bool = True
    window: int | None = None
    is_relative = True

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}; a query must see at least 1 position")

    def is_allowed(
        self,
        query_positions: Positions,
        key_positions: Positions,
        *,
        device: torch.device | None = None,
    ) -> torch.Tensor | None:
        if not self.is_causal and self.window is None:
            return None
        query = position_tensor(query_positions, device).unsqueeze(-1)
        key = position_tensor(key_positions, device).unsqueeze(-2)
        if self.window is None:
            return (key <= query).unsqueeze(-3)
        distance = (query - key).unsqueeze(-3)
        if not self.is_causal:
            return distance.abs_() < self.window
        return (distance >= 0) & (distance < self.window)


CAUSAL = MaskRule()
BIDIRECTIONAL = MaskRule(is_causal=False)


@dataclass(frozen=True)
class SplitHeadsRule(AttentionRule):
    """Some heads see what is left of a query, the others what is right of it.

    Attributes:
        looks_left: for each head, whether it sees its own position and those before; otherwise it
            sees its own and those after.
    """

    looks_left: tuple[bool, ...]
    is_relative = True

    @staticmethod
    def halves(num_heads: int) -> SplitHeadsRule:
        """Returns the rule whose first half of the heads, or one more, looks left."""
        num_left = (num_heads + 1) // 2
        return SplitHeadsRule((True,) * num_left + (False,) * (num_heads - num_left))

    def is_allowed(
        self,
        query_positions: Positions,
        key_positions: Positions,
        *,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        distance = signed_distance(query_positions, key_positions, device).unsqueeze(-3)
        side = [1.0 if is_left else -1.0 for is_left in self.looks_left]
        return distance * torch.tensor(side, device=distance.device).view(-1, 1, 1) >= 0

    def heads(self, which: slice) -> SplitHeadsRule:
        return SplitHeadsRule(self.looks_left[which])


@dataclass(frozen=True, eq=False)
class PrefixRule(AttentionRule):
    """Both ways within a prefix, causal after it.

    A key is seen by every query if it is in the prefix, and by queries at its position and after
    in any case.

    Attributes:
        lengths: positions below this number are the prefix: one number, or int (B,), one for each
            row.
    """

    lengths: int | Sequence[int] | torch.Tensor

    @property
    def is_per_row(self) -> bool:  # type: ignore[override]
        """Whether each row has a prefix of its own."""
        return not isinstance(self.lengths, int)

    def is_allowed(
        self,
        query_positions: Positions,
        key_positions: Positions,
        *,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        query = position_tensor(query_positions, device).unsqueeze(-1)
        key = position_tensor(key_positions, device).unsqueeze(-2)
        if isinstance(self.lengths, int):
            is_in_prefix = key < self.lengths
        else:
            is_in_prefix = key < torch.as_tensor(self.lengths, device=key.device).view(-1, 1, 1)
        return (is_in_prefix | (key <= query)).unsqueeze(-3)
