"""No position method: order is known from the causal mask alone."""

from __future__ import annotations

from fairseq.positions.base import PositionMethod

__all__ = ["NoPositions"]


class NoPositions(PositionMethod):
    """Neither embeddings nor biases tell the order of tokens."""

    name = "none"
