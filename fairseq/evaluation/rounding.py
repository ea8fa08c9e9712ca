"""How much of a difference between two computations is rounding, measured on the model itself.

A bound by theory would be far too wide for a whole network, and one by wish proves nothing. Here a
float32 copy of the model has its parameters, and whatever a module returns, rounded to the shorter
type: that is what a correct computation in that type does to the output.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

__all__ = ["FLOAT32_TOLERANCE", "relative_difference", "rounding_error"]

FLOAT32_TOLERANCE = 64 * 2.0**-16
"""Part of a model's bfloat16 rounding error that may lie between two orders of float32 sums.

A step of float32 is 2**-16 of one of bfloat16. Long sums round at every term in float32 (measured:
3 to 4 times as much as the steps alone say); the rest is room for wider models.
"""


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the root mean square of the difference, relative to that of what is expected."""
    found, expected = found.double(), expected.double()
    difference = (found - expected).square().mean().sqrt()
    return float(difference / expected.square().mean().sqrt())


def rounding_error(model: Any, tokens: torch.Tensor, dtype: torch.dtype) -> float:
    """Returns the relative difference that rounding to a type makes in a model's features.

    Args:
        model: a language model in float32 and evaluation mode.
        tokens: ids, (B, T).
        dtype: type that parameters and results of modules are rounded to.
    """
    rounded = copy.deepcopy(model)

    def round_result(_: nn.Module, __: Any, result: Any) -> Any:
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            return result.to(dtype).to(result.dtype)
        return result

    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(dtype))
        for module in rounded.decoder.modules():
            module.register_forward_hook(round_result)
        found = rounded.extract_features(tokens)[0]
        return relative_difference(found, model.extract_features(tokens)[0])
