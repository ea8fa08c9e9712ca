"""Cosine annealing with warm restarts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass import II, FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import FairseqLRScheduler, single_lr
from fairseq.registry import LR_SCHEDULERS

__all__ = ["CosineLRSchedule", "CosineLRScheduleConfig"]


@dataclass
class CosineLRScheduleConfig(FairseqDataclass):
    """Settings of `cosine`."""

    warmup_updates: int = field(
        default=0, metadata={"help": "updates over which the rate rises linearly", "minimum": 0}
    )
    warmup_init_lr: float = field(
        default=-1, metadata={"help": "rate before the first update (negative: --min-lr)"}
    )
    lr: list[float] = II("optimization.lr")
    min_lr: float = field(default=0.0, metadata={"help": "lowest rate of a period"})
    t_mult: float = field(default=1.0, metadata={"help": "factor from one period to the next"})
    lr_period_updates: float = field(
        default=-1, metadata={"help": "updates of the first period (default: all of training)"}
    )
    lr_shrink: float = field(
        default=0.1, metadata={"help": "factor of both rates from one period to the next"}
    )
    max_update: int = II("optimization.max_update")


@LR_SCHEDULERS.register("cosine", dataclass=CosineLRScheduleConfig)
class CosineLRSchedule(FairseqLRScheduler):
    """A linear warm-up, then periods of half a cosine (Loshchilov and Hutter 2017, SGDR).

    Period i has lr_period_updates * t_mult^i updates and goes from lr to min_lr, both multiplied
    by lr_shrink^i.

    Raises:
        ValueError: `--lr` has several values or is not above `--min-lr`, or no period is set.
    """

    def __init__(self, cfg: Any, optimizer: FairseqOptimizer) -> None:
        super().__init__(cfg, optimizer)
        self.max_lr = single_lr(cfg, "cosine")
        if not self.max_lr > cfg.min_lr:
            raise ValueError(
                f"--lr ({self.max_lr}) must be larger than --min-lr ({cfg.min_lr}): cosine goes "
                "down from one to the other"
            )
        if cfg.t_mult <= 0:
            raise ValueError(f"--t-mult must be positive, not {cfg.t_mult}")
        self.period = cfg.lr_period_updates
        if self.period <= 0:
            self.period = (cfg.max_update or 0) - cfg.warmup_updates
        if self.period <= 0:
            raise ValueError(
                "--lr-scheduler cosine needs --lr-period-updates, or a --max-update larger than "
                f"--warmup-updates ({cfg.warmup_updates})"
            )
        self.warmup_init_lr = cfg.warmup_init_lr if cfg.warmup_init_lr >= 0 else cfg.min_lr
        self._set_lr(self.warmup_init_lr)

    def step_update(self, num_updates: int) -> float:
        warmup = self.cfg.warmup_updates
        if num_updates < warmup:
            slope = (self.max_lr - self.warmup_init_lr) / warmup
            return self._set_lr(self.warmup_init_lr + num_updates * slope)
        index, start, length = self._period_at(num_updates - warmup)
        shrink = self.cfg.lr_shrink**index
        low, high = self.cfg.min_lr * shrink, self.max_lr * shrink
        elapsed = num_updates - warmup - start
        return self._set_lr(low + 0.5 * (high - low) * (1 + math.cos(math.pi * elapsed / length)))

    def _period_at(self, updates: int) -> tuple[int, float, float]:
        """Returns (index, first update, length) of the period that an update falls into."""
        factor = self.cfg.t_mult
        if factor == 1:
            index = math.floor(updates / self.period)
            return index, self.period * index, self.period
        power = 1 - updates / self.period * (1 - factor)
        if power <= 0:
            raise ValueError(
                f"with --t-mult {factor} all periods together end after "
                f"{self.period / (1 - factor):g} updates; use a --t-mult of at least 1"
            )
        index = math.floor(math.log(power, factor))
        start = (1 - factor**index) / (1 - factor) * self.period
        return index, start, factor**index * self.period
