"""Adagrad."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fairseq.dataclass import II, FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer, Params, first_lr
from fairseq.registry import OPTIMIZERS

__all__ = ["Adagrad", "AdagradConfig"]


@dataclass
class AdagradConfig(FairseqDataclass):
    """Settings of `adagrad`."""

    weight_decay: float = field(
        default=0.0, metadata={"help": "weight decay", "argparse_alias": "--wd", "minimum": 0}
    )
    lr: list[float] = II("optimization.lr")


@OPTIMIZERS.register("adagrad", dataclass=AdagradConfig)
class Adagrad(FairseqOptimizer):
    """`--optimizer adagrad`: torch's Adagrad."""

    def __init__(self, cfg: Any, params: Params) -> None:
        super().__init__(cfg)
        self._optimizer = torch.optim.Adagrad(params, **self.optimizer_config)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return {"lr": first_lr(self.cfg), "weight_decay": self.cfg.weight_decay}
