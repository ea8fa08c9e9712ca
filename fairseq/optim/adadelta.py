"""Adadelta."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fairseq.dataclass import II, FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer, Params, first_lr
from fairseq.registry import OPTIMIZERS

__all__ = ["Adadelta", "AdadeltaConfig"]


@dataclass
class AdadeltaConfig(FairseqDataclass):
    """Settings of `adadelta`."""

    adadelta_rho: float = field(
        default=0.9,
        metadata={"help": "decay of the average of squared gradients", "minimum": 0, "maximum": 1},
    )
    adadelta_eps: float = field(
        default=1e-6, metadata={"help": "added to the roots, for numerical stability", "minimum": 0}
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "weight decay", "argparse_alias": "--wd", "minimum": 0}
    )
    anneal_eps: bool = field(
        default=False,
        metadata={"unsupported": "it has never had an effect; use --adadelta-eps"},
    )
    lr: list[float] = II("optimization.lr")


@OPTIMIZERS.register("adadelta", dataclass=AdadeltaConfig)
class Adadelta(FairseqOptimizer):
    """`--optimizer adadelta`: torch's Adadelta."""

    def __init__(self, cfg: Any, params: Params) -> None:
        super().__init__(cfg)
        self._optimizer = torch.optim.Adadelta(params, **self.optimizer_config)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return {
            "lr": first_lr(self.cfg),
            "rho": self.cfg.adadelta_rho,
            "eps": self.cfg.adadelta_eps,
            "weight_decay": self.cfg.weight_decay,
        }

    @property
    def supports_flat_params(self) -> bool:
        return True
