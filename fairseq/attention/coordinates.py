"""Where queries and keys stand.

Shapes: `B` rows, `T` positions.
"""

from __future__ import annotations

from typing import overload

import torch

__all__ = ["Positions", "at_columns", "position_tensor", "signed_distance"]

Positions = torch.Tensor | range
"""Positions of queries or keys: a `range`, or a tensor (T,) or (B, T). A range says, without
looking at data, that the positions are evenly spaced and shared by all rows."""


def position_tensor(positions: Positions, device: torch.device | None = None) -> torch.Tensor:
    """Returns positions as a tensor of float32, in which whole numbers are exact up to 2**24."""
    if isinstance(positions, range):
        start, stop, step = positions.start, positions.stop, positions.step
        return torch.arange(start, stop, step, dtype=torch.float32, device=device)
    return positions.to(device=device, dtype=torch.float32)


def signed_distance(
    query_positions: Positions, key_positions: Positions, device: torch.device | None = None
) -> torch.Tensor:
    """Returns query position - key position as a new tensor, float32 (T, S) or (B, T, S).

    It is positive for keys on the left, that is before the query.
    """
    query = position_tensor(query_positions, device)
    key = position_tensor(key_positions, device)
    return query.unsqueeze(-1) - key.unsqueeze(-2)


@overload
def at_columns(x: torch.Tensor, columns: Positions) -> torch.Tensor: ...
@overload
def at_columns(x: Positions, columns: Positions) -> Positions: ...


def at_columns(x: Positions, columns: Positions) -> Positions:
    """Returns the entries at some columns: of positions, or of the last axis of a tensor.

    Args:
        x: (S,) or (B, S).
        columns: which of the S, (T,); a range of steps of one gives a view.
    """
    if isinstance(columns, range):
        start, stop = columns.start, columns.stop
        return x[start:stop] if isinstance(x, range) else x[..., start:stop]
    if isinstance(x, range):
        return x.start + x.step * columns
    return x.index_select(-1, columns.to(x.device))
