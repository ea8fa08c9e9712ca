"""Finds the first module whose output, or whose output's gradient, is not finite."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any

import torch
from torch import nn

__all__ = ["NanDetector"]

logger = logging.getLogger(__name__)


class NanDetector:
    """Context in which a model's forward and backward passes are watched.

    The first offender of each direction is logged with its path in the model; at the end, the
    parameters whose gradients are not finite.

    Args:
        model: its modules get hooks while the context is open.
        forward: watch outputs.
        backward: watch the gradients of outputs.
    """

    def __init__(self, model: nn.Module, forward: bool = True, backward: bool = True) -> None:
        self.model = model
        self.forward = forward
        self.backward = backward
        self._found: set[str] = set()
        self._handles: list[Any] = []

    def __enter__(self) -> NanDetector:
        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        bad = [
            name
            for name, param in self.model.named_parameters()
            if param.grad is not None and not torch.isfinite(param.grad).all()
        ]
        if bad:
            more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
            logger.warning(f"gradients that are not finite: {', '.join(bad[:10])}{more}")

    def _hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = _first_float(output)
            if tensor is None:
                return
            if self.forward:
                self._report(name, module, tensor, "output", "forward")
            if self.backward and tensor.requires_grad:
                tensor.register_hook(
                    lambda grad: self._report(name, module, grad, "gradient of output", "backward")
                )

        return look

    def _report(
        self, name: str, module: nn.Module, tensor: torch.Tensor, what: str, direction: str
    ) -> None:
        if direction in self._found or torch.isfinite(tensor).all():
            return
        self._found.add(direction)
        kind = "NaN" if torch.isnan(tensor).any() else "Inf"
        logger.warning(
            f"{kind} detected in {what} of {name or 'the model'} ({type(module).__name__}), shape: "
            f"{tuple(tensor.shape)}, {direction}"
        )


def _first_float(output: Any) -> torch.Tensor | None:
    """Returns the first floating-point tensor in nested containers."""
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, dict) else output
    if isinstance(output, (dict, list, tuple)):
        return next((t for t in map(_first_float, values) if t is not None), None)
    return None
