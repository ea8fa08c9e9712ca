"""Biases that place queries and keys anew before another bias is taken.

Shapes: `B` rows, `H` heads, `T` queries, `S` keys, `N` positions whose chunk is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fairseq.attention.bias import AttentionBias, Positions, position_tensor
from fairseq.attention.rules import BIDIRECTIONAL

__all__ = ["ChunkBias", "CrossBias"]


class ChunkBias(AttentionBias):
    """Positions restart at every chunk, as for the three pieces of filling in the middle.

    With i' the position of i counted from the start of its chunk, the term is bias(i', j'). For
    keys of another chunk than the query's it can be a constant instead.

    Args:
        bias: any bias; its rule stays, and goes by positions in the whole row.
        chunks: number of the chunk of each position, int (N,) or (B, N); a chunk is a run of equal
            numbers, and the last one goes on beyond N.
        across: what is added for keys of another chunk; None is the bias of restarted positions.
    """

    def __init__(
        self, bias: AttentionBias, chunks: torch.Tensor, *, across: float | None = None
    ) -> None:
        self.bias = bias
        self.starts = _starts_of_runs(chunks)  # (N,) or (B, N)
        self.across = across
        self.num_heads = bias.num_heads
        self.rule = bias.rule
        self.is_learned = bias.is_learned
        self.is_per_row = bias.is_per_row or chunks.dim() == 2

    @classmethod
    def of_lengths(
        cls, bias: AttentionBias, lengths: Sequence[int], *, across: float | None = None
    ) -> ChunkBias:
        """Returns the bias for chunks of these lengths, the same in all rows."""
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.as_tensor(lengths))
        return cls(bias, numbers, across=across)

    def dense(
        self,
        query_positions: Positions,
        key_positions: Positions,
        *,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        query = position_tensor(query_positions, device)
        key = position_tensor(key_positions, device)
        query_starts, key_starts = self._starts_at(query), self._starts_at(key)
        term = self.bias.dense(query - query_starts, key - key_starts, device=device)
        if self.across is None:
            return term
        is_other = query_starts.unsqueeze(-1) != key_starts.unsqueeze(-2)
        return term.masked_fill(is_other.unsqueeze(-3), self.across)

    def _starts_at(self, positions: torch.Tensor) -> torch.Tensor:
        """Returns where the chunk of each position starts, (T,) or (B, T)."""
        starts = self.starts.to(positions.device)
        index = positions.long().clamp_(0, starts.size(-1) - 1)
        if starts.dim() == 1:
            return starts[index]
        return starts.gather(1, index.expand(len(starts), -1))

    def heads(self, which: slice) -> ChunkBias:
        return ChunkBias(self.bias.heads(which), self.starts, across=self.across)

    def through(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ChunkBias:
        return ChunkBias(self.bias.through(function), self.starts, across=self.across)


class CrossBias(AttentionBias):
    """Queries of another sequence than the keys: query i stands at offset + scale * i.

    The term is bias(offset + scale * i, j), and every key may be seen.

    Args:
        bias: any bias, for encoder and decoder usually a `SymmetricBias`.
        offset: where query 0 stands among the keys: a number, or (B,), one for each row.
        scale: how many keys a query stands for: a number, or (B,).
    """

    rule = BIDIRECTIONAL

    def __init__(
        self,
        bias: AttentionBias,
        offset: float | torch.Tensor = 0.0,
        scale: float | torch.Tensor = 1.0,
    ) -> None:
        self.bias = bias
        self.offset = offset
        self.scale = scale
        self.num_heads = bias.num_heads
        self.is_learned = bias.is_learned
        self.is_per_row = bias.is_per_row or any(
            isinstance(number, torch.Tensor) and number.dim() > 0 for number in (offset, scale)
        )

    @classmethod
    def stretched(
        cls,
        bias: AttentionBias,
        num_queries: int | torch.Tensor,
        num_keys: int | torch.Tensor,
    ) -> CrossBias:
        """Returns the bias whose queries are spread evenly over the keys.

        Each query stands at the middle of the S / T keys that fall to it: scale = S / T,
        offset = (scale - 1) / 2.

        Args:
            bias: any bias.
            num_queries: T, or (B,) if rows differ.
            num_keys: S, or (B,) if rows differ, without padding.
        """
        scale = num_keys / num_queries
        return cls(bias, (scale - 1) / 2, scale)

    def dense(
        self,
        query_positions: Positions,
        key_positions: Positions,
        *,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        query = position_tensor(query_positions, device)
        offset, scale = (
            number.to(query.device).view(-1, 1) if isinstance(number, torch.Tensor) else number
            for number in (self.offset, self.scale)
        )
        return self.bias.dense(offset + scale * query, key_positions, device=device)

    def heads(self, which: slice) -> CrossBias:
        return CrossBias(self.bias.heads(which), self.offset, self.scale)

    def through(self, function: Callable[[torch.Tensor], torch.Tensor]) -> CrossBias:
        return CrossBias(self.bias.through(function), self.offset, self.scale)


def _starts_of_runs(chunks: torch.Tensor) -> torch.Tensor:
    """Returns for each position the first position of its run of equal numbers."""
    index = torch.arange(chunks.size(-1), device=chunks.device).expand_as(chunks)
    is_first = torch.ones_like(chunks, dtype=torch.bool)
    is_first[..., 1:] = chunks[..., 1:] != chunks[..., :-1]
    return index.where(is_first, 0).cummax(-1).values
