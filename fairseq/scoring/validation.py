"""BLEU of a whole validation split, from counts of its batches, by sacrebleu."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fairseq.logging import metrics
from fairseq.scoring.base import load_sacrebleu

__all__ = ["add_counts", "log_bleu"]

_ORDER = 4
_LENGTHS = ("_bleu_sys_len", "_bleu_ref_len")
_MATCHES = tuple(f"_bleu_counts_{n}" for n in range(_ORDER))
_TOTALS = tuple(f"_bleu_totals_{n}" for n in range(_ORDER))


def add_counts(
    logging_output: dict[str, Any],
    outputs: Sequence[str],
    references: Sequence[str],
    *,
    is_tokenized: bool = False,
) -> None:
    """Adds to a batch's logging output what its BLEU is made of.

    Args:
        logging_output: changed in place.
        outputs: generated texts.
        references: one for each.
        is_tokenized: words are what spaces separate; otherwise sacrebleu splits the text.
    """
    tokenize = {"tokenize": "none"} if is_tokenized else {}
    metric = load_sacrebleu().metrics.BLEU(force=True, **tokenize)
    score = metric.corpus_score(list(outputs), [list(references)])
    numbers = (score.sys_len, score.ref_len, *score.counts, *score.totals)
    logging_output.update(zip((*_LENGTHS, *_MATCHES, *_TOTALS), numbers, strict=True))


def log_bleu(logging_outputs: Sequence[Mapping[str, Any]]) -> None:
    """Logs `bleu` for all batches together, if they were counted."""
    if not any(_LENGTHS[0] in log for log in logging_outputs):
        return
    for key in (*_LENGTHS, *_MATCHES, *_TOTALS):
        metrics.log_scalar(key, sum(log.get(key, 0) for log in logging_outputs))
    metrics.log_derived("bleu", _bleu)


def _bleu(meters: Any) -> float:
    sums = {key: int(meters[key].sum) for key in (*_LENGTHS, *_MATCHES, *_TOTALS)}
    score = load_sacrebleu().metrics.BLEU.compute_bleu(
        correct=[sums[key] for key in _MATCHES],
        total=[sums[key] for key in _TOTALS],
        sys_len=sums[_LENGTHS[0]],
        ref_len=sums[_LENGTHS[1]],
        smooth_method="exp",
    )
    return round(float(score.score), 2)
