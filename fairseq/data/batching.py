"""Cutting an order of items into batches of bounded size."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence

import numpy as np

__all__ = ["batch_by_size"]


def batch_by_size(
    indices: Iterable[int] | np.ndarray,
    num_tokens_fn: Callable[[int], int] | None = None,
    num_tokens_vec: Sequence[int] | np.ndarray | None = None,
    max_tokens: int | None = None,
    max_sentences: int | None = None,
    required_batch_size_multiple: int = 1,
    *,
    allow_oversized: bool = False,
) -> list[np.ndarray]:
    """Cuts an order of items into consecutive batches.

    A batch holds at most `max_sentences` rows, and rows times its longest row is at most
    `max_tokens`. It has fewer rows than the multiple or a whole multiple of rows, except where
    an order ends or the lengths leave no such cut. Linear in the number of items.

    Args:
        indices: items in the order in which they are batched.
        num_tokens_fn: item -> length in tokens, where no `num_tokens_vec` is given.
        num_tokens_vec: length in tokens of each element of `indices`.
        max_tokens: None for no limit.
        max_sentences: None for no limit.
        required_batch_size_multiple: at least 1.
        allow_oversized: an item longer than `max_tokens` becomes a batch of its own, instead of
            an error.

    Returns:
        The batches, as slices of `indices`.

    Raises:
        ValueError: a limit below 1, or an item longer than `max_tokens`.
    """
    order = np.asarray(
        indices if isinstance(indices, np.ndarray) else list(indices), dtype=np.int64
    )
    lengths = _lengths(order, num_tokens_fn, num_tokens_vec)
    _check_at_least_one("--max-tokens", max_tokens)
    _check_at_least_one("--batch-size", max_sentences)
    _check_at_least_one("--required-batch-size-multiple", required_batch_size_multiple)
    token_limit = sys.maxsize if max_tokens is None else int(max_tokens)
    row_limit = sys.maxsize if max_sentences is None else int(max_sentences)

    oversized = np.flatnonzero(lengths > token_limit)
    if len(oversized) and not allow_oversized:
        where = int(oversized[0])
        raise ValueError(
            f"Sentences lengths should not exceed max_tokens={max_tokens}: item "
            f"{int(order[where])} has {int(lengths[where])} tokens; raise --max-tokens (or "
            "--max-tokens-valid) or shorten the items (--tokens-per-sample, --shorten-method)"
        )
    ends: list[int] = []
    begin = 0
    for alone in [*oversized.tolist(), len(order)]:
        run = lengths[begin:alone]
        cuts = _batch_ends(run, token_limit, row_limit, required_batch_size_multiple)
        ends.extend(begin + cut for cut in cuts)
        if alone < len(order):
            ends.append(alone + 1)
        begin = alone + 1
    return [order[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def _lengths(
    order: np.ndarray,
    num_tokens_fn: Callable[[int], int] | None,
    num_tokens_vec: Sequence[int] | np.ndarray | None,
) -> np.ndarray:
    if num_tokens_vec is not None:
        lengths = np.ascontiguousarray(num_tokens_vec, dtype=np.int64)
    elif num_tokens_fn is not None:
        lengths = np.fromiter((num_tokens_fn(i) for i in order), np.int64, len(order))
    else:
        raise TypeError("batch_by_size needs num_tokens_fn or num_tokens_vec")
    if len(lengths) != len(order):
        raise ValueError(f"{len(order)} indices but {len(lengths)} lengths")
    return lengths


def _check_at_least_one(flag: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{flag} is {value}; it must be at least 1")


def _batch_ends(lengths: np.ndarray, token_limit: int, row_limit: int, multiple: int) -> list[int]:
    """Returns where each batch ends.

    The open batch is `[start, committed)`; the items after it are a tail that waits until it
    completes the multiple. When the next item does not fit, the open batch is closed and the
    tail opens the next one.
    """
    ends: list[int] = []
    start = committed = 0
    batch_longest = tail_longest = 0
    stop = 0
    for length in lengths.data:
        stop += 1
        if length > tail_longest:
            tail_longest = length
        longest = batch_longest if batch_longest > tail_longest else tail_longest
        rows = stop - start
        if rows > row_limit or rows * longest > token_limit:
            ends.append(committed)
            if (stop - committed) * tail_longest > token_limit:
                ends.append(stop - 1)
                tail_longest = length
            start = ends[-1]
            longest = tail_longest
        elif rows >= multiple and rows % multiple:
            continue
        committed = stop
        batch_longest = longest
        tail_longest = 0
    if committed > start:
        ends.append(committed)
    if stop > committed:
        ends.append(stop)
    return ends
