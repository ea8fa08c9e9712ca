"""What a model knows about the order of its tokens.

Shapes: `B` rows, `T` new tokens, `S` tokens so far (S = T but in incremental decoding), `D` width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from fairseq.attention.bias import AttentionBias, Positions, ZeroBias

__all__ = ["PositionMethod", "PositionTable", "Surroundings", "table_rows"]


class PositionTable(Protocol):
    """A vector for each position, with the rows numbered as `table_rows` says."""

    def lookup(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the vectors of rows (B, T), as (B, T, D)."""


@dataclass(frozen=True)
class Surroundings:
    """What a method may want to know of the model it serves.

    Attributes:
        num_heads: attention heads of a layer.
        padding_idx: id of the padding token.
        table: position embeddings of the model, if it has any.
    """

    num_heads: int
    padding_idx: int
    table: PositionTable | None = None


class PositionMethod:
    """How a model tells the order of its tokens; a method overrides one hook of three.

    A method with weights derives from `torch.nn.Module` too; the decoder then registers it.

    Attributes:
        name: as in `--position-method`.
        has_table: whether the model has position embeddings, and checkpoints their key.
        uses_table: whether they are read.
        is_table_learned: whether they are trained; None is as `--decoder-learned-pos` says.
    """

    name: str
    has_table: bool = False
    uses_table: bool = False
    is_table_learned: bool | None = None

    def __init__(self, model: Surroundings) -> None:
        self._bias: AttentionBias = ZeroBias(model.num_heads)

    def embed(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Adds to the token embeddings.

        Args:
            x: embeddings of the last T tokens, (B, T, D).
            tokens: ids of all tokens so far, (B, S).
        """
        return x

    def rotate(
        self, q: torch.Tensor, k: torch.Tensor, positions: Positions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns the queries and keys of new tokens, (B, H, T, K) each, at T positions.

        Keys are turned before they are cached, hence once.
        """
        return q, k

    def bias(self) -> AttentionBias:
        """Returns what is added to attention scores, the same object each time if it is fixed."""
        return self._bias


def table_rows(tokens: torch.Tensor, padding_idx: int) -> torch.Tensor:
    """Numbers tokens as rows of a position table.

    The first token of a row that is no padding has number padding_idx + 1, the next one more;
    padding does not count and has number padding_idx.

    Args:
        tokens: ids, (B, S).

    Returns:
        int64 (B, S).
    """
    is_token = tokens.ne(padding_idx)
    return is_token.cumsum(dim=1) * is_token + padding_idx
