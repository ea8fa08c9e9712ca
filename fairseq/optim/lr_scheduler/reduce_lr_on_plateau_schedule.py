"""A rate that shrinks when the validation loss stops improving."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from fairseq.dataclass import II, FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import FairseqLRScheduler, single_lr
from fairseq.registry import LR_SCHEDULERS

__all__ = ["ReduceLROnPlateauLRSchedule", "ReduceLROnPlateauLRScheduleConfig"]


@dataclass
class ReduceLROnPlateauLRScheduleConfig(FairseqDataclass):
    """Settings of `reduce_lr_on_plateau`."""

    lr_shrink: float = field(default=0.1, metadata={"help": "factor of a reduction"})
    lr_threshold: float = field(
        default=1e-4, metadata={"help": "relative change that counts as improvement"}
    )
    lr_patience: int = field(
        default=0, metadata={"help": "epochs without improvement that are waited for", "minimum": 0}
    )
    warmup_updates: int = field(
        default=0, metadata={"help": "updates over which the rate rises linearly", "minimum": 0}
    )
    warmup_init_lr: float = field(
        default=-1, metadata={"help": "rate before the first update (negative: 0, or --lr)"}
    )
    lr: list[float] = II("optimization.lr")
    maximize_best_checkpoint_metric: bool = II("checkpoint.maximize_best_checkpoint_metric")


@LR_SCHEDULERS.register("reduce_lr_on_plateau", dataclass=ReduceLROnPlateauLRScheduleConfig)
class ReduceLROnPlateauLRSchedule(FairseqLRScheduler):
    """torch's ReduceLROnPlateau on the validation metric of each epoch, after a linear warm-up.

    Raises:
        ValueError: `--lr` has several values.
    """

    def __init__(self, cfg: Any, optimizer: FairseqOptimizer) -> None:
        super().__init__(cfg, optimizer)
        self.peak_lr = single_lr(cfg, "reduce_lr_on_plateau")
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer.optimizer,
            mode="max" if cfg.maximize_best_checkpoint_metric else "min",
            factor=cfg.lr_shrink,
            patience=cfg.lr_patience,
            threshold=cfg.lr_threshold,
        )
        init_lr = 0.0 if cfg.warmup_updates > 0 else self.peak_lr
        self.warmup_init_lr = cfg.warmup_init_lr if cfg.warmup_init_lr >= 0 else init_lr
        self.is_warm = cfg.warmup_updates <= 0
        self._set_lr(self.warmup_init_lr)

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.plateau.best,
            "last_epoch": self.plateau.last_epoch,
            "num_bad_epochs": self.plateau.num_bad_epochs,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state; that of the original has no count of epochs without improvement."""
        self.plateau.best = state_dict["best"]
        self.plateau.last_epoch = state_dict.get("last_epoch", self.plateau.last_epoch)
        self.plateau.num_bad_epochs = state_dict.get("num_bad_epochs", 0)

    def step(self, epoch: int, val_loss: float | None = None) -> float:
        if val_loss is not None and self.is_warm:
            self.plateau.step(val_loss)
        else:
            self.plateau.last_epoch = epoch
        return self.optimizer.get_lr()

    def step_update(self, num_updates: int) -> float:
        warmup = self.cfg.warmup_updates
        if warmup > 0 and num_updates <= warmup:
            slope = (self.peak_lr - self.warmup_init_lr) / warmup
            self._set_lr(self.warmup_init_lr + num_updates * slope)
        else:
            self.is_warm = True
        return self.optimizer.get_lr()
