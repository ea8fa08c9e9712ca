"""ALiBi: attention with linear biases (Press, Smith, Lewis, ICLR 2022)."""

from __future__ import annotations

from fairseq.attention.bias import LinearBias
from fairseq.positions.alibi_slopes import alibi_slopes
from fairseq.positions.base import PositionMethod, Surroundings

__all__ = ["Alibi"]


class Alibi(PositionMethod):
    """Nothing is added to the embeddings; each head penalises distance by a slope of its own.

    The model has position embeddings all the same, since published checkpoints have their key.
    """

    name = "alibi"
    has_table = True

    def __init__(self, model: Surroundings) -> None:
        self._bias = LinearBias(alibi_slopes(model.num_heads))
