"""The contract of an optimizer."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fairseq.optim.grad_norm import clip_grad_norm_
from fairseq.utils import local_part

__all__ = ["FairseqOptimizer", "LegacyFairseqOptimizer"]

Params = Iterable[nn.Parameter]


class FairseqOptimizer:
    """Wraps a torch optimizer, which subclasses put into `_optimizer`.

    Args:
        cfg: the optimizer's settings.
    """

    _optimizer: torch.optim.Optimizer

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer."""
        return self._optimizer

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """The torch optimizer's arguments, as the settings have them."""
        raise NotImplementedError

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The torch optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def params(self) -> Iterable[nn.Parameter]:
        """Every parameter, in order."""
        for group in self.param_groups:
            yield from group["params"]

    def get_lr(self) -> float:
        """Returns the learning rate."""
        lr: float = self.param_groups[0]["lr"]
        return lr

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of every group."""
        for group in self.param_groups:
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Returns the torch optimizer's state dict."""
        return self.optimizer.state_dict()

    def load_state_dict(
        self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None
    ) -> None:
        """Loads a state dict.

        Args:
            state_dict: from `state_dict`, here or in the original.
            optimizer_overrides: group settings that replace the stored ones.

        Raises:
            ValueError: the state belongs to other parameters, or an override names a setting that
                the groups do not have.
        """
        check_group_sizes(state_dict["param_groups"], self.param_groups)
        self.optimizer.load_state_dict(state_dict)
        apply_overrides(self.param_groups, optimizer_overrides)

    def backward(self, loss: torch.Tensor) -> None:
        """Computes gradients, adding to those there are."""
        loss.backward()

    def all_reduce_grads(self, module: Any) -> None:
        """Averages gradients over workers, where the model's wrapper does that on demand."""
        if hasattr(module, "all_reduce_grads"):
            module.all_reduce_grads()

    @torch.no_grad()
    def multiply_grads(self, c: float | torch.Tensor) -> None:
        """Multiplies all gradients by a number."""
        grads = [local_part(p.grad) for p in self.params if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, c.to(grads[0].device) if torch.is_tensor(c) else c)

    def clip_grad_norm(
        self,
        max_norm: float,
        aggregate_norm_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Clips gradients; returns their norm before that. See `clip_grad_norm_`."""
        return clip_grad_norm_(self.params, max_norm, aggregate_norm_fn)

    def step(
        self, closure: Callable[[], Any] | None = None, scale: float | torch.Tensor = 1.0
    ) -> None:
        """Updates the parameters.

        Args:
            closure: re-evaluates the loss, for optimizers that need it.
            scale: divide gradients by this first.
        """
        optimizer: Any = self.optimizer
        if self.supports_step_with_scale:
            optimizer.step(closure, scale=scale)
            return
        if torch.is_tensor(scale) or scale != 1.0:
            self.multiply_grads(1.0 / scale)
        optimizer.step(closure)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for parameter in self.params:
            parameter.grad = None

    def master_state(self) -> torch.Tensor | list[torch.Tensor] | None:
        """Returns the float32 masters of half-precision parameters; None if there are none."""
        return None

    @torch.no_grad()
    def load_master_state(self, masters: torch.Tensor | list[torch.Tensor] | None) -> None:
        """Restores what `master_state` returned, in this or in another precision.

        Raises:
            ValueError: the masters have another number of elements than the parameters.
        """
        if masters is not None:
            copy_in_order(masters, list(self.params))

    @property
    def supports_memory_efficient_fp16(self) -> bool:
        """Whether it can step half-precision parameters, keeping its own state in float32."""
        return bool(getattr(self.optimizer, "supports_memory_efficient_fp16", False))

    @property
    def supports_step_with_scale(self) -> bool:
        """Whether the torch optimizer's `step` takes a `scale` to divide gradients by."""
        return bool(getattr(self.optimizer, "supports_step_with_scale", False))

    @property
    def supports_flat_params(self) -> bool:
        """Whether stepping one vector of all parameters is the same as stepping each."""
        return bool(getattr(self.optimizer, "supports_flat_params", False))


class LegacyFairseqOptimizer(FairseqOptimizer):
    """Base of plug-in optimizers without a config dataclass, which read `self.args`."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.args = args


def apply_overrides(groups: list[dict[str, Any]], overrides: dict[str, Any] | None) -> None:
    """Replaces settings of parameter groups.

    Raises:
        ValueError: a group has no such setting.
    """
    for group in groups:
        for name, value in (overrides or {}).items():
            if name not in group:
                known = ", ".join(sorted(set(group) - {"params"}))
                raise ValueError(
                    f"--optimizer-overrides: the optimizer has no setting {name!r}; it has {known}"
                )
            group[name] = value


def check_group_sizes(stored: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """Checks that a stored state has as many parameters as there are.

    Raises:
        ValueError: it has not.
    """
    sizes = [len(group["params"]) for group in stored]
    expected = [len(group["params"]) for group in groups]
    if sizes != expected:
        raise ValueError(
            f"the optimizer state is one of {sum(sizes)} tensors, this run updates "
            f"{sum(expected)}; resume with the model and the precision it was saved with (--fp16 "
            "keeps one vector, --fp16-no-flatten-grads and float32 a tensor for each parameter), "
            "or add --reset-optimizer"
        )


def copy_in_order(source: torch.Tensor | list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    """Copies elements into tensors, in order, whatever pieces either side comes in.

    Raises:
        ValueError: the number of elements differs.
    """
    pieces = [source] if torch.is_tensor(source) else list(source)
    flat = torch.cat([piece.reshape(-1) for piece in pieces])
    sizes = [target.numel() for target in targets]
    if flat.numel() != sum(sizes):
        raise ValueError(
            f"there are {flat.numel()} master weights for {sum(sizes)} parameters; the checkpoint "
            "belongs to another model"
        )
    for target, values in zip(targets, flat.split(sizes), strict=True):
        target.copy_(values.view_as(target))


def first_lr(cfg: Any) -> float:
    """Returns the learning rate an optimizer is made with: the first of `--lr`."""
    lr: float = cfg.lr[0] if isinstance(cfg.lr, (list, tuple)) else cfg.lr
    return lr
