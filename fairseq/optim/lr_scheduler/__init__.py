"""Learning-rate schedules."""

from __future__ import annotations

from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import (
    FairseqLRScheduler,
    LegacyFairseqLRScheduler,
)
from fairseq.registry import LR_SCHEDULERS

__all__ = [
    "LR_SCHEDULER_REGISTRY",
    "FairseqLRScheduler",
    "LegacyFairseqLRScheduler",
    "build_lr_scheduler",
    "register_lr_scheduler",
]

LR_SCHEDULER_REGISTRY = LR_SCHEDULERS
register_lr_scheduler = LR_SCHEDULERS.register


def build_lr_scheduler(cfg: Any, optimizer: FairseqOptimizer) -> FairseqLRScheduler:
    """Builds the schedule that `cfg` names.

    Args:
        cfg: the schedule's config dataclass, or a namespace with the name in `lr_scheduler`.
        optimizer: whose learning rate it sets, from now on.

    Raises:
        ValueError: no schedule, or one of an unknown name, is chosen, or its settings do not fit.
    """
    name = cfg._name if isinstance(cfg, FairseqDataclass) else getattr(cfg, "lr_scheduler", None)
    if name is None:
        raise ValueError("lr_scheduler is required! Choose one with --lr-scheduler")
    scheduler: FairseqLRScheduler = LR_SCHEDULERS.find(name)(cfg, optimizer)
    return scheduler
