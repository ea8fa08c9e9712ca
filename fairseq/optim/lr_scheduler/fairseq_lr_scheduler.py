"""The contract of a learning-rate schedule.

A trainer calls `step_update(0)` when the schedule is made, `step_update(u)` after update u,
`step_begin_epoch(e)` when epoch e begins and `step(e, loss)` when it has ended. So update u is
taken with the rate for u - 1.
"""

from __future__ import annotations

import argparse
from typing import Any

from fairseq.optim.fairseq_optimizer import FairseqOptimizer

__all__ = ["FairseqLRScheduler", "LegacyFairseqLRScheduler", "single_lr"]


class FairseqLRScheduler:
    """Base of all schedules.

    Args:
        cfg: the schedule's settings.
        optimizer: whose learning rate it sets.

    Attributes:
        best: lowest validation loss seen at the end of an epoch, None before the first.

    Raises:
        TypeError: `optimizer` is no `FairseqOptimizer`.
    """

    def __init__(self, cfg: Any, optimizer: FairseqOptimizer) -> None:
        if not isinstance(optimizer, FairseqOptimizer):
            raise TypeError(
                f"a schedule needs a FairseqOptimizer, not {type(optimizer).__name__}; build one "
                "with fairseq.optim.build_optimizer"
            )
        self.cfg = cfg
        self.optimizer = optimizer
        self.best: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.best = state_dict["best"]

    def step_begin_epoch(self, epoch: int) -> float | None:
        """Sets the rate for the beginning of an epoch, counted from 1, if that changes it."""
        return None

    def step(self, epoch: int, val_loss: float | None = None) -> float | None:
        """Takes note of the end of an epoch and of its validation loss."""
        if val_loss is not None:
            self.best = val_loss if self.best is None else min(self.best, val_loss)
        return None

    def step_update(self, num_updates: int) -> float:
        """Sets and returns the rate for the time after `num_updates` updates."""
        return self.optimizer.get_lr()

    def _set_lr(self, lr: float) -> float:
        self.optimizer.set_lr(lr)
        return lr


class LegacyFairseqLRScheduler(FairseqLRScheduler):
    """Base of plug-in schedules without a config dataclass, which read `self.args`."""

    def __init__(self, args: argparse.Namespace, optimizer: FairseqOptimizer) -> None:
        super().__init__(args, optimizer)
        self.args = args


def single_lr(cfg: Any, schedule: str) -> float:
    """Returns the only learning rate.

    Raises:
        ValueError: there are several.
    """
    rates = list(cfg.lr) if isinstance(cfg.lr, (list, tuple)) else [cfg.lr]
    if len(rates) != 1:
        raise ValueError(
            f"--lr-scheduler {schedule} takes one --lr, not {rates}; use --lr-scheduler fixed for "
            "a rate per epoch"
        )
    lr: float = rates[0]
    return lr
