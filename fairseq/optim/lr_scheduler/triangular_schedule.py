"""A rate that rises and falls linearly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass import II, MISSING, FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import FairseqLRScheduler, single_lr
from fairseq.registry import LR_SCHEDULERS

__all__ = ["TriangularLRSchedule", "TriangularLRScheduleConfig"]


@dataclass
class TriangularLRScheduleConfig(FairseqDataclass):
    """Settings of `triangular`."""

    max_lr: float = field(default=MISSING, metadata={"help": "highest rate, above --lr"})  # type: ignore[assignment]
    lr_period_updates: float = field(
        default=5000, metadata={"help": "updates of one cycle", "minimum": 1}
    )
    lr_shrink: float = field(default=0.1, metadata={"help": "factor of --max-lr for each cycle"})
    shrink_min: bool = field(default=False, metadata={"help": "shrink the lower rate as well"})
    lr: list[float] = II("optimization.lr")


@LR_SCHEDULERS.register("triangular", dataclass=TriangularLRScheduleConfig)
class TriangularLRSchedule(FairseqLRScheduler):
    """Cycles from `--lr` up to `--max-lr` and back (Smith 2017, Cyclical Learning Rates).

    Raises:
        ValueError: `--lr` has several values, `--max-lr` is missing or not above it, or a cycle
            has less than two updates.
    """

    def __init__(self, cfg: Any, optimizer: FairseqOptimizer) -> None:
        super().__init__(cfg, optimizer)
        self.min_lr = single_lr(cfg, "triangular")
        if cfg.max_lr is None or cfg.max_lr == MISSING:
            raise ValueError("--lr-scheduler triangular needs --max-lr")
        if not cfg.max_lr > self.min_lr:
            raise ValueError(f"--max-lr ({cfg.max_lr}) must be larger than --lr ({self.min_lr})")
        self.half_cycle = cfg.lr_period_updates // 2
        if self.half_cycle < 1:
            raise ValueError(f"--lr-period-updates must be at least 2, not {cfg.lr_period_updates}")
        self._set_lr(self.min_lr)

    def step_update(self, num_updates: int) -> float:
        cycle = math.floor(num_updates / (2 * self.half_cycle))
        shrink = self.cfg.lr_shrink**cycle
        high = self.cfg.max_lr * shrink
        low = self.min_lr * shrink if self.cfg.shrink_min else self.min_lr
        distance = abs(num_updates / self.half_cycle - 2 * (cycle + 1) + 1)  # 1 at both ends
        return self._set_lr(low + (high - low) * max(0, 1 - distance))
