"""What a metric is made of: averages, rates, stopwatches.

The states are plain dictionaries and go into checkpoints; class and key names are the original's.
"""

from __future__ import annotations

import bisect
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

__all__ = ["AverageMeter", "Meter", "MetersDict", "StopwatchMeter", "TimeMeter", "safe_round"]


def _number(value: Any) -> Any:
    """Returns the number in a one-element tensor or array; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def safe_round(value: Any, digits: int | None) -> Any:
    """Rounds numbers and one-element tensors; returns anything else, and all for None digits."""
    if digits is None:
        return value
    value = _number(value)
    return round(value, digits) if isinstance(value, (int, float)) else value


class Meter:
    """Something that is updated and has a value worth printing."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` restores."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the meter."""

    def reset(self) -> None:
        """Starts over."""
        raise NotImplementedError

    @property
    def smoothed_value(self) -> Any:
        """The value to print."""
        raise NotImplementedError


class AverageMeter(Meter):
    """A weighted average; with weights of 0 only, the latest value."""

    def __init__(self, round: int | None = None) -> None:
        self.round = round
        self.reset()

    def reset(self) -> None:
        self.val: Any = None
        self.sum: Any = 0
        self.count: Any = 0

    def update(self, val: Any, n: Any = 1) -> None:
        """Adds a value with weight n."""
        if val is None:
            return
        self.val = val
        if _number(n) > 0:
            self.sum = self.sum + val * n
            self.count = self.count + n

    @property
    def avg(self) -> Any:
        """The average so far."""
        return self.sum / self.count if _number(self.count) > 0 else self.val

    @property
    def smoothed_value(self) -> Any:
        return safe_round(self.avg, self.round)

    def state_dict(self) -> dict[str, Any]:
        return {"val": self.val, "sum": self.sum, "count": self.count, "round": self.round}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.val, self.sum, self.count = state["val"], state["sum"], state["count"]
        self.round = state.get("round")


class TimeMeter(Meter):
    """Events per second since the meter started.

    Args:
        init: seconds that count as elapsed from the start.
        n: events that count as seen from the start.
        round: digits to print.
    """

    def __init__(self, init: float = 0, n: float = 0, round: int | None = None) -> None:
        self.round = round
        self.reset(init, n)

    def reset(self, init: float = 0, n: float = 0) -> None:
        self.init = init
        self.n = n
        self.started_at = time.perf_counter()
        self.i = 0

    def update(self, val: Any = 1) -> None:
        """Counts `val` events."""
        self.n = self.n + val
        self.i += 1

    @property
    def elapsed_time(self) -> float:
        """Seconds since the start, those of an earlier run included."""
        return self.init + (time.perf_counter() - self.started_at)

    @property
    def avg(self) -> Any:
        """Events per second."""
        return self.n / self.elapsed_time

    @property
    def smoothed_value(self) -> Any:
        return safe_round(self.avg, self.round)

    def state_dict(self) -> dict[str, Any]:
        return {"init": self.elapsed_time, "n": self.n, "round": self.round}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Time that passes between saving and loading does not count.
        self.reset(init=state.get("init", state.get("start", 0)), n=state["n"])
        self.round = state.get("round")


class StopwatchMeter(Meter):
    """Seconds between starts and stops."""

    def __init__(self, round: int | None = None) -> None:
        self.round = round
        self.sum: float = 0
        self.n: float = 0
        self.started_at: float | None = None

    def start(self) -> None:
        """Starts the watch."""
        self.started_at = time.perf_counter()

    def stop(self, n: float = 1, prehook: Callable[[], Any] | None = None) -> None:
        """Stops the watch and counts n events; `prehook` runs first (to wait for a device)."""
        if self.started_at is None:
            return
        if prehook is not None:
            prehook()
        self.sum += time.perf_counter() - self.started_at
        self.n = self.n + n

    def reset(self) -> None:
        self.sum = 0
        self.n = 0
        self.start()

    @property
    def avg(self) -> float:
        """Seconds per event; the sum without events."""
        return self.sum / self.n if _number(self.n) > 0 else self.sum

    @property
    def elapsed_time(self) -> float:
        """Seconds since the last start; 0 if there was none."""
        return 0.0 if self.started_at is None else time.perf_counter() - self.started_at

    @property
    def smoothed_value(self) -> Any:
        # A watch that was never stopped shows how long it has been running.
        return safe_round(self.avg if self.sum > 0 else self.elapsed_time, self.round)

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum, "n": self.n, "round": self.round}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sum, self.n = state["sum"], state["n"]
        self.started_at = None
        self.round = state.get("round")


_CLASSES = {cls.__name__: cls for cls in (AverageMeter, TimeMeter, StopwatchMeter)}


class MetersDict(OrderedDict[str, Meter]):
    """Meters by name, in ascending order of priority, then of addition."""

    def __init__(self) -> None:
        super().__init__()
        self._order: list[tuple[int, int, str]] = []

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("use add_meter(key, meter, priority)")

    def add_meter(self, key: str, meter: Meter, priority: int) -> None:
        """Adds a meter.

        Raises:
            ValueError: there is one of that name.
        """
        if key in self:
            raise ValueError(f"there is a meter {key!r} already")
        bisect.insort(self._order, (priority, len(self._order), key))
        super().__setitem__(key, meter)
        for _, _, name in self._order:
            self.move_to_end(name)

    def reset(self) -> None:
        """Resets every meter but the derived ones."""
        for meter in self.values():
            if not isinstance(meter, MetersDict._DerivedMeter):
                meter.reset()

    def get_smoothed_value(self, key: str) -> Any:
        """Returns one value to print."""
        meter = self[key]
        if isinstance(meter, MetersDict._DerivedMeter):
            return meter.fn(self)
        return meter.smoothed_value

    def get_smoothed_values(self) -> OrderedDict[str, Any]:
        """Returns name -> value to print; names that start with an underscore are hidden."""
        return OrderedDict(
            (key, self.get_smoothed_value(key)) for key in self if not key.startswith("_")
        )

    def state_dict(self) -> list[tuple[int, str, str, dict[str, Any]]]:
        """Returns (priority, name, class name, state) of every meter that is not derived."""
        return [
            (priority, key, type(self[key]).__name__, self[key].state_dict())
            for priority, _, key in self._order
            if not isinstance(self[key], MetersDict._DerivedMeter)
        ]

    def load_state_dict(self, state: list[tuple[int, str, str, dict[str, Any]]]) -> None:
        """Replaces all meters by stored ones."""
        self.clear()
        self._order.clear()
        for priority, key, class_name, meter_state in state:
            meter = _CLASSES[class_name]()
            meter.load_state_dict(meter_state)
            self.add_meter(key, meter, priority)

    class _DerivedMeter(Meter):
        """A value computed from other meters."""

        def __init__(self, fn: Callable[[MetersDict], Any]) -> None:
            self.fn = fn

        def reset(self) -> None:
            pass
