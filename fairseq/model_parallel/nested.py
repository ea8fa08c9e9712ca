"""Tensors in nested containers, in the order in which they lie there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["map_tensors", "tensors_in"]


def map_tensors(function: Callable[[torch.Tensor], Any], nested: Any) -> Any:
    """Applies a function to every tensor in nested dictionaries, lists and tuples.

    Args:
        function: what takes the place of a tensor.
        nested: containers of these kinds are made anew, those of transformers (`ModelOutput`) and
            named tuples too; anything else stays.
    """
    if isinstance(nested, torch.Tensor):
        return function(nested)
    if isinstance(nested, dict):
        values = {key: map_tensors(function, value) for key, value in nested.items()}
        return values if type(nested) is dict else type(nested)(**values)
    if isinstance(nested, tuple) and hasattr(nested, "_fields"):
        return type(nested)(*(map_tensors(function, each) for each in nested))
    if type(nested) in (list, tuple):
        return type(nested)(map_tensors(function, each) for each in nested)
    return nested


def tensors_in(nested: Any) -> list[torch.Tensor]:
    """Returns the tensors that `map_tensors` would visit, in its order."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, nested)
    return found
