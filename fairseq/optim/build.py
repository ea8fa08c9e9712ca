"""Makes the optimizer that settings name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.registry import OPTIMIZERS

__all__ = ["build_optimizer"]


def build_optimizer(cfg: Any, params: Iterable[Any]) -> FairseqOptimizer:
    """Builds the optimizer that `cfg` names.

    Args:
        cfg: the optimizer's config dataclass, or a namespace with the name in `optimizer`.
        params: parameters, or dictionaries of parameters; those without gradients are left out.

    Raises:
        ValueError: no optimizer, or one of an unknown name, is chosen.
    """
    name = cfg._name if isinstance(cfg, FairseqDataclass) else getattr(cfg, "optimizer", None)
    if name is None:
        raise ValueError("optimizer is required! Choose one with --optimizer")
    params = list(params)
    if params and all(isinstance(group, dict) for group in params):
        params = [parameter for group in params for parameter in group.values()]
    trainable = [parameter for parameter in params if parameter.requires_grad]
    optimizer: FairseqOptimizer = OPTIMIZERS.find(name)(cfg, trainable)
    return optimizer
