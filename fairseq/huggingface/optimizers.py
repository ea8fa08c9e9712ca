"""Taking parameters that a model no longer has out of its optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.optim import Optimizer

__all__ = ["as_optimizers", "forget_parameters"]


def as_optimizers(given: Optimizer | Iterable[Optimizer] | None) -> Sequence[Optimizer]:
    """Returns optimizers as a sequence.

    Raises:
        TypeError: something else is among them.
    """
    if given is None:
        return ()
    optimizers = (given,) if isinstance(given, Optimizer) else tuple(given)
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizers has a {type(optimizer).__name__}; give a torch.optim.Optimizer or a "
                "sequence of them, before anything wraps them"
            )
    return optimizers


def forget_parameters(removed: Iterable[torch.Tensor], optimizers: Iterable[Optimizer]) -> None:
    """Takes parameters and their state out of optimizers; everything else stays as it is.

    A group that becomes empty stays too, because schedulers go by the numbers of groups.

    Args:
        removed: the parameters.
        optimizers: each may have any number of groups.
    """
    gone = {id(parameter): parameter for parameter in removed}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for parameter in gone.values():
            optimizer.state.pop(parameter, None)
