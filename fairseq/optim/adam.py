"""Adam with decoupled weight decay."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from fairseq.dataclass import II, FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer, Params, first_lr
from fairseq.optim.float32_step import Float32Step, Tensors
from fairseq.registry import OPTIMIZERS

__all__ = ["Adam", "FairseqAdam", "FairseqAdamConfig", "fused_update", "number_pair"]


@dataclass
class FairseqAdamConfig(FairseqDataclass):
    """Settings of `adam`."""

    adam_betas: str = field(
        default="(0.9, 0.999)", metadata={"help": "decay of the two moments, as in (0.9, 0.98)"}
    )
    adam_eps: float = field(
        default=1e-8, metadata={"help": "added to the root of the second", "minimum": 0}
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "weight decay", "argparse_alias": "--wd", "minimum": 0}
    )
    use_old_adam: bool = field(
        default=False, metadata={"help": "step by step also on a GPU, without the fused kernel"}
    )
    tpu: bool = II("common.tpu")
    lr: list[float] = II("optimization.lr")


def number_pair(value: Any, flag: str) -> tuple[float, float]:
    """Reads two numbers, such as the text "(0.9, 0.98)".

    Raises:
        ValueError: it is something else; the message names `flag`.
    """
    pair = value
    if isinstance(value, str):
        try:
            pair = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            pair = None
    is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
    if not is_pair or not all(isinstance(number, (int, float)) for number in pair):
        raise ValueError(f"{flag}: {value!r} is not a pair of numbers such as (0.9, 0.98)")
    return float(pair[0]), float(pair[1])


@OPTIMIZERS.register("adam", dataclass=FairseqAdamConfig)
class FairseqAdam(FairseqOptimizer):
    """`--optimizer adam`."""

    def __init__(self, cfg: Any, params: Params) -> None:
        super().__init__(cfg)
        self._optimizer = Adam(params, fused=not cfg.use_old_adam, **self.optimizer_config)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return {
            "lr": first_lr(self.cfg),
            "betas": number_pair(self.cfg.adam_betas, "--adam-betas"),
            "eps": self.cfg.adam_eps,
            "weight_decay": self.cfg.weight_decay,
        }


class Adam(Float32Step):
    """Adam (Kingma and Ba 2015, end of section 2) with decoupled weight decay.

    Epsilon is added to the root of the second moment *before* its bias is corrected, unlike in
    torch's AdamW: p -= lr * decay * p; p -= lr sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(s) + eps).

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the moments, each in [0, 1).
        eps: epsilon.
        weight_decay: decay.
        fused: on a GPU, take the step in one kernel.

    Raises:
        ValueError: a beta is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        fused: bool = True,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"--adam-betas must each be in [0, 1), not {betas}")
        # Checkpoints have an entry for AMSGrad, which no option chooses.
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": False,
        }
        super().__init__(params, defaults)
        self.fused = fused

    def init_state(self, group: dict[str, Any], state: dict[str, Any], value: torch.Tensor) -> None:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(value)
        state["exp_avg_sq"] = torch.zeros_like(value)

    def update(
        self, group: dict[str, Any], states: list[dict[str, Any]], values: Tensors, grads: Tensors
    ) -> None:
        for state in states:
            state["step"] += 1
        if self.fused and values[0].is_cuda and len({state["step"] for state in states}) == 1:
            fused_update(group, states, values, grads)
            return
        beta1, beta2 = group["betas"]
        first = [state["exp_avg"] for state in states]
        second = [state["exp_avg_sq"] for state in states]
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, grads, alpha=1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_add_(denominators, group["eps"])
        if group["weight_decay"] != 0:
            torch._foreach_add_(values, values, alpha=-group["weight_decay"] * group["lr"])
        step_sizes = [_step_size(group["lr"], beta1, beta2, state["step"]) for state in states]
        torch._foreach_addcdiv_(values, first, denominators, [-size for size in step_sizes])


def _step_size(lr: float, beta1: float, beta2: float, step: int) -> float:
    return lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)


def fused_update(
    group: dict[str, Any], states: list[dict[str, Any]], values: Tensors, grads: Tensors
) -> None:
    """Takes the step with torch's AdamW kernel.

    The kernel adds epsilon to the *corrected* root, sqrt(s / c) with c = 1 - b2^t. Given
    eps / sqrt(c) it computes the same numbers up to rounding.
    """
    beta1, beta2 = group["betas"]
    step = states[0]["step"]
    # One tensor will do: the kernel reads the count and does not change it.
    steps = [torch.tensor(float(step), device=values[0].device)] * len(values)
    torch._fused_adamw_(
        values,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"] / math.sqrt(1 - beta2**step),
        amsgrad=False,
        maximize=False,
    )
