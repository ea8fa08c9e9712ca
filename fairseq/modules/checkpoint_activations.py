"""Trading time for memory: activations computed again in the backward pass."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint_wrapper"]

M = TypeVar("M", bound=nn.Module)


def checkpoint_wrapper(module: M, offload_to_cpu: bool = False) -> M:
    """Makes a module keep only its inputs for the backward pass and compute the rest again.

    Results are the same to the last bit, dropout included. Outside training nothing changes.

    Args:
        module: changed in place; its names in a state dict stay.
        offload_to_cpu: keep the inputs in the memory of the host.

    Returns:
        The module.
    """
    module.forward = functools.partial(
        _checkpointed_forward, module, type(module).forward, offload_to_cpu
    )
    return module


def _checkpointed_forward(
    module: nn.Module, forward: Any, offload_to_cpu: bool, *args: Any, **kwargs: Any
) -> Any:
    if not (module.training and torch.is_grad_enabled()):
        return forward(module, *args, **kwargs)
    context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if offload_to_cpu:
        context = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available())
    with context:
        return checkpoint(forward, module, *args, use_reentrant=False, **kwargs)
