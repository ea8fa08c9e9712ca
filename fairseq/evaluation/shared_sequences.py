"""Scoring sequences that several processes share.

Shapes: `B` rows, `T` columns of one process, `S` of the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fairseq.attention.coordinates import at_columns
from fairseq.model_parallel.sequence_batch import pad_columns
from fairseq.model_parallel.sequence_outputs import in_order
from fairseq.model_parallel.sequence_parallel import SequenceParallelContextManager
from fairseq.sequence_scorer import Scores, SequenceScorer, scores_of, target_log_probs

__all__ = ["SharedSequenceScorer"]


class SharedSequenceScorer(SequenceScorer):
    """Scores batches of which each process computes its columns; all get all scores.

    Args:
        *args: see `SequenceScorer`.
        sharing: open, for the models that score.
        **kwargs: see `SequenceScorer`.
    """

    def __init__(self, *args: Any, sharing: SequenceParallelContextManager, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sharing = sharing

    @torch.no_grad()
    def score(self, models: Sequence[Any], sample: dict[str, Any]) -> Scores:
        """See `SequenceScorer.score`; the batch is the same on every process of the group."""
        assert self.sharing.group is not None
        is_scored = self._scored_positions(sample)
        part = self.sharing.cut(sample)
        columns = part["net_input"]["columns"]
        padded = part["net_input"]["src_tokens"].size(1)
        is_own = at_columns(pad_columns(is_scored, padded, 0), columns)  # (B, T)
        results = []
        for model in models:
            model.eval()
            if getattr(getattr(model, "decoder", None), "sequence_length", None) is not None:
                # The decoder knows the longest window, of which a batch may fall short.
                part["net_input"].pop("sequence_length", None)
            values, _ = target_log_probs(model, part, is_own, self.softmax_batch)
            grid = values.new_zeros(is_own.shape).masked_scatter(is_own, values)
            whole = in_order(grid, self.sharing.group, self.sharing.layout)  # (B, S)
            results.append(whole[:, : is_scored.size(1)][is_scored])
        return scores_of(results, is_scored)
