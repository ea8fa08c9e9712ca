"""Position methods that turn pairs of channels of queries and keys.

Shapes: `B` rows, `H` heads, `T` tokens, `K` channels of a head.
"""

from __future__ import annotations

import copy
from abc import abstractmethod

import torch

from fairseq.attention import Positions
from fairseq.attention.coordinates import position_tensor
from fairseq.positions.base import PositionMethod, Surroundings

__all__ = ["TurningMethod", "angles_of", "turn"]

Tables = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class TurningMethod(PositionMethod):
    """Turns pair k, channels k and k + K / 2, by an angle that grows with position.

    Sines and cosines are computed in the first layer of a forward pass and kept for the others.

    Raises:
        ValueError: the heads have an odd width, or `--rotary-base` is not positive.
    """

    def __init__(self, model: Surroundings) -> None:
        super().__init__(model)
        if model.head_dim % 2:
            raise ValueError(
                f"--position-method {self.name} turns pairs of channels, but a head has "
                f"{model.head_dim}; choose --decoder-embed-dim and --decoder-attention-heads so "
                "that the first divided by the second is even"
            )
        self._head_dim = model.head_dim
        self._base = model.settings.rotary_base
        if not 0 < self._base < float("inf"):
            raise ValueError(f"--rotary-base is {self._base:g}; it must be above 0")
        self._kept_for: tuple[Positions, int | None, torch.device] | None = None
        self._kept: Tables | None = None

    @abstractmethod
    def tables(
        self, positions: Positions, sequence_length: int | None, device: torch.device
    ) -> Tables:
        """Returns cosines and sines for queries, then for keys, times any growth.

        Each is float32, (T, K / 2) or (B, 1, T, K / 2).
        """

    def rotate(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        positions: Positions,
        sequence_length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tables = self._tables(positions, sequence_length, q.device)
        return turn(q, *tables[:2]), turn(k, *tables[2:])

    def _tables(
        self, positions: Positions, sequence_length: int | None, device: torch.device
    ) -> Tables:
        kept = self._kept_for
        is_current = (
            kept is not None
            and _are_same(kept[0], positions)
            and kept[1:] == (sequence_length, device)
        )
        if self._kept is None or not is_current:
            # Tensors made in inference mode could not take part in training later.
            with torch.inference_mode(False):
                self._kept = self.tables(positions, sequence_length, device)
            self._kept_for = (positions, sequence_length, device)
        return self._kept

    def __deepcopy__(self, memo: dict[int, object]) -> TurningMethod:
        """Copies no table: a copied model makes its own when it needs one."""
        duplicate = copy.copy(self)
        duplicate._kept_for = duplicate._kept = None
        return duplicate


def _are_same(first: Positions, second: Positions) -> bool:
    """Tells it without looking at data, so that a device need not be waited for."""
    are_ranges = isinstance(first, range) and isinstance(second, range)
    return bool(first == second) if are_ranges else first is second


def angles_of(positions: Positions, speeds: torch.Tensor) -> torch.Tensor:
    """Returns position * speed in float32, (T, K / 2) or (B, 1, T, K / 2), for speeds (K / 2,)."""
    angles = position_tensor(positions, speeds.device).unsqueeze(-1) * speeds
    return angles.unsqueeze(1) if angles.dim() == 3 else angles


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns pairs (k, k + K / 2) of channels of x (B, H, T, K); computed in float32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.to(x.dtype)
