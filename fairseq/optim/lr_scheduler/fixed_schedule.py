"""A rate for each epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass import II, FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import FairseqLRScheduler
from fairseq.registry import LR_SCHEDULERS

__all__ = ["FixedLRSchedule", "FixedLRScheduleConfig"]


@dataclass
class FixedLRScheduleConfig(FairseqDataclass):
    """Settings of `fixed`."""

    force_anneal: int | None = field(
        default=None, metadata={"help": "first epoch whose rate is shrunk (default: none)"}
    )
    lr_shrink: float = field(default=0.1, metadata={"help": "factor for each epoch of annealing"})
    warmup_updates: int = field(
        default=0, metadata={"help": "updates over which the rate rises linearly", "minimum": 0}
    )
    lr: list[float] = II("optimization.lr")


@LR_SCHEDULERS.register("fixed", dataclass=FixedLRScheduleConfig)
class FixedLRSchedule(FairseqLRScheduler):
    """One `--lr` for each epoch, the last for all that follow, after a linear warm-up.

    From epoch `--force-anneal` on the last rate is multiplied by `--lr-shrink` for each epoch.
    """

    def __init__(self, cfg: Any, optimizer: FairseqOptimizer) -> None:
        super().__init__(cfg, optimizer)
        self.lr: float = cfg.lr[0]
        self.warmup_factor = 1.0 / cfg.warmup_updates if cfg.warmup_updates > 0 else 1.0
        self._set_lr(self.warmup_factor * self.lr)

    def state_dict(self) -> dict[str, Any]:
        return {"lr": self.lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lr = state_dict.get("lr", self.lr)

    def step_begin_epoch(self, epoch: int) -> float:
        self.lr = self._lr_of(epoch)
        return self._set_lr(self.warmup_factor * self.lr)

    def _lr_of(self, epoch: int) -> float:
        rates, anneal = self.cfg.lr, self.cfg.force_anneal
        if anneal is None or epoch < anneal:
            rate: float = rates[min(epoch - 1, len(rates) - 1)]
            return rate
        annealed: float = rates[-1] * self.cfg.lr_shrink ** (epoch + 1 - anneal)
        return annealed

    def step_update(self, num_updates: int) -> float:
        warmup = self.cfg.warmup_updates
        self.warmup_factor = (num_updates + 1) / warmup if num_updates < warmup else 1.0
        return self._set_lr(self.warmup_factor * self.lr)
