"""Stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fairseq.dataclass import II, FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer, Params, first_lr
from fairseq.registry import OPTIMIZERS

__all__ = ["SGD", "SGDConfig"]


@dataclass
class SGDConfig(FairseqDataclass):
    """Settings of `sgd`."""

    momentum: float = field(default=0.0, metadata={"help": "momentum factor", "minimum": 0})
    weight_decay: float = field(
        default=0.0, metadata={"help": "weight decay", "argparse_alias": "--wd", "minimum": 0}
    )
    lr: list[float] = II("optimization.lr")


@OPTIMIZERS.register("sgd", dataclass=SGDConfig)
class SGD(FairseqOptimizer):
    """`--optimizer sgd`: torch's SGD, where weight decay is added to the gradient."""

    def __init__(self, cfg: Any, params: Params) -> None:
        super().__init__(cfg)
        self._optimizer = torch.optim.SGD(params, **self.optimizer_config)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return {
            "lr": first_lr(self.cfg),
            "momentum": self.cfg.momentum,
            "weight_decay": self.cfg.weight_decay,
        }

    @property
    def supports_flat_params(self) -> bool:
        return True
