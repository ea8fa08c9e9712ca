"""What a model knows about the order of its tokens.

Shapes: `B` rows, `T` new tokens, `S` tokens so far (S = T but in incremental decoding), `D` width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from fairseq.attention import AttentionBias, Positions, ZeroBias
from fairseq.positions.settings import PositionConfig

__all__ = ["PositionMethod", "PositionTable", "Surroundings", "WeightedMethod", "table_rows"]


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
        head_dim: channels of a head.
        settings: what the user chose.
        train_length: tokens of a sequence in training, if known.
    """

    num_heads: int
    padding_idx: int
    table: PositionTable | None = None
    head_dim: int = 64
    settings: PositionConfig = field(default_factory=PositionConfig)
    train_length: int | None = None


class PositionMethod:
    """How a model tells the order of its tokens; a method overrides one hook of three.

    A method with weights is a `WeightedMethod`; the decoder then registers it.

    A `sequence_length` is the length that a sequence has at its end, the same number in every call
    for it. Methods that adapt to lengths beyond those in training look at it; None is no longer.

    Attributes:
        name: as in `--position-method`.
        settings: fields of `PositionConfig` that it reads.
        has_table: whether the model has position embeddings, and checkpoints their key.
        uses_table: whether they are read.
        is_table_learned: whether they are trained; None is as `--decoder-learned-pos` says.
        is_relative: whether only distances count, so that padding on the left does not matter.
            Otherwise positions must be counted without padding.
        depends_on_length: whether it looks at `sequence_length`.
    """

    name: str
    settings: tuple[str, ...] = ()
    has_table: bool = False
    uses_table: bool = False
    is_table_learned: bool | None = None
    is_relative: bool = True
    depends_on_length: bool = False

    def __init__(self, model: Surroundings) -> None:
        self._bias: AttentionBias = ZeroBias(model.num_heads)

    def embed(
        self,
        x: torch.Tensor,
        tokens: torch.Tensor,
        documents: torch.Tensor | None = None,
        columns: Positions | None = None,
    ) -> torch.Tensor:
        """Adds to the token embeddings.

        Args:
            x: embeddings of T tokens, (B, T, D).
            tokens: ids of all tokens so far, (B, S).
            documents: numbers of the documents at whose starts positions restart, (B, S).
            columns: the columns of those T among the S; None is the last ones.
        """
        return x

    def rotate(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        positions: Positions,
        sequence_length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turns the queries and keys of new tokens, (B, H, T, K) each, at T positions.

        Keys are turned before they are cached, hence once.
        """
        return q, k

    def bias(self, sequence_length: int | None = None) -> AttentionBias:
        """Returns what is added to attention scores; a fixed one is the same object each time.

        One that is learned is asked for in every forward pass, since it holds the pass's gradients.
        """
        return self._bias


class WeightedMethod(PositionMethod, nn.Module):
    """A method with parameters; in a state dict their names start with `decoder.positions.`.

    Parameters have at least one dimension, since sharding needs one. Formulas take them in float32,
    whatever their dtype.
    """

    def __init__(self, model: Surroundings) -> None:
        nn.Module.__init__(self)
        PositionMethod.__init__(self, model)


def table_rows(
    tokens: torch.Tensor, padding_idx: int, documents: torch.Tensor | None = None
) -> torch.Tensor:
    """Numbers tokens as rows of a position table.

    The first token of a row that is no padding has number padding_idx + 1, the next one more;
    padding does not count and has number padding_idx.

    Args:
        tokens: ids, (B, S).
        padding_idx: id of padding.
        documents: numbers of documents in rising order, (B, S); counting restarts at each.

    Returns:
        int64 (B, S).
    """
    is_token = tokens.ne(padding_idx)
    count = is_token.cumsum(dim=1)
    if documents is not None:
        is_first = documents.diff(dim=1, prepend=documents[:, :1]).ne(0)
        earlier = (count - is_token.long()).where(is_first, 0)
        count = count - earlier.cummax(dim=1).values
    return count * is_token + padding_idx
