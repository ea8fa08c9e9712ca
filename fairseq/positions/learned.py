"""Position embeddings that are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fairseq.positions.added_table import AddedTable
from fairseq.positions.base import table_rows

__all__ = ["Learned", "LearnedPositionalEmbedding"]


class LearnedPositionalEmbedding(nn.Embedding):
    """A trained vector for each position, up to a largest one.

    Args:
        num_embeddings: rows; the first position has row `padding_idx` + 1.
        embedding_dim: width D.
        padding_idx: id of the padding token, and its row, which stays zero.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)

    @property
    def max_positions(self) -> int:
        """The longest row of tokens that has an embedding for each."""
        assert self.padding_idx is not None
        return int(self.weight.size(0)) - self.padding_idx - 1

    def lookup(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns (B, T, D) for rows (B, T).

        Raises:
            ValueError: a row is beyond the table.
        """
        last = int(rows.max()) if rows.numel() else 0
        if last >= self.weight.size(0):
            assert self.padding_idx is not None
            raise ValueError(
                f"an input has {last - self.padding_idx} tokens, but learned position embeddings "
                f"exist for {self.max_positions} (--max-target-positions in training); use a "
                "smaller --tokens-per-sample, or a model with --position-method alibi, which reads "
                "any length"
            )
        return F.embedding(rows, self.weight, self.padding_idx)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings of the positions of tokens (B, T), as (B, T, D)."""
        assert self.padding_idx is not None
        return self.lookup(table_rows(tokens, self.padding_idx))


class Learned(AddedTable):
    """Adds trained vectors; inputs are at most as long as the table."""

    name = "learned"
    is_table_learned = True
