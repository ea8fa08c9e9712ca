"""Where queries and keys stand: the one place that attention under ALiBi asks.

A caller that knows better than the model, because it holds a part of a sequence only, or because
its tokens are not consecutive, says so with `position_context`. Otherwise positions come from
`position_ids`, and with a cache from where the mask ends for each query; never from lengths.

Shapes: `B` rows, `T` queries, `S` keys.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from fairseq.attention import Positions

__all__ = [
    "GivenPositions",
    "find_positions",
    "given_positions",
    "last_visible_key",
    "position_context",
]


@dataclass(frozen=True)
class GivenPositions:
    """Positions that a caller has set; see `position_context`."""

    query: Positions
    key: Positions
    key_is_padding: torch.Tensor | None = None


_local = threading.local()


@contextmanager
def position_context(
    query_positions: Positions,
    key_positions: Positions,
    *,
    key_is_padding: torch.Tensor | None = None,
) -> Iterator[None]:
    """Sets where the queries and keys of every self-attention inside it stand.

    It holds for this thread. Who may see whom then goes by these positions too, and no mask of
    transformers is used; a backward pass with gradient checkpointing must run inside it, since it
    computes attention again.

    Args:
        query_positions: of the tokens that the model is given: a range, or a tensor (T,) or (B, T).
        key_positions: of the keys that attention sees, (S,) or (B, S).
        key_is_padding: keys that no query may see, (B, S).
    """
    before = given_positions()
    _local.given = GivenPositions(query_positions, key_positions, key_is_padding)
    try:
        yield
    finally:
        _local.given = before


def given_positions() -> GivenPositions | None:
    """Returns what the innermost `position_context` of this thread has set."""
    return getattr(_local, "given", None)


def find_positions(
    num_queries: int,
    num_keys: int,
    *,
    is_allowed: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    query_offset: int | torch.Tensor | None = None,
) -> tuple[Positions, Positions]:
    """Returns where queries and keys stand.

    Args:
        num_queries: T.
        num_keys: S.
        is_allowed: who may see whom, causally, (B, 1, T, S). Used with a cache: the last key that
            a query may see is its own.
        position_ids: as the model was given them, (1 or B, T). Without a cache, those of the keys.
        query_offset: which key is that of the first query, where it is known.

    Returns:
        Two ranges, or tensors (T,) and (S,), or (B, T) and (B, S).

    Raises:
        ValueError: queries are some of the keys, and nothing says which.
    """
    given = given_positions()
    if given is not None:
        return given.query, given.key
    if num_queries == num_keys:
        if position_ids is None or position_ids.dim() != 2 or position_ids.size(1) != num_keys:
            return range(num_keys), range(num_keys)
        ids = position_ids[0] if position_ids.size(0) == 1 else position_ids
        return ids, ids
    keys = range(num_keys)
    if query_offset is not None:
        device = query_offset.device if isinstance(query_offset, torch.Tensor) else None
        return torch.arange(num_queries, device=device) + query_offset, keys
    if is_allowed is not None:
        return last_visible_key(is_allowed), keys
    if num_queries == 1:  # One step of decoding, in which every key may be seen.
        return range(num_keys - 1, num_keys), keys
    raise ValueError(
        f"{num_queries} queries and {num_keys} keys, and no mask says which keys are the queries' "
        "own; set fairseq.huggingface.positions.position_context"
    )


def last_visible_key(is_allowed: torch.Tensor) -> torch.Tensor:
    """Returns the column of the last key that each query may see, (B, T)."""
    columns = torch.arange(is_allowed.size(-1), device=is_allowed.device)
    return (is_allowed[:, 0] * columns).amax(-1)
