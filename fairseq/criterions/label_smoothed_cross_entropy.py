"""Cross entropy with part of the target's probability spread over the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fairseq.criterions.fairseq_criterion import FairseqCriterion, count_rows, log_perplexity
from fairseq.dataclass import II, FairseqDataclass
from fairseq.distributed.vocabulary_scores import ScoresInParts, scores_in_parts
from fairseq.logging import metrics
from fairseq.registry import CRITERIONS

__all__ = [
    "LabelSmoothedCrossEntropyCriterion",
    "LabelSmoothedCrossEntropyCriterionConfig",
    "label_smoothed_nll_loss",
]


@dataclass
class LabelSmoothedCrossEntropyCriterionConfig(FairseqDataclass):
    """Settings of `label_smoothed_cross_entropy`."""

    label_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "probability that is spread over the vocabulary",
            "minimum": 0,
            "maximum": 1,
        },
    )
    report_accuracy: bool = field(
        default=False, metadata={"help": "report how many targets are predicted first"}
    )
    ignore_prefix_size: int = field(
        default=0,
        metadata={"help": "leave out this many tokens at the start of each row", "minimum": 0},
    )
    sentence_avg: bool = II("optimization.sentence_avg")


def label_smoothed_nll_loss(
    lprobs: torch.Tensor,
    target: torch.Tensor,
    epsilon: float,
    ignore_index: int | None = None,
    reduce: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (smoothed loss, negative log-likelihood) in nats.

    The target keeps probability 1 - epsilon, every other word gets epsilon / (V - 1) (Szegedy et
    al. 2016, Rethinking the Inception Architecture, section 7).

    Args:
        lprobs: (N, V) log-probabilities.
        target: (N,) word ids.
        epsilon: in [0, 1).
        ignore_index: target that counts nothing.
        reduce: sum over positions; otherwise returns (N, 1).
    """
    target = target.unsqueeze(-1)  # (N, 1)
    nll = -lprobs.gather(dim=-1, index=target)
    spread = -lprobs.sum(dim=-1, keepdim=True)
    is_ignored = None if ignore_index is None else target.eq(ignore_index)
    return _smoothed(nll, spread, epsilon / (lprobs.size(-1) - 1), epsilon, is_ignored, reduce)


def _smoothed(
    nll: torch.Tensor,
    spread: torch.Tensor,
    epsilon_each: float,
    epsilon: float,
    is_ignored: torch.Tensor | None,
    reduce: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if is_ignored is not None:
        nll = nll.masked_fill(is_ignored, 0.0)
        spread = spread.masked_fill(is_ignored, 0.0)
    if reduce:
        nll, spread = nll.sum(), spread.sum()
    return (1.0 - epsilon - epsilon_each) * nll + epsilon_each * spread, nll


@CRITERIONS.register(
    "label_smoothed_cross_entropy", dataclass=LabelSmoothedCrossEntropyCriterionConfig
)
class LabelSmoothedCrossEntropyCriterion(FairseqCriterion):
    """Label-smoothed cross entropy in nats, summed over tokens.

    Args:
        task: gives the pad id, whose positions count nothing.
        sentence_avg: divide gradients by rows instead of tokens.
        label_smoothing: probability that is spread over the vocabulary, in [0, 1).
        ignore_prefix_size: tokens at the start of each row that are left out.
        report_accuracy: log the share of targets that are predicted first, in percent.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        task: Any,
        sentence_avg: bool = False,
        label_smoothing: float = 0.0,
        ignore_prefix_size: int = 0,
        report_accuracy: bool = False,
    ) -> None:
        super().__init__(task)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"--label-smoothing must be in [0, 1), not {label_smoothing}")
        if ignore_prefix_size < 0:
            raise ValueError(f"--ignore-prefix-size must not be negative: {ignore_prefix_size}")
        self.sentence_avg = sentence_avg
        self.eps = label_smoothing
        self.ignore_prefix_size = ignore_prefix_size
        self.report_accuracy = report_accuracy

    def forward(
        self, model: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[torch.Tensor, int, dict[str, Any]]:
        with scores_in_parts():
            net_output = model(**sample["net_input"])
        loss, nll_loss = self.compute_loss(model, net_output, sample, reduce=reduce)
        num_rows = count_rows(sample, sample["target"])
        sample_size = num_rows if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": loss.detach(),
            "nll_loss": nll_loss.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": num_rows,
            "sample_size": sample_size,
        }
        if self.report_accuracy:
            num_correct, total = self.compute_accuracy(model, net_output, sample)
            logging_output["n_correct"] = num_correct.detach()
            logging_output["total"] = total.detach()
        return loss, sample_size, logging_output

    def get_lprobs_and_target(
        self, model: Any, net_output: Any, sample: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns log-probabilities (N, V) and targets (N,), without the ignored prefixes."""
        lprobs = model.get_normalized_probs(net_output, log_probs=True)  # (B, T, V)
        target = model.get_targets(sample, net_output)  # (B, T)
        if self.ignore_prefix_size > 0:
            is_counted = self._counted_columns(sample, target)
            lprobs, target = lprobs[:, is_counted], target[:, is_counted]
        return lprobs.reshape(-1, lprobs.size(-1)), target.reshape(-1)

    def _counted_columns(self, sample: dict[str, Any], target: torch.Tensor) -> torch.Tensor:
        # A worker that shares sequences with others has only some of their columns.
        columns = sample["net_input"].get("columns", range(target.size(1)))
        return torch.as_tensor(list(columns)) >= self.ignore_prefix_size

    def _parts_and_target(
        self, model: Any, net_output: Any, sample: dict[str, Any]
    ) -> tuple[ScoresInParts, torch.Tensor] | None:
        """Returns scores of this process's words and targets (N,); None if scores are whole."""
        scores = net_output[0]
        if not isinstance(scores, ScoresInParts):
            return None
        target = model.get_targets(sample, net_output)  # (B, T)
        if self.ignore_prefix_size > 0:
            is_counted = self._counted_columns(sample, target)
            scores, target = scores.of_columns(is_counted), target[:, is_counted]
        return scores, target.reshape(-1)

    def compute_loss(
        self, model: Any, net_output: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (loss to minimise, negative log-likelihood)."""
        parts = self._parts_and_target(model, net_output, sample)
        if parts is not None:
            scores, target = parts
            at_target, total = (-each.unsqueeze(1) for each in scores.log_probs(target))
            is_ignored = target.unsqueeze(1).eq(self.padding_idx)
            epsilon_each = self.eps / (scores.num_words - 1)
            return _smoothed(at_target, total, epsilon_each, self.eps, is_ignored, reduce)
        lprobs, target = self.get_lprobs_and_target(model, net_output, sample)
        return label_smoothed_nll_loss(lprobs, target, self.eps, self.padding_idx, reduce)

    def compute_accuracy(
        self, model: Any, net_output: Any, sample: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (targets that have the largest probability, targets)."""
        parts = self._parts_and_target(model, net_output, sample)
        if parts is None:
            lprobs, target = self.get_lprobs_and_target(model, net_output, sample)
            best = lprobs.argmax(dim=-1)
        else:
            best, target = parts[0].best(), parts[1]
        counts = target.ne(self.padding_idx)
        is_correct = best.eq(target) & counts
        return is_correct.sum(), counts.sum()

    @classmethod
    def reduce_metrics(cls, logging_outputs: Sequence[dict[str, Any]]) -> None:
        def total(key: str) -> Any:
            return sum(log.get(key, 0) for log in logging_outputs)

        for metric, weight in (("loss", total("sample_size")), ("nll_loss", total("ntokens"))):
            bits = total(metric) / weight / math.log(2) if weight else 0.0
            metrics.log_scalar(metric, bits, weight, round=3)
        log_perplexity("nll_loss")
        if total("total") > 0:
            metrics.log_scalar("total", total("total"))
            metrics.log_scalar("n_correct", total("n_correct"))
            metrics.log_derived("accuracy", _accuracy)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True


def _accuracy(meters: Any) -> float:
    return round(float(meters["n_correct"].sum * 100.0 / meters["total"].sum), 3)
