"""Metrics by name, logged from anywhere, gathered by whoever asks.

Values go to every active aggregator: the one called "default" always, and those that a
`with aggregate(name):` block around the call has opened. `new_root=True` shields the outer ones.
"""

from __future__ import annotations

import contextlib
import uuid
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from fairseq.logging.meters import AverageMeter, Meter, MetersDict, StopwatchMeter, TimeMeter

__all__ = [
    "aggregate",
    "get_active_aggregators",
    "get_meter",
    "get_meters",
    "get_smoothed_value",
    "get_smoothed_values",
    "load_state_dict",
    "log_custom",
    "log_derived",
    "log_scalar",
    "log_speed",
    "log_start_time",
    "log_stop_time",
    "reset",
    "reset_meter",
    "reset_meters",
    "state_dict",
]

_aggregators: OrderedDict[str, MetersDict] = OrderedDict()
_active: OrderedDict[str, MetersDict] = OrderedDict()
_active_count: defaultdict[str, int] = defaultdict(int)


def reset() -> None:
    """Forgets everything that was logged."""
    _aggregators.clear()
    _active.clear()
    _active_count.clear()
    _aggregators["default"] = MetersDict()
    _active["default"] = _aggregators["default"]
    _active_count["default"] = 1


@contextlib.contextmanager
def aggregate(name: str | None = None, new_root: bool = False) -> Iterator[MetersDict]:
    """Collects what is logged inside the block.

    Args:
        name: aggregators of one name share their meters; None makes a temporary one.
        new_root: nothing inside reaches the aggregators that are active outside.
    """
    if name is None:
        name = str(uuid.uuid4())
        aggregator = MetersDict()
    else:
        if name == "default":
            raise ValueError('"default" is always active')
        aggregator = _aggregators.setdefault(name, MetersDict())
    if new_root:
        outer, outer_count = _active.copy(), _active_count.copy()
        _active.clear()
        _active_count.clear()
    _active[name] = aggregator
    _active_count[name] += 1
    try:
        yield aggregator
    finally:
        _active_count[name] -= 1
        if _active_count[name] == 0:
            _active.pop(name, None)
        if new_root:
            _active.clear()
            _active.update(outer)
            _active_count.clear()
            _active_count.update(outer_count)


def get_active_aggregators() -> list[MetersDict]:
    """Returns the aggregators that receive what is logged now."""
    return list(_active.values())


def _meter(aggregator: MetersDict, key: str, make: Callable[[], Meter], priority: int) -> Any:
    if key not in aggregator:
        aggregator.add_meter(key, make(), priority)
    return aggregator[key]


def log_scalar(
    key: str, value: Any, weight: Any = 1, priority: int = 10, round: int | None = None
) -> None:
    """Logs a value that is averaged with its weight; weight 0 keeps the latest value.

    Args:
        key: name of the metric.
        value: a number or one-element tensor.
        weight: weight in the average.
        priority: smaller ones are printed first.
        round: digits to print.
    """
    for aggregator in get_active_aggregators():
        _meter(aggregator, key, lambda: AverageMeter(round=round), priority).update(value, weight)


def log_derived(key: str, fn: Callable[[MetersDict], Any], priority: int = 20) -> None:
    """Logs a value computed from the other meters when it is printed."""
    for aggregator in get_active_aggregators():
        _meter(aggregator, key, lambda: MetersDict._DerivedMeter(fn), priority)


def log_speed(key: str, value: Any, priority: int = 30, round: int | None = None) -> None:
    """Counts events for a rate per second. The first call only starts the clock."""
    for aggregator in get_active_aggregators():
        if key not in aggregator:
            aggregator.add_meter(key, TimeMeter(round=round), priority)
        else:
            _meter(aggregator, key, TimeMeter, priority).update(value)


def log_start_time(key: str, priority: int = 40, round: int | None = None) -> None:
    """Starts a stopwatch."""
    for aggregator in get_active_aggregators():
        _meter(aggregator, key, lambda: StopwatchMeter(round=round), priority).start()


def log_stop_time(key: str, weight: float = 0.0, prehook: Callable[[], Any] | None = None) -> None:
    """Stops a stopwatch where there is one."""
    for aggregator in get_active_aggregators():
        if key in aggregator:
            meter = aggregator[key]
            assert isinstance(meter, StopwatchMeter)
            meter.stop(weight, prehook)


def log_custom(
    new_meter_fn: Callable[[], Any], key: str, *args: Any, priority: int = 50, **kwargs: Any
) -> None:
    """Logs to a meter of one's own."""
    for aggregator in get_active_aggregators():
        _meter(aggregator, key, new_meter_fn, priority).update(*args, **kwargs)


def reset_meter(name: str, key: str) -> None:
    """Resets one meter if it exists."""
    meter = get_meter(name, key)
    if meter is not None:
        meter.reset()


def reset_meters(name: str) -> None:
    """Resets the meters of an aggregator."""
    meters = get_meters(name)
    if meters is not None:
        meters.reset()


def get_meter(name: str, key: str) -> Any:
    """Returns a meter, None if there is none of that name."""
    return _aggregators[name].get(key) if name in _aggregators else None


def get_meters(name: str) -> MetersDict | None:
    """Returns an aggregator's meters, None if there is none of that name."""
    return _aggregators.get(name)


def get_smoothed_value(name: str, key: str) -> Any:
    """Returns one value to print."""
    return _aggregators[name].get_smoothed_value(key)


def get_smoothed_values(name: str) -> OrderedDict[str, Any]:
    """Returns name -> value to print of an aggregator."""
    return _aggregators[name].get_smoothed_values()


def state_dict() -> OrderedDict[str, Any]:
    """Returns the state of all named aggregators, for a checkpoint."""
    return OrderedDict((name, agg.state_dict()) for name, agg in _aggregators.items())


def load_state_dict(state: dict[str, Any]) -> None:
    """Restores all named aggregators."""
    for name, aggregator_state in state.items():
        _aggregators.setdefault(name, MetersDict()).load_state_dict(aggregator_state)


reset()
