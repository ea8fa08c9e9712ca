"""Scoring batches that do not fit into memory, half by half."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from fairseq import utils
from fairseq.sequence_scorer import Scores, SequenceScorer

__all__ = ["is_out_of_memory", "rows_of", "score_in_parts"]

logger = logging.getLogger(__name__)


def score_in_parts(
    scorer: SequenceScorer, models: Sequence[torch.nn.Module], sample: dict[str, Any]
) -> Scores:
    """Scores a batch; one that needs too much memory is cut in two, and so on.

    Args:
        scorer: scores what fits.
        models: see `SequenceScorer.score`.
        sample: a batch.

    Raises:
        RuntimeError: the memory does not suffice for one row.
    """
    num_rows = len(sample["target"])
    try:
        return scorer.score(models, sample)
    except RuntimeError as error:
        if not is_out_of_memory(error) or num_rows < 2:
            raise
    # Outside of the handler, whose exception holds on to what the failed pass had computed.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = num_rows // 2
    logger.warning(
        f"out of memory with {num_rows} rows in a batch; going on with {half} at a time (a smaller "
        "--max-tokens or --batch-size avoids the first try)"
    )
    parts = [
        score_in_parts(scorer, models, rows_of(sample, rows))
        for rows in (slice(0, half), slice(half, num_rows))
    ]
    has_attention = all(part.attention is not None for part in parts)
    return Scores(
        torch.cat([part.values for part in parts]),
        torch.cat([part.is_scored for part in parts]),
        torch.cat([part.attention for part in parts]) if has_attention else None,  # type: ignore[misc]
    )


def rows_of(sample: dict[str, Any], rows: slice) -> dict[str, Any]:
    """Returns some rows of a batch; what is counted for the batch as a whole stays as it is."""
    num_rows = len(sample["target"])

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[rows] if tensor.dim() and len(tensor) == num_rows else tensor

    part: dict[str, Any] = utils.apply_to_sample(cut, sample)
    if sample.get("start_indices") is not None:
        part["start_indices"] = sample["start_indices"][rows]
    return part


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tells whether a GPU or the host had not enough memory."""
    text = str(error)
    is_host = "DefaultCPUAllocator" in text or "can't allocate memory" in text
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or is_host
