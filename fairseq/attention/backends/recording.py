"""Attention that shows its weights to an observer; for diagnosis, not for speed.

Shapes: `B` rows, `H` heads, `T` queries, `N` queries of a block, `S` keys, `K` head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fairseq.attention.backends.base import AttentionBackend, Prepared
from fairseq.attention.backends.reference import ReferenceBackend
from fairseq.attention.backends.request import Request
from fairseq.attention.bias import AttentionBias, Positions

__all__ = ["Observation", "Observer", "RecordingBackend"]


@dataclass(frozen=True)
class Observation:
    """A block of queries of one layer, as it is computed.

    Attributes:
        layer: which call of `attend` this is since `prepare`, from 0.
        first_query: column of the block's first query among the T queries.
        q: queries of the block, (B, H, N, K).
        k: all keys, (B, H, S, K).
        scores: what the softmax is taken of, (B, H, N, S); -inf where a key is not seen.
        weights: their softmax in float32, (B, H, N, S); meaningless for queries left out.
        is_left_out: bool (B, 1, N, 1), queries that are padding or may see no key; None where there
            are none.
        query_positions: positions of the block's queries.
        key_positions: positions of the keys.
        key_is_padding: bool (B, S), None where no key is padding.
        scale: factor of the products of queries and keys.
        bias: what was added to the products, as it was handed to `prepare`.
    """

    layer: int
    first_query: int
    q: torch.Tensor
    k: torch.Tensor
    scores: torch.Tensor
    weights: torch.Tensor
    is_left_out: torch.Tensor | None
    query_positions: Positions
    key_positions: Positions
    key_is_padding: torch.Tensor | None
    scale: float
    bias: AttentionBias


Observer = Callable[[Observation], None]


@dataclass(kw_only=True)
class _Recipe(Prepared):
    """What `prepare` was given; each block of queries is prepared when its turn comes."""

    request: Request


class RecordingBackend(AttentionBackend):
    """The reference form, block of queries by block, so that no L x L tensor is ever held.

    Args:
        observe: called for each block of each layer, in order. None only computes.
        most_scores: largest number of scores of a block (rows x heads x queries x keys).
    """

    name = "recording"

    def __init__(self, observe: Observer | None = None, *, most_scores: int = 1 << 23) -> None:
        self._observe = observe
        self._most_scores = most_scores
        self._reference = ReferenceBackend()
        self._layer = 0

    def prepare_request(self, request: Request) -> Prepared:
        self._layer = 0
        return _Recipe(self, key_is_padding=request.key_is_padding, request=request)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        prepared: Prepared,
        *,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> torch.Tensor:
        assert isinstance(prepared, _Recipe)
        if dropout_p > 0:
            raise ValueError("weights are recorded in evaluation, without dropout; call eval()")
        num_rows, num_heads, num_queries, width = q.shape
        scale = width**-0.5 if scale is None else scale
        size = max(1, self._most_scores // (num_rows * num_heads * k.size(2)))
        blocks = [
            self._attend_block(q, k, v, prepared, scale, slice(first, first + size))
            for first in range(0, num_queries, size)
        ]
        self._layer += 1
        return torch.cat(blocks, dim=2)

    def _attend_block(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        recipe: _Recipe,
        scale: float,
        block: slice,
    ) -> torch.Tensor:
        num_queries = q.size(2)
        q = q[:, :, block]  # (B, H, N, K)
        request = recipe.request.of_queries(block)
        dense = self._reference.prepare_request(request)
        if self._observe is not None:
            scores = self._reference.scores(q, k, dense, scale=scale)
            observed = Observation(
                layer=self._layer,
                first_query=block.start,
                q=q,
                k=k,
                scores=scores,
                weights=torch.softmax(scores, dim=-1, dtype=torch.float32),
                is_left_out=_left_out(recipe.key_is_padding, dense.is_blind, num_queries, block),
                query_positions=request.query_positions,
                key_positions=request.key_positions,
                key_is_padding=recipe.key_is_padding,
                scale=scale,
                bias=request.bias,
            )
            self._observe(observed)
        return self._reference.attend(q, k, v, dense, scale=scale)


def _left_out(
    key_is_padding: torch.Tensor | None,
    is_blind: torch.Tensor | None,
    num_queries: int,
    block: slice,
) -> torch.Tensor | None:
    """Returns the queries of a block that are padding, or may see no key, as bool (B, 1, N, 1)."""
    if key_is_padding is None:
        return is_blind
    is_padding = key_is_padding[:, -num_queries:][:, None, block, None]  # the last T keys are new
    return is_padding if is_blind is None else is_padding | is_blind
