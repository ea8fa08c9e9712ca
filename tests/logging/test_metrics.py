"""Averages, rates and stopwatches, and who receives what is logged."""

import time

import pytest
import torch

from fairseq.logging import metrics
from fairseq.logging.meters import AverageMeter, MetersDict, StopwatchMeter, TimeMeter


@pytest.fixture(autouse=True)
def clean():
    metrics.reset()
    yield
    metrics.reset()


def test_average_is_weighted_and_weight_zero_keeps_the_latest():
    meter = AverageMeter(round=3)
    meter.update(1.0, 3)
    meter.update(2.0, 1)
    assert meter.smoothed_value == 1.25
    latest = AverageMeter()
    latest.update(5, 0)
    latest.update(7, 0)
    assert latest.avg == 7
    tensors = AverageMeter(round=2)
    tensors.update(torch.tensor(1.0))
    tensors.update(torch.tensor(2.5))
    assert tensors.smoothed_value == 1.75


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the clock shows, as the one number of a list; they stand still."""
    seconds = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    return seconds


def test_states_survive(clock):
    average, rate, watch = AverageMeter(3), TimeMeter(round=1), StopwatchMeter(0)
    average.update(2, 5)
    rate.update(100)
    watch.start()
    clock[0] += 3
    watch.stop(2)
    for meter in (average, rate, watch):
        again = type(meter)()
        again.load_state_dict(meter.state_dict())
        assert again.round == meter.round
        assert again.state_dict() == meter.state_dict()


def test_rate_counts_time_before_and_after_a_pause_only(clock):
    rate = TimeMeter()
    rate.update(10)
    clock[0] += 2
    state = rate.state_dict()
    clock[0] += 50
    again = TimeMeter()
    again.load_state_dict(state)
    clock[0] += 3
    assert (again.elapsed_time, again.avg) == (5, 2)


def test_a_restored_stopwatch_runs_on_when_it_is_started():
    watch = StopwatchMeter(round=0)
    watch.load_state_dict({"sum": 12.0, "n": 0.0, "round": 0})
    assert watch.smoothed_value == 12
    watch.start()
    watch.stop(0)
    assert watch.sum >= 12


def test_order_is_by_priority_then_addition():
    meters = MetersDict()
    for name, priority in (("c", 20), ("a", 10), ("d", 20), ("_hidden", 1), ("b", 10)):
        meters.add_meter(name, AverageMeter(), priority)
        meters[name].update(1)
    assert list(meters.get_smoothed_values()) == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="already"):
        meters.add_meter("a", AverageMeter(), 1)


def test_nested_aggregators_and_new_roots():
    with metrics.aggregate("outer"):
        metrics.log_scalar("loss", 1)
        with metrics.aggregate("inner"):
            metrics.log_scalar("loss", 3)
        with metrics.aggregate("apart", new_root=True):
            metrics.log_scalar("loss", 100)
    metrics.log_scalar("loss", 5)
    assert metrics.get_smoothed_value("outer", "loss") == 2
    assert metrics.get_smoothed_value("inner", "loss") == 3
    assert metrics.get_smoothed_value("apart", "loss") == 100
    assert metrics.get_smoothed_value("default", "loss") == 3


def test_an_aggregator_that_fails_is_closed():
    with pytest.raises(RuntimeError), metrics.aggregate("broken"):
        raise RuntimeError
    metrics.log_scalar("loss", 1)
    assert metrics.get_meter("broken", "loss") is None


def test_derived_values_and_resets():
    with metrics.aggregate("train"):
        metrics.log_scalar("loss", 3)
        metrics.log_derived("ppl", lambda meters: 2 ** meters["loss"].avg)
    assert metrics.get_smoothed_values("train") == {"loss": 3, "ppl": 8}
    metrics.reset_meters("train")
    with metrics.aggregate("train"):
        metrics.log_scalar("loss", 1)
    assert metrics.get_smoothed_value("train", "ppl") == 2


def test_the_first_event_of_a_rate_only_starts_the_clock():
    with metrics.aggregate("train"):
        metrics.log_speed("wps", 1000)
        assert metrics.get_meter("train", "wps").n == 0
        metrics.log_speed("wps", 50)
        assert metrics.get_meter("train", "wps").n == 50
    metrics.reset_meters("train")
    with metrics.aggregate("train"):
        metrics.log_speed("wps", 70)
    assert metrics.get_meter("train", "wps").n == 70


def test_the_state_of_all_aggregators_survives():
    with metrics.aggregate("train"):
        metrics.log_scalar("loss", 2.5, weight=4, round=3)
        metrics.log_derived("ppl", lambda meters: 0)
    state = metrics.state_dict()
    assert [entry[:3] for entry in state["train"]] == [(10, "loss", "AverageMeter")]
    metrics.reset()
    metrics.load_state_dict(state)
    assert metrics.get_smoothed_value("train", "loss") == 2.5
