"""The contract of a criterion, and the metrics every language-model loss reports."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fairseq import utils
from fairseq.logging import metrics

__all__ = ["FairseqCriterion", "count_rows", "log_loss_and_perplexity", "log_perplexity"]


class FairseqCriterion(nn.Module):
    """Base of all criterions.

    Attributes:
        task: the task it was built for.
        padding_idx: id of padding in targets; -100 (torch's "nothing") without a dictionary.
    """

    def __init__(self, task: Any) -> None:
        super().__init__()
        self.task = task
        dictionary = getattr(task, "target_dictionary", None)
        self.padding_idx: int = -100 if dictionary is None else dictionary.pad()

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> FairseqCriterion:
        """Builds the criterion, filling the constructor's parameters by name from `cfg`.

        A parameter called `task` or `cfg` gets the task or the whole config.

        Raises:
            TypeError: a parameter has neither a setting of its name nor a default.
        """
        values: dict[str, Any] = {}
        for name, parameter in inspect.signature(cls).parameters.items():
            if name == "task":
                values[name] = task
            elif name == "cfg":
                values[name] = cfg
            elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise TypeError(
                    f"{cls.__name__}.__init__ takes *{name}, which cannot be filled from settings; "
                    "name its parameters or define build_criterion"
                )
            elif hasattr(cfg, name):
                values[name] = getattr(cfg, name)
            elif parameter.default is parameter.empty:
                raise TypeError(
                    f"{cls.__name__}.__init__ needs {name!r}, but its settings have no such field; "
                    "add the field to its dataclass or give the parameter a default"
                )
        return cls(**values)

    def forward(
        self, model: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[torch.Tensor, int, dict[str, Any]]:
        """Computes the loss of one batch.

        Args:
            model: the model, possibly wrapped for data parallelism.
            sample: a batch with `net_input`, `target` (B, T), `ntokens`, `nsentences`.
            reduce: sum over the batch; otherwise one loss for each target position.

        Returns:
            The loss in nats, what the gradient is to be divided by (tokens or rows), and the
            numbers to log.
        """
        raise NotImplementedError

    @staticmethod
    def reduce_metrics(logging_outputs: Sequence[dict[str, Any]]) -> None:
        """Logs metrics from the logging outputs of all micro-batches and workers."""
        raise NotImplementedError

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Tells whether the logging outputs may be added up key by key before `reduce_metrics`."""
        return False


def count_rows(sample: Mapping[str, Any], target: torch.Tensor) -> int:
    """Returns how many rows of targets (B, T) this worker counts.

    Of the workers that share the rows' sequences, one counts them all (`num_rows` in the batch).
    """
    return int(sample.get("num_rows", target.size(0)))


def log_loss_and_perplexity(logging_outputs: Sequence[dict[str, Any]]) -> None:
    """Logs `loss` and `ppl`, and `nll_loss` where the loss is not counted per token, in bits."""
    loss_nats = sum(log.get("loss", 0) for log in logging_outputs)
    num_tokens = sum(log.get("ntokens", 0) for log in logging_outputs)
    sample_size = sum(log.get("sample_size", 0) for log in logging_outputs)
    metrics.log_scalar("loss", _mean_bits(loss_nats, sample_size), sample_size, round=3)
    per_token = "loss"
    if sample_size != num_tokens:
        per_token = "nll_loss"
        metrics.log_scalar(per_token, _mean_bits(loss_nats, num_tokens), num_tokens, round=3)
    log_perplexity(per_token)


def log_perplexity(metric: str) -> None:
    """Logs `ppl` as derived from the unrounded average of a metric in bits per token."""

    def perplexity(meters: Any) -> float:
        return utils.get_perplexity(meters[metric].avg)

    metrics.log_derived("ppl", perplexity)


def _mean_bits(nats: Any, count: Any) -> Any:
    # A group of batches without a single target has no mean; its weight is 0 as well.
    return nats / count / math.log(2) if count else 0.0
