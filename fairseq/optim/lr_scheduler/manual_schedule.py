"""Rates written out for epochs and updates."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Any

from fairseq.dataclass import II, FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler.fairseq_lr_scheduler import FairseqLRScheduler
from fairseq.registry import LR_SCHEDULERS

__all__ = ["ManualSchedule", "ManualScheduleConfig"]


@dataclass
class ManualScheduleConfig(FairseqDataclass):
    """Settings of `manual`."""

    epoch2lr: str = field(
        default="{}",
        metadata={"help": "rate from an epoch on, as in \"{1: 0.1, '2-4': 0.05, '5,6': 0.01}\""},
    )
    update2lr: str = field(
        default="{}", metadata={"help": "rate from an update on, written likewise; it goes first"}
    )
    lr: list[float] = II("optimization.lr")


@LR_SCHEDULERS.register("manual", dataclass=ManualScheduleConfig)
class ManualSchedule(FairseqLRScheduler):
    """The rate of the latest epoch listed, unless an update is listed by then; at first `--lr`.

    Raises:
        ValueError: a table is no dictionary of numbers.
    """

    def __init__(self, cfg: Any, optimizer: FairseqOptimizer) -> None:
        super().__init__(cfg, optimizer)
        self.epoch2lr = parse_table(cfg.epoch2lr, "--epoch2lr")
        self.update2lr = parse_table(cfg.update2lr, "--update2lr")
        self.lr: float = self.epoch2lr.get(1, self.update2lr.get(1, cfg.lr[0]))
        self._set_lr(self.lr)

    def state_dict(self) -> dict[str, Any]:
        return {"lr": self.lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lr = state_dict.get("lr", self.lr)

    def step_begin_epoch(self, epoch: int) -> float:
        self.lr = _latest(self.epoch2lr, epoch, self.optimizer.get_lr())
        return self._set_lr(self.lr)

    def step_update(self, num_updates: int) -> float:
        return self._set_lr(_latest(self.update2lr, num_updates, self.lr))


def _latest(table: dict[int, float], count: int, default: float) -> float:
    """Returns the entry of the largest key that `count` has reached."""
    reached = [key for key in table if key <= count]
    return table[max(reached)] if reached else default


def parse_table(text: str | dict[Any, float], flag: str) -> dict[int, float]:
    """Reads a dictionary literal with keys n, "a-b" (both included) or "a,b".

    Raises:
        ValueError: it is something else; the message names `flag`.
    """
    try:
        table = ast.literal_eval(text) if isinstance(text, str) else text
        return {n: float(lr) for key, lr in table.items() for n in _numbers(key)}
    except (ValueError, SyntaxError, AttributeError, TypeError):
        raise ValueError(
            f"{flag}: {text!r} is not a dictionary such as \"{{1: 0.1, '2-4': 0.05}}\""
        ) from None


def _numbers(key: int | str) -> list[int]:
    if isinstance(key, int):
        return [key]
    if "-" in key:
        first, last = key.split("-")
        return list(range(int(first), int(last) + 1))
    return [int(number) for number in key.split(",")]
