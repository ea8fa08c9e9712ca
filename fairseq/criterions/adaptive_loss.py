"""The loss of models with an adaptive softmax, as the published training curves have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fairseq.criterions.adaptive_nll import adaptive_nll
from fairseq.criterions.fairseq_criterion import (
    FairseqCriterion,
    count_rows,
    log_loss_and_perplexity,
)
from fairseq.dataclass import II, FairseqDataclass
from fairseq.distributed import utils as distributed_utils
from fairseq.registry import CRITERIONS
from fairseq.utils import on_host

__all__ = ["AdaptiveLoss", "AdaptiveLossConfig"]


@dataclass
class AdaptiveLossConfig(FairseqDataclass):
    """Settings of `adaptive_loss`."""

    sentence_avg: bool = II("optimization.sentence_avg")
    ddp_backend: str = II("distributed_training.ddp_backend")


@CRITERIONS.register("adaptive_loss", dataclass=AdaptiveLossConfig)
class AdaptiveLoss(FairseqCriterion):
    """Sum of the cross entropies of an adaptive softmax's head and of the tails that occur.

    The pad id is the ignored target in the tails too, where targets count from the start of their
    band. So the second word of each band (ids cutoff + 1) contributes its class but not its tail.
    This is the original's rule, kept because training curves depend on it: losses logged in
    training are a little lower than those of an evaluation. `cross_entropy` counts every word.

    Args:
        task: gives the pad id.
        sentence_avg: divide gradients by rows instead of tokens.
    """

    def __init__(self, task: Any, sentence_avg: bool = False) -> None:
        super().__init__(task)
        self.sentence_avg = sentence_avg

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> FairseqCriterion:
        """Builds the criterion.

        Raises:
            ValueError: several workers with a backend that waits for every parameter's gradient;
                a tail without targets in a batch has none.
        """
        is_torch_ddp = getattr(cfg, "ddp_backend", None) in ("c10d", "pytorch_ddp")
        num_workers = distributed_utils.get_world_size(distributed_utils.get_gradient_group())
        if is_torch_ddp and num_workers > 1:
            raise ValueError(
                f"--criterion adaptive_loss does not work with --ddp-backend {cfg.ddp_backend} on "
                "several workers, because a tail without targets in a batch gets no gradient; use "
                "--ddp-backend legacy_ddp"
            )
        return super().build_criterion(cfg, task)

    def forward(
        self, model: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[torch.Tensor, int, dict[str, Any]]:
        softmax = getattr(getattr(model, "decoder", None), "adaptive_softmax", None)
        if softmax is None:
            raise ValueError(
                "--criterion adaptive_loss needs a model with an adaptive softmax; set "
                "--adaptive-softmax-cutoff, or use --criterion cross_entropy"
            )
        net_output = model(**sample["net_input"])
        target = model.get_targets(sample, net_output)  # (B, T)
        num_rows = count_rows(sample, target)
        num_tokens = int(on_host(target).ne(self.padding_idx).sum())
        target = target.reshape(-1)
        loss = adaptive_nll(
            softmax,
            net_output[0],
            target,
            pad=self.padding_idx,
            tail_pad=self.padding_idx,
            reduce=reduce,
        )
        sample_size = num_rows if self.sentence_avg else num_tokens
        logging_output = {
            "loss": loss.detach(),
            "ntokens": num_tokens,
            "nsentences": num_rows,
            "sample_size": sample_size,
        }
        return loss, sample_size, logging_output

    @staticmethod
    def reduce_metrics(logging_outputs: Sequence[dict[str, Any]]) -> None:
        log_loss_and_perplexity(logging_outputs)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
