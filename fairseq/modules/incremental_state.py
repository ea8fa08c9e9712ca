"""What modules remember between the steps of incremental decoding.

The memory is one dictionary that the caller owns; each module keeps its part under a key of its
own, so that several decoders can share a dictionary and one decoder can have several.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import nn

__all__ = ["IncrementalState", "StatefulModule"]

IncrementalState = dict[str, dict[str, torch.Tensor | None]]

_serial_numbers = itertools.count()


class StatefulModule(nn.Module):
    """A module with a part in the incremental state."""

    def __init__(self) -> None:
        super().__init__()
        self._serial_number = next(_serial_numbers)

    def _state_key(self, name: str) -> str:
        return f"{type(self).__name__}-{self._serial_number}.{name}"

    def get_incremental_state(
        self, incremental_state: IncrementalState | None, name: str
    ) -> dict[str, torch.Tensor | None] | None:
        """Returns what this module stored under `name`, None if nothing."""
        if incremental_state is None:
            return None
        return incremental_state.get(self._state_key(name))

    def set_incremental_state(
        self,
        incremental_state: IncrementalState,
        name: str,
        value: dict[str, torch.Tensor | None],
    ) -> IncrementalState:
        """Stores tensors under `name`."""
        incremental_state[self._state_key(name)] = value
        return incremental_state

    def reorder_incremental_state(
        self, incremental_state: IncrementalState, new_order: torch.Tensor
    ) -> None:
        """Selects and reorders rows of every tensor this module stored, as beam search does.

        What has a method `reorder` of its own is told to do it.

        Args:
            incremental_state: changed in place.
            new_order: int64 (new B,), for each new row the old one it continues.
        """
        prefix = self._state_key("")
        for key, stored in incremental_state.items():
            if key.startswith(prefix):
                if hasattr(stored, "reorder"):
                    stored.reorder(new_order)
                else:
                    incremental_state[key] = {n: _select(t, new_order) for n, t in stored.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> StatefulModule:
        """Copies with a new key, or the copy would write over the memory of the original."""
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        duplicate.__dict__.update(copy.deepcopy(self.__dict__, memo))
        duplicate._serial_number = next(_serial_numbers)
        return duplicate


def _select(tensor: torch.Tensor | None, new_order: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor.index_select(0, new_order)
