"""Makes the position table that a model's settings ask for."""

from __future__ import annotations

from torch import nn

from fairseq.positions import LearnedPositionalEmbedding, SinusoidalPositionalEmbedding

__all__ = ["PositionalEmbedding"]


def PositionalEmbedding(
    num_embeddings: int, embedding_dim: int, padding_idx: int, learned: bool = False
) -> LearnedPositionalEmbedding | SinusoidalPositionalEmbedding:
    """Makes a table for the positions of at most `num_embeddings` tokens.

    The rows up to `padding_idx` come on top, since the first position has the row after it.

    Args:
        num_embeddings: positions; a sinusoidal table grows beyond them by itself.
        embedding_dim: width D.
        padding_idx: id of the padding token.
        learned: trained vectors, drawn from N(0, 1 / D), instead of sines and cosines.
    """
    rows = num_embeddings + padding_idx + 1
    if not learned:
        return SinusoidalPositionalEmbedding(embedding_dim, padding_idx, rows)
    table = LearnedPositionalEmbedding(rows, embedding_dim, padding_idx)
    nn.init.normal_(table.weight, mean=0, std=embedding_dim**-0.5)
    nn.init.zeros_(table.weight[padding_idx])
    return table
