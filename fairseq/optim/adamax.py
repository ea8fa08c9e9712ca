"""Adamax with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from fairseq.dataclass import II, FairseqDataclass
from fairseq.optim.adam import number_pair
from fairseq.optim.fairseq_optimizer import FairseqOptimizer, Params, first_lr
from fairseq.optim.float32_step import Float32Step, Tensors
from fairseq.registry import OPTIMIZERS

__all__ = ["Adamax", "FairseqAdamax", "FairseqAdamaxConfig"]


@dataclass
class FairseqAdamaxConfig(FairseqDataclass):
    """Settings of `adamax`."""

    adamax_betas: str = field(
        default="(0.9, 0.999)", metadata={"help": "decay of moment and maximum, as in (0.9, 0.98)"}
    )
    adamax_eps: float = field(default=1e-8, metadata={"help": "added to the maximum", "minimum": 0})
    weight_decay: float = field(
        default=0.0, metadata={"help": "weight decay", "argparse_alias": "--wd", "minimum": 0}
    )
    no_bias_correction: bool = field(
        default=False, metadata={"help": "do not correct the moment's bias towards zero"}
    )
    lr: list[float] = II("optimization.lr")


@OPTIMIZERS.register("adamax", dataclass=FairseqAdamaxConfig)
class FairseqAdamax(FairseqOptimizer):
    """`--optimizer adamax`."""

    def __init__(self, cfg: Any, params: Params) -> None:
        super().__init__(cfg)
        self._optimizer = Adamax(params, **self.optimizer_config)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return {
            "lr": first_lr(self.cfg),
            "betas": number_pair(self.cfg.adamax_betas, "--adamax-betas"),
            "eps": self.cfg.adamax_eps,
            "weight_decay": self.cfg.weight_decay,
            "bias_correction": not self.cfg.no_bias_correction,
        }


class Adamax(Float32Step):
    """Adamax (Kingma and Ba 2015, section 7.1) with decoupled weight decay.

    With first moment m, u = max(b2 u, |g|) and step t, one step is
    p -= lr * decay * p; p -= lr / (1 - b1^t) * m / (u + eps). Unlike torch's Adamax it can leave
    the bias uncorrected, and decay does not enter the moments.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the moment and of the maximum, each in [0, 1).
        eps: epsilon.
        weight_decay: decay.
        bias_correction: divide by 1 - b1^t.

    Raises:
        ValueError: a beta is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"--adamax-betas must each be in [0, 1), not {betas}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
        }
        super().__init__(params, defaults)

    def init_state(self, group: dict[str, Any], state: dict[str, Any], value: torch.Tensor) -> None:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(value)
        state["exp_inf"] = torch.zeros_like(value)

    def update(
        self, group: dict[str, Any], states: list[dict[str, Any]], values: Tensors, grads: Tensors
    ) -> None:
        beta1, beta2 = group["betas"]
        moments = [state["exp_avg"] for state in states]
        maxima = [state["exp_inf"] for state in states]
        torch._foreach_mul_(moments, beta1)
        torch._foreach_add_(moments, grads, alpha=1 - beta1)
        torch._foreach_mul_(maxima, beta2)
        torch._foreach_maximum_(maxima, torch._foreach_abs(grads))
        if group["weight_decay"] != 0:
            torch._foreach_add_(values, values, alpha=-group["weight_decay"] * group["lr"])
        step_sizes = []
        for state in states:
            state["step"] += 1
            correction = 1 - beta1 ** state["step"] if group["bias_correction"] else 1.0
            step_sizes.append(-group["lr"] / correction)
        denominators = torch._foreach_add(maxima, group["eps"])
        torch._foreach_addcdiv_(values, moments, denominators, step_sizes)
