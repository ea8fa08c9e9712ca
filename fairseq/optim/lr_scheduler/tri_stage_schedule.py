"""Rise, hold, exponential decay."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass import II, FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import FairseqLRScheduler, single_lr
from fairseq.registry import LR_SCHEDULERS

__all__ = ["TriStageLRSchedule", "TriStageLRScheduleConfig"]


@dataclass
class TriStageLRScheduleConfig(FairseqDataclass):
    """Settings of `tri_stage`."""

    warmup_steps: int = field(
        default=0, metadata={"help": "updates of the linear rise", "minimum": 0}
    )
    hold_steps: int = field(default=0, metadata={"help": "updates at --lr", "minimum": 0})
    decay_steps: int = field(
        default=0, metadata={"help": "updates of the exponential decay", "minimum": 0}
    )
    phase_ratio: list[float] | None = field(
        default=None,
        metadata={"help": "shares of --max-update for the three, as in (0.1, 0.4, 0.5), instead"},
    )
    init_lr_scale: float = field(default=0.01, metadata={"help": "first rate, relative to --lr"})
    final_lr_scale: float = field(default=0.01, metadata={"help": "last rate, relative to --lr"})
    max_update: float = II("optimization.max_update")
    lr: list[float] = II("optimization.lr")


@LR_SCHEDULERS.register("tri_stage", dataclass=TriStageLRScheduleConfig)
class TriStageLRSchedule(FairseqLRScheduler):
    """A linear rise to `--lr`, a plateau, an exponential decay (Park et al. 2019, SpecAugment).

    Raises:
        ValueError: `--lr` has several values, no stage has any updates, or a scale or the shares
            are out of range.
    """

    def __init__(self, cfg: Any, optimizer: FairseqOptimizer) -> None:
        super().__init__(cfg, optimizer)
        self.peak_lr = single_lr(cfg, "tri_stage")
        self.init_lr = cfg.init_lr_scale * self.peak_lr
        self.final_lr = cfg.final_lr_scale * self.peak_lr
        self.warmup_steps, self.hold_steps, self.decay_steps = _stages(cfg)
        if self.warmup_steps + self.hold_steps + self.decay_steps <= 0:
            raise ValueError(
                "--lr-scheduler tri_stage needs --warmup-steps, --hold-steps or --decay-steps, or "
                "--phase-ratio"
            )
        if cfg.final_lr_scale <= 0:
            raise ValueError(f"--final-lr-scale must be positive, not {cfg.final_lr_scale}")
        self._set_lr(self.init_lr)

    def step_update(self, num_updates: int) -> float:
        n = num_updates
        if n < self.warmup_steps:
            slope = (self.peak_lr - self.init_lr) / self.warmup_steps
            return self._set_lr(self.init_lr + slope * n)
        n -= self.warmup_steps
        if n < self.hold_steps:
            return self._set_lr(self.peak_lr)
        n -= self.hold_steps
        if n <= self.decay_steps:
            rate = -math.log(self.cfg.final_lr_scale) / max(1, self.decay_steps)
            return self._set_lr(self.peak_lr * math.exp(-rate * n))
        return self._set_lr(self.final_lr)


def _stages(cfg: Any) -> tuple[int, int, int]:
    """Returns the updates of the three stages."""
    if cfg.phase_ratio is None:
        return cfg.warmup_steps, cfg.hold_steps, cfg.decay_steps
    shares = list(cfg.phase_ratio)
    if len(shares) != 3 or not math.isclose(sum(shares), 1.0):
        raise ValueError(f"--phase-ratio takes three shares that sum to 1, not {shares}")
    if not cfg.max_update or cfg.max_update <= 0:
        raise ValueError("--phase-ratio needs --max-update")
    warmup, hold, decay = (int(cfg.max_update * share) for share in shares)
    return warmup, hold, decay
