"""A schedule that the optimizer brings along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairseq.dataclass import FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import FairseqLRScheduler
from fairseq.registry import LR_SCHEDULERS

__all__ = ["PassThroughSchedule", "PassThroughScheduleConfig"]


@dataclass
class PassThroughScheduleConfig(FairseqDataclass):
    """Settings of `pass_through`: none."""


@LR_SCHEDULERS.register("pass_through", dataclass=PassThroughScheduleConfig)
class PassThroughSchedule(FairseqLRScheduler):
    """Hands every call to `optimizer.lr_scheduler`.

    Raises:
        ValueError: the optimizer has no schedule of its own; those of this project have none, it
            takes a plug-in.
    """

    def __init__(self, cfg: Any, optimizer: FairseqOptimizer) -> None:
        super().__init__(cfg, optimizer)
        self.inner: Any = getattr(optimizer, "lr_scheduler", None)
        if self.inner is None:
            raise ValueError(
                "--lr-scheduler pass_through needs an optimizer with a schedule of its own (an "
                f"attribute lr_scheduler), which {type(optimizer).__name__} is not; choose another "
                "--lr-scheduler"
            )

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.inner.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)

    def step_begin_epoch(self, epoch: int) -> Any:
        return self.inner.step_begin_epoch(epoch)

    def step(self, epoch: int, val_loss: float | None = None) -> Any:
        return self.inner.step(epoch, val_loss)

    def step_update(self, num_updates: int) -> Any:
        return self.inner.step_update(num_updates)
