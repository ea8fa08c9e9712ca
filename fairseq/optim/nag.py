"""Nesterov's accelerated gradient with a momentum that follows the learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from fairseq.dataclass import II, FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer, Params, first_lr
from fairseq.optim.float32_step import Float32Step, Tensors
from fairseq.registry import OPTIMIZERS

__all__ = ["NAG", "FairseqNAG", "FairseqNAGConfig"]


@dataclass
class FairseqNAGConfig(FairseqDataclass):
    """Settings of `nag`."""

    momentum: float = field(default=0.99, metadata={"help": "momentum factor", "minimum": 0})
    weight_decay: float = field(
        default=0.0, metadata={"help": "weight decay", "argparse_alias": "--wd", "minimum": 0}
    )
    lr: list[float] = II("optimization.lr")


@OPTIMIZERS.register("nag", dataclass=FairseqNAGConfig)
class FairseqNAG(FairseqOptimizer):
    """`--optimizer nag`."""

    def __init__(self, cfg: Any, params: Params) -> None:
        super().__init__(cfg)
        self._optimizer = NAG(params, **self.optimizer_config)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return {
            "lr": first_lr(self.cfg),
            "momentum": self.cfg.momentum,
            "weight_decay": self.cfg.weight_decay,
        }


class NAG(Float32Step):
    """Nesterov momentum whose buffer is rescaled when the learning rate changes.

    With gradient g, rate r, previous rate r', momentum u and buffer v, one step is
    p -= r * decay * p; p += u^2 (r / r') v - (1 + u) r g; v = u (r / r') v - r g.
    `lr_old` in a group is r', so it must be restored when training goes on.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: u.
        weight_decay: decoupled decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "lr_old": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def init_state(self, group: dict[str, Any], state: dict[str, Any], value: torch.Tensor) -> None:
        state["momentum_buffer"] = torch.zeros_like(value)

    def update(
        self, group: dict[str, Any], states: list[dict[str, Any]], values: Tensors, grads: Tensors
    ) -> None:
        lr, lr_old, momentum = group["lr"], group["lr_old"], group["momentum"]
        rescale = lr / lr_old if lr_old > 0 else lr
        buffers = [state["momentum_buffer"] for state in states]
        if group["weight_decay"] != 0:
            torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
        torch._foreach_add_(values, buffers, alpha=momentum * momentum * rescale)
        torch._foreach_add_(values, grads, alpha=-(1 + momentum) * lr)
        torch._foreach_mul_(buffers, momentum * rescale)
        torch._foreach_add_(buffers, grads, alpha=-lr)

    def finish_group(self, group: dict[str, Any]) -> None:
        group["lr_old"] = group["lr"]
