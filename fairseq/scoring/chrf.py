"""chrF: n-grams of characters (Popovic 2015)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.registry import SCORERS
from fairseq.scoring.base import BaseScorer, load_sacrebleu

__all__ = ["ChrFConfig", "ChrFScorer"]


@dataclass
class ChrFConfig(FairseqDataclass):
    """Settings of `chrf`."""

    chrf_char_order: int = field(
        default=6, metadata={"help": "longest n-gram of characters", "minimum": 1}
    )
    chrf_word_order: int = field(
        default=0, metadata={"help": "longest n-gram of words (chrF++: 2)", "minimum": 0}
    )
    chrf_beta: int = field(
        default=2, metadata={"help": "how often recall counts against precision", "minimum": 1}
    )


@SCORERS.register("chrf", dataclass=ChrFConfig)
class ChrFScorer(BaseScorer):
    """chrF2 by sacrebleu; `order` has no meaning for it."""

    def _corpus(self) -> Any:
        metric = load_sacrebleu().metrics.CHRF(
            char_order=self.cfg.chrf_char_order,
            word_order=self.cfg.chrf_word_order,
            beta=self.cfg.chrf_beta,
        )
        return metric.corpus_score(self.pred, [self.ref])

    def score(self, order: int = 4) -> float:
        return float(self._corpus().score) if self.ref else 0.0

    def result_string(self, order: int = 4) -> str:
        return str(self._corpus().format())
