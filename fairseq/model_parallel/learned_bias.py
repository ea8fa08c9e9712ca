"""The tensors that gradients of a bias flow into, taken out of it and put into it.

A hand-written backward pass needs them as arguments of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fairseq.attention import AttentionBias

__all__ = ["learned_tensors", "with_tensors"]


def learned_tensors(bias: AttentionBias) -> list[torch.Tensor]:
    """Returns the tensors with a gradient that a bias, or a bias within it, holds."""
    found: list[torch.Tensor] = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    if bias.is_learned:
        _mapped(bias, collect)
    return found


def with_tensors(bias: AttentionBias, tensors: Sequence[torch.Tensor]) -> AttentionBias:
    """Returns the bias with others in place of its `learned_tensors`, in their order."""
    if not tensors:
        return bias
    others: Iterator[torch.Tensor] = iter(tensors)
    replaced: AttentionBias = _mapped(bias, lambda _: next(others))
    return replaced


def _mapped(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value) if value.requires_grad else value
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(each, function) for each in value)
    if isinstance(value, AttentionBias):
        duplicate = copy.copy(value)
        for name, each in vars(value).items():
            setattr(duplicate, name, _mapped(each, function))
        return duplicate
    return value
