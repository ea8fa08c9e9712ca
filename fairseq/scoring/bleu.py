"""BLEU (Papineni et al. 2002): of words as they stand, and as sacrebleu splits text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.registry import SCORERS
from fairseq.scoring.base import BaseScorer, load_sacrebleu

__all__ = ["SacrebleuConfig", "SacrebleuScorer", "Scorer", "corpus_bleu", "format_bleu"]

TOKENIZERS = ["none", "13a", "intl", "zh", "char"]


def corpus_bleu(
    references: list[str],
    predictions: list[str],
    *,
    order: int = 4,
    lowercase: bool = False,
    smooth_method: str = "none",
) -> Any:
    """Returns sacrebleu's `BLEUScore` of texts whose words are separated by white space.

    Args:
        references: one for each prediction.
        predictions: texts.
        order: longest n-gram that counts, from 1.
        lowercase: case does not matter.
        smooth_method: `none` gives 0 where no n-gram of some length matches; `exp`, `floor` and
            `add-k` are sacrebleu's others.
    """
    metric = load_sacrebleu().metrics.BLEU(
        lowercase=lowercase,
        tokenize="none",
        smooth_method=smooth_method,
        max_ngram_order=order,
        force=True,
    )
    return metric.corpus_score(predictions, [references])


def format_bleu(score: Any) -> str:
    """Returns the line that the original prints for a `BLEUScore`."""
    precisions = "/".join(f"{each:2.1f}" for each in score.precisions)
    ratio = score.sys_len / score.ref_len if score.ref_len else 0.0
    return (
        f"BLEU{len(score.precisions)} = {score.score:2.2f}, {precisions} (BP={score.bp:.3f}, "
        f"ratio={ratio:.3f}, syslen={score.sys_len}, reflen={score.ref_len})"
    )


@SCORERS.register("bleu")
class Scorer(BaseScorer):
    """BLEU of words as they stand, without smoothing; an unknown word of a reference matches none.

    Words are what white space separates. The unknown word is that of the dictionary, `<unk>`
    without one.
    """

    def add_string(self, ref: str, pred: str) -> None:
        unknown = "<unk>" if self.tgt_dict is None else self.tgt_dict.unk_string()
        words = (f"<{word}>" if word == unknown else word for word in ref.split())
        super().add_string(" ".join(words), pred)

    def _corpus(self, order: int) -> Any:
        return corpus_bleu(self.ref, self.pred, order=order)

    def score(self, order: int = 4) -> float:
        return float(self._corpus(order).score) if self.ref else 0.0

    def result_string(self, order: int = 4) -> str:
        return format_bleu(self._corpus(order))


@dataclass
class SacrebleuConfig(FairseqDataclass):
    """Settings of `sacrebleu`."""

    sacrebleu_tokenizer: str = field(
        default="13a",
        metadata={"help": "how text is split into words", "choices": TOKENIZERS},
    )
    sacrebleu_lowercase: bool = field(default=False, metadata={"help": "case does not matter"})
    sacrebleu_char_level: bool = field(
        default=False, metadata={"help": "score characters in place of words"}
    )


@SCORERS.register("sacrebleu", dataclass=SacrebleuConfig)
class SacrebleuScorer(BaseScorer):
    """BLEU as sacrebleu computes it by default (Post 2018), of text that it splits itself."""

    def _corpus(self, order: int) -> Any:
        cfg = self.cfg
        metric = load_sacrebleu().metrics.BLEU(
            lowercase=cfg.sacrebleu_lowercase,
            tokenize="char" if cfg.sacrebleu_char_level else cfg.sacrebleu_tokenizer,
            max_ngram_order=order,
        )
        return metric.corpus_score(self.pred, [self.ref])

    def score(self, order: int = 4) -> float:
        return float(self._corpus(order).score) if self.ref else 0.0

    def result_string(self, order: int = 4) -> str:
        return str(self._corpus(order).format())
