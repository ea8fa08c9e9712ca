"""Adafactor: adaptive rates with second moments stored as rows and columns."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from fairseq.dataclass import II, FairseqDataclass
from fairseq.optim.adam import number_pair
from fairseq.optim.fairseq_optimizer import FairseqOptimizer, Params, first_lr
from fairseq.optim.float32_step import Float32Step, Tensors
from fairseq.registry import OPTIMIZERS

__all__ = ["Adafactor", "FairseqAdafactor", "FairseqAdafactorConfig"]

logger = logging.getLogger(__name__)


@dataclass
class FairseqAdafactorConfig(FairseqDataclass):
    """Settings of `adafactor`."""

    adafactor_eps: str = field(
        default="(1e-30, 1e-3)",
        metadata={"help": "floors of the squared gradient and of the parameter scale"},
    )
    clip_threshold: float = field(
        default=1.0, metadata={"help": "largest root mean square of an update"}
    )
    decay_rate: float = field(
        default=-0.8, metadata={"help": "exponent of the second moment's decay over steps"}
    )
    beta1: float | None = field(
        default=None,
        metadata={
            "help": "decay of the first moment (default: none is kept)",
            "minimum": 0,
            "maximum": 1,
        },
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "weight decay", "argparse_alias": "--wd", "minimum": 0}
    )
    scale_parameter: bool = field(
        default=False, metadata={"help": "multiply the rate by the parameter's root mean square"}
    )
    relative_step: bool = field(
        default=False, metadata={"help": "take the rate from the step count, instead of --lr"}
    )
    warmup_init: bool = field(
        default=False, metadata={"help": "with --relative-step, start with a small rate"}
    )
    lr: list[float] = II("optimization.lr")


@OPTIMIZERS.register("adafactor", dataclass=FairseqAdafactorConfig)
class FairseqAdafactor(FairseqOptimizer):
    """`--optimizer adafactor`."""

    def __init__(self, cfg: Any, params: Params) -> None:
        super().__init__(cfg)
        self._optimizer = Adafactor(params, **self.optimizer_config)
        if cfg.relative_step:
            logger.info("--relative-step: the rate follows the step count, --lr has no effect")

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return {
            "lr": first_lr(self.cfg),
            "eps": number_pair(self.cfg.adafactor_eps, "--adafactor-eps"),
            "clip_threshold": self.cfg.clip_threshold,
            "decay_rate": self.cfg.decay_rate,
            "beta1": self.cfg.beta1,
            "weight_decay": self.cfg.weight_decay,
            "scale_parameter": self.cfg.scale_parameter,
            "relative_step": self.cfg.relative_step,
            "warmup_init": self.cfg.warmup_init,
        }


class Adafactor(Float32Step):
    """Adafactor (Shazeer and Stern 2018).

    Args:
        params: parameters or groups.
        lr: learning rate, unless `relative_step`.
        eps: floors of the squared gradient and of the parameter scale.
        clip_threshold: largest root mean square of an update before the rate is applied.
        decay_rate: exponent c; the second moment decays by 1 - t^c at step t.
        beta1: decay of the first moment; None keeps none.
        weight_decay: decoupled decay.
        scale_parameter: multiply the rate by max(eps[1], root mean square of the parameter).
        relative_step: take min(1e-2, 1 / sqrt(t)) as rate.
        warmup_init: with `relative_step`, 1e-6 t instead of 1e-2.

    Raises:
        ValueError: `warmup_init` without `relative_step`.
    """

    # Rows, columns and root mean squares are those of one parameter.
    supports_flat_params = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = False,
        warmup_init: bool = False,
    ) -> None:
        if warmup_init and not relative_step:
            raise ValueError("--warmup-init needs --relative-step")
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
        }
        super().__init__(params, defaults)

    def init_state(self, group: dict[str, Any], state: dict[str, Any], value: torch.Tensor) -> None:
        state["step"] = 0
        if group["beta1"] is not None:
            state["exp_avg"] = torch.zeros_like(value)
        if value.dim() >= 2:
            state["exp_avg_sq_row"] = value.new_zeros(value.shape[:-1])
            state["exp_avg_sq_col"] = value.new_zeros(value.shape[:-2] + value.shape[-1:])
        else:
            state["exp_avg_sq"] = torch.zeros_like(value)
        state["RMS"] = 0.0

    def update(
        self, group: dict[str, Any], states: list[dict[str, Any]], values: Tensors, grads: Tensors
    ) -> None:
        for state, value, grad in zip(states, values, grads, strict=True):
            state["step"] += 1
            if group["scale_parameter"]:
                state["RMS"] = float(_rms(value))
            beta2 = 1.0 - state["step"] ** group["decay_rate"]
            update = _normalized(state, grad, beta2, group["eps"][0])
            update.div_((_rms(update) / group["clip_threshold"]).clamp_(min=1.0))
            rate = _rate(group, state)
            update.mul_(rate)
            if group["beta1"] is not None:
                update = (
                    state["exp_avg"].mul_(group["beta1"]).add_(update, alpha=1 - group["beta1"])
                )
            if group["weight_decay"] != 0:
                value.add_(value, alpha=-group["weight_decay"] * rate)
            value.sub_(update)


def _rms(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor) / math.sqrt(tensor.numel())


def _rate(group: dict[str, Any], state: dict[str, Any]) -> float:
    rate: float = group["lr"]
    if group["relative_step"]:
        ceiling = 1e-6 * state["step"] if group["warmup_init"] else 1e-2
        rate = min(ceiling, 1.0 / math.sqrt(state["step"]))
    scale = max(group["eps"][1], state["RMS"]) if group["scale_parameter"] else 1.0
    return scale * rate


def _normalized(
    state: dict[str, Any], grad: torch.Tensor, beta2: float, eps: float
) -> torch.Tensor:
    """Updates the second moments; returns the gradient divided by their root."""
    squared = grad.square().add_(eps)
    if "exp_avg_sq" in state:
        second: torch.Tensor = state["exp_avg_sq"].mul_(beta2).add_(squared, alpha=1.0 - beta2)
        return second.rsqrt().mul_(grad)
    row: torch.Tensor = (
        state["exp_avg_sq_row"].mul_(beta2).add_(squared.mean(dim=-1), alpha=1.0 - beta2)
    )
    col: torch.Tensor = (
        state["exp_avg_sq_col"].mul_(beta2).add_(squared.mean(dim=-2), alpha=1.0 - beta2)
    )
    row_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
    return row_factor * col.rsqrt().unsqueeze(-2) * grad
