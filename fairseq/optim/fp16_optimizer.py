"""Training in half precision: float32 masters, or none to save memory, and a scaled loss.

Gradients are scaled by the loss scale, by workers / sample size, and by clipping. The wrappers
gather these in one factor, which is applied once, when the step is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from fairseq.optim.build import build_optimizer
from fairseq.optim.dynamic_loss_scaler import DynamicLossScaler
from fairseq.optim.fairseq_optimizer import FairseqOptimizer, copy_in_order
from fairseq.optim.grad_norm import CLIP_EPSILON

__all__ = ["FP16Optimizer", "MemoryEfficientFP16Optimizer"]

NormFn = Callable[[torch.Tensor], torch.Tensor]


class _HalfPrecisionOptimizer(FairseqOptimizer):
    """The loss scale and the gradients' factor, around another optimizer.

    Attributes:
        scaler: the loss scaler; None for bfloat16, whose range is that of float32.
    """

    def __init__(self, cfg: Any, params: list[nn.Parameter], wrapped: FairseqOptimizer) -> None:
        super().__init__(cfg.optimizer)
        self.half_params = params
        self.wrapped_optimizer = wrapped
        self.scaler = None if cfg.common.bf16 else _build_scaler(cfg)
        self._reset_factor()

    def _reset_factor(self) -> None:
        self._factor: float | torch.Tensor = 1.0
        if self.scaler is not None:
            self._factor = 1.0 / self.scaler.loss_scale

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.wrapped_optimizer.optimizer

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return self.wrapped_optimizer.optimizer_config

    @property
    def lr_scheduler(self) -> Any:
        """The wrapped optimizer's own schedule; None without one."""
        return getattr(self.wrapped_optimizer, "lr_scheduler", None)

    @property
    def supports_flat_params(self) -> bool:
        return self.wrapped_optimizer.supports_flat_params

    def get_lr(self) -> float:
        return self.wrapped_optimizer.get_lr()

    def set_lr(self, lr: float) -> None:
        self.wrapped_optimizer.set_lr(lr)

    def state_dict(self) -> dict[str, Any]:
        """Returns the wrapped optimizer's state dict, and `loss_scale` if the loss is scaled."""
        state_dict = self.wrapped_optimizer.state_dict()
        if self.scaler is not None:
            state_dict["loss_scale"] = self.scaler.loss_scale
        return state_dict

    def load_state_dict(
        self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None
    ) -> None:
        self.wrapped_optimizer.load_state_dict(state_dict, optimizer_overrides)
        if self.scaler is not None and "loss_scale" in state_dict:
            self.scaler.loss_scale = float(state_dict["loss_scale"])
            self._reset_factor()

    def all_reduce_grads(self, module: Any) -> None:
        self.wrapped_optimizer.all_reduce_grads(module)

    def backward(self, loss: torch.Tensor) -> None:
        """Computes gradients of the scaled loss, adding to those there are."""
        self.wrapped_optimizer.backward(loss if self.scaler is None else self.scaler.scale(loss))

    def multiply_grads(self, c: float | torch.Tensor) -> None:
        self._factor = self._factor * c

    def clip_grad_norm(
        self, max_norm: float, aggregate_norm_fn: NormFn | None = None
    ) -> torch.Tensor:
        """Clips gradients and looks for overflow.

        In float16 gradients are multiplied by max_norm / norm where the norm is larger, in
        bfloat16 by min(1, max_norm / (norm + 1e-6)).

        Raises:
            OverflowError: the norm is not finite and the loss scale has been lowered.
            FloatingPointError: the norm is not finite and the loss scale is as low as it may be.
        """
        norm = self._factor * self.wrapped_optimizer.clip_grad_norm(0, aggregate_norm_fn)
        if self.scaler is None:
            if max_norm > 0:
                coefficient = float(max_norm) / (norm + CLIP_EPSILON)
                self.multiply_grads(coefficient.clamp(max=1.0))
            return norm
        value = float(norm)
        if value > max_norm > 0:
            self.multiply_grads(max_norm / value)
        self.scaler.check_overflow(value)
        return norm

    def step(
        self, closure: Callable[[], Any] | None = None, scale: float | torch.Tensor = 1.0
    ) -> None:
        self._step_wrapped(closure, self._factor / scale)
        if self.scaler is not None:
            self.scaler.update()
        self._factor = 1.0

    def _step_wrapped(self, closure: Any, factor: float | torch.Tensor) -> None:
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for parameter in self.half_params:
            parameter.grad = None
        self.wrapped_optimizer.zero_grad()
        self._reset_factor()


class FP16Optimizer(_HalfPrecisionOptimizer):
    """Half-precision parameters with float32 masters, which the wrapped optimizer updates.

    Masters are one vector of all parameters in their order, so that the optimizer's state has a
    single entry; with `--fp16-no-flatten-grads`, and in bfloat16, there is one for each parameter.
    A parameter without a gradient counts as one with gradient zero.

    Args:
        cfg: the whole configuration.
        params: the half-precision parameters.
        fp32_optimizer: the optimizer of the masters.
        fp32_params: the masters: a vector or a list, from `build_fp32_params`.
    """

    def __init__(
        self,
        cfg: Any,
        params: list[nn.Parameter],
        fp32_optimizer: FairseqOptimizer,
        fp32_params: nn.Parameter | list[nn.Parameter],
    ) -> None:
        super().__init__(cfg, params, fp32_optimizer)
        self.fp32_optimizer = fp32_optimizer
        self.fp32_params = fp32_params
        self._has_new_grads = False

    @classmethod
    def build_optimizer(cls, cfg: Any, params: Iterable[nn.Parameter]) -> FP16Optimizer:
        """Builds masters and the optimizer that the configuration names.

        Args:
            cfg: the whole configuration.
            params: the half-precision parameters; those without gradients are left out.

        Raises:
            ValueError: the optimizer does not work on one flat vector, or settings of the loss
                scale do not fit.
        """
        trainable = [parameter for parameter in params if parameter.requires_grad]
        flatten = not (cfg.common.fp16_no_flatten_grads or cfg.common.bf16)
        fp32_params = cls.build_fp32_params(trainable, flatten=flatten)
        masters = fp32_params if isinstance(fp32_params, list) else [fp32_params]
        fp32_optimizer = build_optimizer(cfg.optimizer, masters)
        if flatten and not fp32_optimizer.supports_flat_params:
            raise ValueError(
                f"--optimizer {cfg.optimizer._name} does not work on one vector of all parameters; "
                "add --fp16-no-flatten-grads"
            )
        return cls(cfg, trainable, fp32_optimizer, fp32_params)

    @staticmethod
    def build_fp32_params(
        params: list[nn.Parameter], flatten: bool = True
    ) -> nn.Parameter | list[nn.Parameter]:
        """Returns float32 copies of parameters, as one vector or one for each."""
        copies = [parameter.detach().float().clone() for parameter in params]
        if flatten:
            return nn.Parameter(torch.cat([copy.view(-1) for copy in copies]))
        return [nn.Parameter(copy) for copy in copies]

    @property
    def has_flat_params(self) -> bool:
        """Whether the masters are one vector."""
        return not isinstance(self.fp32_params, list)

    def master_state(self) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(self.fp32_params, list):
            return [master.detach() for master in self.fp32_params]
        return self.fp32_params.detach()

    @torch.no_grad()
    def load_master_state(self, masters: torch.Tensor | list[torch.Tensor] | None) -> None:
        """Restores masters, flat or not, and rounds the parameters from them.

        Raises:
            ValueError: they have another number of elements than the parameters.
        """
        if masters is not None:
            copy_in_order(masters, self._master_views(self.fp32_params))
            self._round_masters()

    def _master_views(self, masters: torch.Tensor | list[Any]) -> list[torch.Tensor]:
        """Returns the part of masters, or of their gradients, that belongs to each parameter."""
        if isinstance(masters, list):
            return masters
        sizes = [parameter.numel() for parameter in self.half_params]
        parts = zip(masters.split(sizes), self.half_params, strict=True)
        return [part.view_as(parameter) for part, parameter in parts]

    @torch.no_grad()
    def _round_masters(self) -> None:
        masters = [view.detach() for view in self._master_views(self.fp32_params)]
        torch._foreach_copy_([p.detach() for p in self.half_params], masters)

    @torch.no_grad()
    def _move_grads_to_masters(self) -> None:
        if not self._has_new_grads:
            return
        grads: torch.Tensor | list[torch.Tensor]
        if isinstance(self.fp32_params, list):
            grads = [torch.zeros_like(master) for master in self.fp32_params]
            for master, grad in zip(self.fp32_params, grads, strict=True):
                master.grad = grad
        else:
            self.fp32_params.grad = grads = torch.zeros_like(self.fp32_params)
        pairs = [
            (view, parameter.grad)
            for view, parameter in zip(self._master_views(grads), self.half_params, strict=True)
            if parameter.grad is not None
        ]
        if pairs:
            torch._foreach_copy_([view for view, _ in pairs], [grad for _, grad in pairs])
        self._has_new_grads = False

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        self._has_new_grads = True

    def clip_grad_norm(
        self, max_norm: float, aggregate_norm_fn: NormFn | None = None
    ) -> torch.Tensor:
        self._move_grads_to_masters()
        return super().clip_grad_norm(max_norm, aggregate_norm_fn)

    def _step_wrapped(self, closure: Any, factor: float | torch.Tensor) -> None:
        self._move_grads_to_masters()
        self.fp32_optimizer.multiply_grads(factor)
        self.fp32_optimizer.step(closure)
        self._round_masters()

    def zero_grad(self) -> None:
        super().zero_grad()
        self._has_new_grads = False


class MemoryEfficientFP16Optimizer(_HalfPrecisionOptimizer):
    """Half-precision parameters without masters: the optimizer rounds each update into them.

    The optimizer's state is float32, one entry for each parameter.

    Args:
        cfg: the whole configuration.
        params: the half-precision parameters.
        optimizer: their optimizer.
        allow_unsupported: do not insist on an optimizer that computes in float32, because the
            parameters are float32 shards.

    Raises:
        ValueError: the optimizer does not compute in float32.
    """

    def __init__(
        self,
        cfg: Any,
        params: list[nn.Parameter],
        optimizer: FairseqOptimizer,
        *,
        allow_unsupported: bool = False,
    ) -> None:
        if not (allow_unsupported or optimizer.supports_memory_efficient_fp16):
            raise ValueError(
                f"Unsupported optimizer: {type(optimizer).__name__}; --memory-efficient-fp16 and "
                "--memory-efficient-bf16 work with nag, adam, adafactor and adamax"
            )
        super().__init__(cfg, params, optimizer)

    @classmethod
    def build_optimizer(
        cls, cfg: Any, params: Iterable[nn.Parameter], *, allow_unsupported: bool = False
    ) -> MemoryEfficientFP16Optimizer:
        """Builds the optimizer that the configuration names.

        Args:
            cfg: the whole configuration.
            params: the half-precision parameters; those without gradients are left out.
            allow_unsupported: see the class.
        """
        trainable = [parameter for parameter in params if parameter.requires_grad]
        optimizer = build_optimizer(cfg.optimizer, trainable)
        return cls(cfg, trainable, optimizer, allow_unsupported=allow_unsupported)

    def load_state_dict(
        self, state_dict: dict[str, Any], optimizer_overrides: dict[str, Any] | None = None
    ) -> None:
        super().load_state_dict(state_dict, optimizer_overrides)
        # torch has rounded the state to the parameters' type; it belongs in float32.
        for index, parameter in zip(_indices(state_dict), self.half_params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                if name != "step" and torch.is_tensor(value) and value.is_floating_point():
                    self.optimizer.state[parameter][name] = value.to(parameter.device, copy=True)

    def _step_wrapped(self, closure: Any, factor: float | torch.Tensor) -> None:
        self.wrapped_optimizer.step(closure, scale=1.0 / factor)


def _indices(state_dict: dict[str, Any]) -> Iterator[int]:
    return chain.from_iterable(group["params"] for group in state_dict["param_groups"])


def _build_scaler(cfg: Any) -> DynamicLossScaler:
    """Returns the loss scaler; its window covers the same amount of data on any set-up."""
    common, update_freq = cfg.common, cfg.optimization.update_freq
    window = common.fp16_scale_window
    if window is None:
        if len(update_freq) > 1:
            raise ValueError(
                "--fp16-scale-window must be given where --update-freq differs between epochs "
                f"({update_freq})"
            )
        num_workers = cfg.distributed_training.distributed_world_size
        window = int(2**14 / num_workers / update_freq[0])
    return DynamicLossScaler(
        init_scale=common.fp16_init_scale,
        scale_window=window,
        tolerance=common.fp16_scale_tolerance,
        threshold=common.threshold_loss_scale,
        min_loss_scale=common.min_loss_scale,
    )
