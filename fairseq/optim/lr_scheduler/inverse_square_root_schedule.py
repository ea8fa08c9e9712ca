"""Decay with the inverse square root of the number of updates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass import II, FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import FairseqLRScheduler, single_lr
from fairseq.registry import LR_SCHEDULERS

__all__ = ["InverseSquareRootLRScheduleConfig", "InverseSquareRootSchedule"]


@dataclass
class InverseSquareRootLRScheduleConfig(FairseqDataclass):
    """Settings of `inverse_sqrt`."""

    warmup_updates: int = field(
        default=4000, metadata={"help": "updates over which the rate rises linearly", "minimum": 0}
    )
    warmup_init_lr: float = field(
        default=-1, metadata={"help": "rate before the first update (negative: 0)"}
    )
    lr: list[float] = II("optimization.lr")


@LR_SCHEDULERS.register("inverse_sqrt", dataclass=InverseSquareRootLRScheduleConfig)
class InverseSquareRootSchedule(FairseqLRScheduler):
    """A linear warm-up to `--lr`, then lr * sqrt(warmup / updates) (Vaswani et al. 2017, 5.3).

    Without `--warmup-init-lr` the first update has rate 0.

    Raises:
        ValueError: `--lr` has several values, or there is no warm-up.
    """

    def __init__(self, cfg: Any, optimizer: FairseqOptimizer) -> None:
        super().__init__(cfg, optimizer)
        self.lr = single_lr(cfg, "inverse_sqrt")
        if cfg.warmup_updates <= 0:
            raise ValueError(
                "--lr-scheduler inverse_sqrt needs --warmup-updates of at least 1, not "
                f"{cfg.warmup_updates}: --lr is the rate at the end of the warm-up"
            )
        self.warmup_init_lr = max(cfg.warmup_init_lr, 0.0)
        self.slope = (self.lr - self.warmup_init_lr) / cfg.warmup_updates
        self.decay_factor = self.lr * cfg.warmup_updates**0.5
        self._set_lr(self.warmup_init_lr)

    def step_update(self, num_updates: int) -> float:
        if num_updates < self.cfg.warmup_updates:
            return self._set_lr(self.warmup_init_lr + num_updates * self.slope)
        return self._set_lr(self.decay_factor * num_updates**-0.5)
