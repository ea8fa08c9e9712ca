"""Position methods that add a vector of a table to each token's embedding."""

from __future__ import annotations

import torch

from fairseq.attention import Positions
from fairseq.attention.coordinates import at_columns
from fairseq.positions.base import PositionMethod, Surroundings, table_rows

__all__ = ["AddedTable"]


class AddedTable(PositionMethod):
    """Adds row number n of the model's position table to the n-th token of a row.

    Raises:
        ValueError: the model was built without position embeddings.
    """

    has_table = True
    uses_table = True

    def __init__(self, model: Surroundings) -> None:
        super().__init__(model)
        if model.table is None:
            raise ValueError(
                f"--position-method {self.name} needs position embeddings; leave out "
                "--no-token-positional-embeddings, or use --position-method none"
            )
        self._table = model.table
        self._padding_idx = model.padding_idx

    def embed(
        self,
        x: torch.Tensor,
        tokens: torch.Tensor,
        documents: torch.Tensor | None = None,
        columns: Positions | None = None,
    ) -> torch.Tensor:
        num_tokens = tokens.size(1)
        columns = range(num_tokens - x.size(1), num_tokens) if columns is None else columns
        rows = at_columns(table_rows(tokens, self._padding_idx, documents), columns)  # (B, T)
        return x + self._table.lookup(rows).to(x.dtype)
