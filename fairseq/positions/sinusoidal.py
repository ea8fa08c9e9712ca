"""Sinusoidal position embeddings (Vaswani et al. 2017, section 3.5)."""

from __future__ import annotations

import math

import torch
from torch import nn

from fairseq.positions.added_table import AddedTable
from fairseq.positions.base import table_rows

__all__ = ["Sinusoidal", "SinusoidalPositionalEmbedding"]


class SinusoidalPositionalEmbedding(nn.Module):
    """A table of sines and cosines, computed for as many rows as are asked for.

    With half = D // 2 and f_k = 10000 ** (-k / (half - 1)), row p is sin(p f_0), ...,
    sin(p f_{half-1}), cos(p f_0), ..., cos(p f_{half-1}); an odd width ends with a zero. The
    padding row is zero.

    Args:
        embedding_dim: width D.
        padding_idx: id of the padding token, and its row.
        init_size: rows to compute at first.
    """

    def __init__(self, embedding_dim: int, padding_idx: int, init_size: int = 1024) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        self._num_rows = init_size
        self._table: torch.Tensor | None = None
        # Holds nothing; checkpoints have the key.
        self.register_buffer("_float_tensor", torch.zeros(1))

    @staticmethod
    def get_embedding(
        num_embeddings: int, embedding_dim: int, padding_idx: int | None = None
    ) -> torch.Tensor:
        """Returns the table, float32 (num_embeddings, embedding_dim), on the CPU."""
        half = embedding_dim // 2
        # In float32, since trained models have the rounding of these angles in their weights.
        step = -math.log(10000) / max(half - 1, 1)
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device="cpu") * step)
        rows = torch.arange(num_embeddings, dtype=torch.float32, device="cpu")
        angles = rows.unsqueeze(1) * frequencies.unsqueeze(0)  # (rows, half)
        table = torch.zeros(num_embeddings, embedding_dim, device="cpu")
        table[:, :half] = angles.sin()
        table[:, half : 2 * half] = angles.cos()
        if padding_idx is not None:
            table[padding_idx] = 0
        return table

    def lookup(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns float32 (B, T, D) for rows (B, T)."""
        needed = int(rows.max()) + 1 if rows.numel() else 0
        if self._table is None or needed > self._num_rows:
            self._num_rows = max(needed, self._num_rows)
            self._table = self.get_embedding(self._num_rows, self.embedding_dim, self.padding_idx)
        if self._table.device != rows.device:
            self._table = self._table.to(rows.device)
        return self._table[rows]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings of the positions of tokens (B, T), as (B, T, D)."""
        return self.lookup(table_rows(tokens, self.padding_idx))


class Sinusoidal(AddedTable):
    """Adds fixed sines and cosines; inputs of any length can be computed."""

    name = "sinusoidal"
    is_table_learned = False
