"""Decay by a power of the remaining updates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass import II, FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import FairseqLRScheduler
from fairseq.registry import LR_SCHEDULERS

__all__ = ["PolynomialDecayLRSchedule", "PolynomialDecayLRScheduleConfig"]


@dataclass
class PolynomialDecayLRScheduleConfig(FairseqDataclass):
    """Settings of `polynomial_decay`. `total_num_update` becomes `max_update` if it is not set."""

    warmup_updates: int = field(
        default=0,
        metadata={"help": "updates over which the rate rises linearly from 0", "minimum": 0},
    )
    force_anneal: int | None = field(
        default=None, metadata={"help": "first epoch that no longer takes its own --lr"}
    )
    end_learning_rate: float = field(default=0.0, metadata={"help": "rate at the end"})
    power: float = field(default=1.0, metadata={"help": "exponent of the decay"})
    total_num_update: float | None = field(
        default=None,
        metadata={"help": "update at which the end is reached (default: --max-update)"},
    )
    lr: list[float] = II("optimization.lr")
    max_update: int = field(default=II("optimization.max_update"), metadata={"extension": True})

    def __post_init__(self) -> None:
        if self.total_num_update is None and isinstance(self.max_update, int):
            self.total_num_update = float(self.max_update)


@LR_SCHEDULERS.register("polynomial_decay", dataclass=PolynomialDecayLRScheduleConfig)
class PolynomialDecayLRSchedule(FairseqLRScheduler):
    """lr * u / w for w updates, then (lr - end) * (1 - (u - w) / (total - w))^power + end.

    In epoch e the rate is entry min(e, n - 1), counted from 0, of the n values of `--lr`: epoch 1
    takes the second. With a warm-up the first update has rate 0.

    Raises:
        ValueError: neither `--total-num-update` nor `--max-update` is set.
    """

    def __init__(self, cfg: Any, optimizer: FairseqOptimizer) -> None:
        super().__init__(cfg, optimizer)
        if not cfg.total_num_update or cfg.total_num_update <= 0:
            raise ValueError(
                "--lr-scheduler polynomial_decay needs a positive --total-num-update or "
                f"--max-update, not {cfg.total_num_update}"
            )
        self.lr: float = cfg.lr[0]
        self.warmup_factor = 1.0 / cfg.warmup_updates if cfg.warmup_updates > 0 else 1.0
        self._set_lr(self.warmup_factor * self.lr)

    def step_begin_epoch(self, epoch: int) -> float:
        if self.cfg.force_anneal is None or epoch < self.cfg.force_anneal:
            self.lr = self.cfg.lr[min(epoch, len(self.cfg.lr) - 1)]
        else:
            self.lr = self.optimizer.get_lr()
        return self._set_lr(self.warmup_factor * self.lr)

    def step_update(self, num_updates: int) -> float:
        warmup, total = self.cfg.warmup_updates, self.cfg.total_num_update
        if warmup > 0 and num_updates <= warmup:
            self.warmup_factor = num_updates / float(warmup)
            return self._set_lr(self.warmup_factor * self.lr)
        end = self.cfg.end_learning_rate
        if num_updates >= total:
            return self._set_lr(end)
        remaining = 1 - (num_updates - warmup) / (total - warmup)
        return self._set_lr((self.lr - end) * remaining**self.cfg.power + end)
