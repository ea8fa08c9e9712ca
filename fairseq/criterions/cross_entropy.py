"""Cross entropy of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fairseq.criterions.adaptive_nll import adaptive_nll
from fairseq.criterions.fairseq_criterion import (
    FairseqCriterion,
    count_rows,
    log_loss_and_perplexity,
)
from fairseq.dataclass import II, FairseqDataclass
from fairseq.distributed.vocabulary_scores import ScoresInParts, scores_in_parts
from fairseq.registry import CRITERIONS

__all__ = ["CrossEntropyCriterion", "CrossEntropyCriterionConfig"]


@dataclass
class CrossEntropyCriterionConfig(FairseqDataclass):
    """Settings of `cross_entropy`."""

    sentence_avg: bool = II("optimization.sentence_avg")


@CRITERIONS.register("cross_entropy", dataclass=CrossEntropyCriterionConfig)
class CrossEntropyCriterion(FairseqCriterion):
    """Negative log-likelihood of the targets in nats, computed in float32, summed over tokens.

    With a model that has an adaptive softmax this is the whole negative log-likelihood; training
    runs of the original use `adaptive_loss`, which leaves a few words out.

    Args:
        task: gives the pad id, whose positions count nothing.
        sentence_avg: divide gradients by rows instead of tokens.
    """

    def __init__(self, task: Any, sentence_avg: bool = False) -> None:
        super().__init__(task)
        self.sentence_avg = sentence_avg

    def forward(
        self, model: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[torch.Tensor, int, dict[str, Any]]:
        with scores_in_parts():
            net_output = model(**sample["net_input"])
        loss, _ = self.compute_loss(model, net_output, sample, reduce=reduce)
        num_rows = count_rows(sample, sample["target"])
        sample_size = num_rows if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": loss.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": num_rows,
            "sample_size": sample_size,
        }
        return loss, sample_size, logging_output

    def compute_loss(
        self, model: Any, net_output: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the loss twice, as (loss to minimise, negative log-likelihood)."""
        target = model.get_targets(sample, net_output).reshape(-1)  # (B * T,)
        softmax = getattr(getattr(model, "decoder", None), "adaptive_softmax", None)
        if softmax is not None:
            loss = adaptive_nll(
                softmax, net_output[0], target, pad=self.padding_idx, tail_pad=None, reduce=reduce
            )
            return loss, loss
        if isinstance(net_output[0], ScoresInParts):
            log_probs, _ = net_output[0].log_probs(target)
            loss = -log_probs.masked_fill(target == self.padding_idx, 0.0)
            loss = loss.sum() if reduce else loss
            return loss, loss
        lprobs = model.get_normalized_probs(net_output, log_probs=True)
        loss = F.nll_loss(
            lprobs.view(-1, lprobs.size(-1)),
            target,
            ignore_index=self.padding_idx,
            reduction="sum" if reduce else "none",
        )
        return loss, loss

    @staticmethod
    def reduce_metrics(logging_outputs: Sequence[dict[str, Any]]) -> None:
        log_loss_and_perplexity(logging_outputs)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
