import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fairseq.dataclass.arguments import fill_dataclass
from fairseq.optim import build_optimizer
from fairseq.optim.lr_scheduler import FairseqLRScheduler, build_lr_scheduler
from fairseq.registry import LR_SCHEDULERS

CHECKPOINTS = Path(__file__).parents[1] / "golden" / "invented" / "ckpt"


@pytest.fixture
def optimizer(optimizer_config):
    return build_optimizer(optimizer_config("sgd"), [nn.Parameter(torch.zeros(1))])


@pytest.fixture
def schedule(schedule_config, optimizer):
    """Returns a function: (name, **settings) -> schedule."""

    def make(name, **settings):
        return build_lr_scheduler(schedule_config(name, **settings), optimizer)

    return make


def rates(scheduler, updates):
    found = [scheduler.step_update(u) for u in updates]
    assert scheduler.optimizer.get_lr() == found[-1]
    return found


@pytest.mark.parametrize("run", ["wiki103_tiny", "gpt_tiny"])
def test_rates_of_the_original_runs(optimizer, run):
    stored = torch.load(CHECKPOINTS / run / "checkpoint_last.pt", weights_only=True)["cfg"]
    name = stored["lr_scheduler"]["_name"]
    values = argparse.Namespace(**stored["lr_scheduler"])
    scheduler = build_lr_scheduler(
        fill_dataclass(LR_SCHEDULERS.dataclass_of(name), values, name=name), optimizer
    )
    lines = (CHECKPOINTS / run / "curve.jsonl").read_text().splitlines()
    curve = [json.loads(line) for line in lines]
    assert len(curve) >= 60
    for record in curve:
        for key, u in (("lr_used", record["update"] - 1), ("lr_after", record["update"])):
            assert scheduler.step_update(u) == pytest.approx(record[key], rel=1e-12)


PUBLISHED_COSINE = {
    "lr": [1.0],
    "t_mult": 2.0,
    "lr_period_updates": 270000,
    "lr_shrink": 0.75,
    "warmup_updates": 16000,
    "warmup_init_lr": 1e-7,
    "min_lr": 0.0001,
    "max_update": 286000,
}
COSINE_TABLE = {
    0: 1e-07,
    1: 6.259999375e-05,
    100: 0.006250099375,
    8000: 0.50000005,
    15999: 0.99993750000625,
    16000: 1.0,
    16001: 0.999999999966157,
    151000: 0.50005,
    285999: 1.0000003384e-04,
    286000: 0.75,
    826000: 0.5625,
}


@pytest.mark.parametrize("u", COSINE_TABLE)
def test_cosine_with_the_published_settings(schedule, u):
    lr = schedule("cosine", **PUBLISHED_COSINE).step_update(u)
    assert lr == pytest.approx(COSINE_TABLE[u], rel=1e-11)


def test_cosine_without_restarts_takes_all_of_training(schedule):
    scheduler = schedule("cosine", lr=[1.0], min_lr=0.2, warmup_updates=2, max_update=12)
    # 2 updates of warm-up from --min-lr, then half a cosine over 10.
    assert rates(scheduler, [0, 1, 2, 7, 12]) == pytest.approx([0.2, 0.6, 1.0, 0.6, 0.1])


def test_cosine_with_equal_periods_shrinks(schedule):
    scheduler = schedule("cosine", lr=[1.0], lr_period_updates=4, lr_shrink=0.5)
    expected = [1.0, 0.5, 0.5, 0.25, 0.25]
    assert rates(scheduler, [0, 2, 4, 6, 8]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"lr": [0.1], "min_lr": 0.1, "lr_period_updates": 5}, "--lr .* --min-lr"),
        ({"lr": [0.1]}, "--lr-period-updates.*--max-update"),
        ({"lr": [0.1], "max_update": 5, "warmup_updates": 5}, "--warmup-updates"),
        ({"lr": [0.1], "lr_period_updates": 5, "t_mult": 0.0}, "--t-mult"),
    ],
)
def test_cosine_refuses_settings_without_a_curve(schedule, settings, flags):
    with pytest.raises(ValueError, match=flags):
        schedule("cosine", **settings)


def test_cosine_with_shrinking_periods_ends(schedule):
    scheduler = schedule("cosine", lr=[1.0], lr_period_updates=8, t_mult=0.5, lr_shrink=1.0)
    # Periods of 8, 4, 2 ... end before update 16.
    assert rates(scheduler, [0, 4, 8, 10, 12]) == pytest.approx([1.0, 0.5, 1.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="after 16 updates"):
        scheduler.step_update(16)


def test_inverse_sqrt(schedule):
    scheduler = schedule("inverse_sqrt", lr=[0.5], warmup_updates=4)
    expected = [0.0, 0.125, 0.375, 0.5, 0.25, 0.125]
    assert rates(scheduler, [0, 1, 3, 4, 16, 64]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="--warmup-updates"):
        schedule("inverse_sqrt", lr=[0.5], warmup_updates=0)


def test_polynomial_decay(schedule):
    scheduler = schedule(
        "polynomial_decay",
        lr=[1.0],
        warmup_updates=4,
        total_num_update=14,
        end_learning_rate=0.1,
        power=2.0,
    )
    expected = [0.0, 0.25, 1.0, 0.9 * 0.25 + 0.1, 0.1, 0.1]
    assert rates(scheduler, [0, 1, 4, 9, 14, 20]) == pytest.approx(expected)


def test_polynomial_decay_ends_with_training_by_default(schedule_config, schedule):
    assert schedule_config("polynomial_decay", max_update=30).total_num_update == 30.0
    assert (
        schedule_config("polynomial_decay", max_update=30, total_num_update=5).total_num_update == 5
    )
    scheduler = schedule("polynomial_decay", lr=[1.0], max_update=10)
    assert rates(scheduler, [0, 5, 10]) == [1.0, 0.5, 0.0]
    with pytest.raises(ValueError, match="--total-num-update"):
        schedule("polynomial_decay", max_update=0)


def test_polynomial_decay_takes_the_second_rate_in_epoch_1(schedule):
    scheduler = schedule("polynomial_decay", lr=[1.0, 0.5, 0.25], total_num_update=100)
    assert scheduler.optimizer.get_lr() == 1.0
    assert [scheduler.step_begin_epoch(e) for e in (1, 2, 3)] == [0.5, 0.25, 0.25]
    assert scheduler.step_update(50) == 0.125


def test_polynomial_decay_goes_on_from_the_present_rate_when_annealing(schedule):
    scheduler = schedule("polynomial_decay", lr=[1.0], total_num_update=100, force_anneal=2)
    scheduler.step_begin_epoch(1)
    scheduler.step_update(50)
    assert scheduler.step_begin_epoch(2) == 0.5
    assert scheduler.step_update(50) == 0.25


def test_fixed(schedule):
    scheduler = schedule("fixed", lr=[1.0, 0.5], warmup_updates=4, force_anneal=4, lr_shrink=0.1)
    assert scheduler.optimizer.get_lr() == 0.25
    assert rates(scheduler, [0, 1, 3, 4, 100]) == [0.25, 0.5, 1.0, 1.0, 1.0]
    found = [scheduler.step_begin_epoch(epoch) for epoch in (1, 2, 3, 4, 5)]
    assert found == pytest.approx([1.0, 0.5, 0.5, 0.05, 0.005])
    assert scheduler.state_dict() == {"lr": pytest.approx(0.005)}
    other = schedule("fixed", lr=[1.0])
    other.load_state_dict({"lr": 0.125})
    assert other.step_update(7) == 0.125


def test_plateau(schedule):
    scheduler = schedule(
        "reduce_lr_on_plateau", lr=[1.0], lr_shrink=0.5, lr_patience=1, warmup_updates=2
    )
    assert rates(scheduler, [0, 1, 2]) == [0.0, 0.5, 1.0]
    scheduler.step(1, 9.0)  # still warming up: not counted
    assert scheduler.step_update(3) == 1.0
    found = [scheduler.step(epoch, loss) for epoch, loss in enumerate([5.0, 4.0, 4.5, 4.4], 2)]
    assert found == [1.0, 1.0, 1.0, 0.5]
    assert scheduler.step_update(9) == 0.5
    assert scheduler.state_dict()["best"] == 4.0


def test_plateau_maximizes(schedule):
    scheduler = schedule(
        "reduce_lr_on_plateau", lr=[1.0], lr_shrink=0.5, maximize_best_checkpoint_metric=True
    )
    assert [scheduler.step(e, value) for e, value in ((1, 3.0), (2, 4.0), (3, 3.5))] == [1, 1, 0.5]


def test_plateau_resumes_its_patience(schedule):
    losses = [5.0, 5.0, 5.0, 5.0]
    whole = schedule("reduce_lr_on_plateau", lr=[1.0], lr_shrink=0.5, lr_patience=2)
    expected = [whole.step(epoch, loss) for epoch, loss in enumerate(losses, 1)]
    first = schedule("reduce_lr_on_plateau", lr=[1.0], lr_shrink=0.5, lr_patience=2)
    found = [first.step(epoch, loss) for epoch, loss in enumerate(losses[:2], 1)]
    second = schedule("reduce_lr_on_plateau", lr=[1.0], lr_shrink=0.5, lr_patience=2)
    second.load_state_dict(first.state_dict())
    found += [second.step(epoch, loss) for epoch, loss in enumerate(losses[2:], 3)]
    assert found == expected == [1.0, 1.0, 1.0, 0.5]
    second.load_state_dict({"best": 3.0})  # what the original stores may lack the counters
    assert second.state_dict()["num_bad_epochs"] == 0


def test_triangular(schedule):
    settings = {"lr": [0.1], "max_lr": 1.1, "lr_period_updates": 8, "lr_shrink": 0.5}
    scheduler = schedule("triangular", **settings)
    expected = [0.1, 0.35, 1.1, 0.35, 0.1, 0.1 + 0.45]
    assert rates(scheduler, [0, 1, 4, 7, 8, 12]) == pytest.approx(expected)
    shrinking = schedule("triangular", **settings, shrink_min=True)
    assert rates(shrinking, [8, 12]) == pytest.approx([0.05, 0.55])


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({}, "--max-lr"),
        ({"max_lr": 0.1}, "--max-lr"),
        ({"max_lr": 1, "lr_period_updates": 1}, "--lr-p"),
    ],
)
def test_triangular_refuses_settings_without_a_cycle(schedule, settings, flag):
    with pytest.raises(ValueError, match=flag):
        schedule("triangular", **settings)


def test_tri_stage(schedule):
    settings = {"lr": [1.0], "init_lr_scale": 0.2, "final_lr_scale": 0.01}
    scheduler = schedule("tri_stage", warmup_steps=4, hold_steps=3, decay_steps=2, **settings)
    expected = [0.2, 0.4, 1.0, 1.0, 1.0, 0.1, 0.01, 0.01]
    assert rates(scheduler, [0, 1, 4, 6, 7, 8, 9, 10]) == pytest.approx(expected)
    by_share = schedule("tri_stage", max_update=9, phase_ratio=[0.45, 0.34, 0.21], **settings)
    # int(4.05), int(3.06), int(1.89): decay takes one update.
    assert rates(by_share, [1, 4, 7, 8, 9]) == pytest.approx([0.4, 1.0, 1.0, 0.01, 0.01])


def test_tri_stage_without_decay(schedule):
    scheduler = schedule("tri_stage", lr=[1.0], warmup_steps=2)
    assert rates(scheduler, [0, 1, 2, 3]) == pytest.approx([0.01, 0.505, 1.0, 0.01])


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({}, "--warmup-steps"),
        ({"decay_steps": 5, "final_lr_scale": 0.0}, "--final-lr-scale"),
        ({"phase_ratio": [0.5, 0.4, 0.2], "max_update": 9}, "--phase-ratio"),
        ({"phase_ratio": [0.1, 0.4, 0.5]}, "--max-update"),
    ],
)
def test_tri_stage_refuses_settings_without_a_curve(schedule, settings, flag):
    with pytest.raises(ValueError, match=flag):
        schedule("tri_stage", **settings)


def test_manual(schedule):
    scheduler = schedule(
        "manual", epoch2lr="{1: 0.5, '3-4': 0.25, '6,8': 0.125}", update2lr="{10: 0.75, 20: 1}"
    )
    assert scheduler.optimizer.get_lr() == 0.5
    found = [scheduler.step_begin_epoch(epoch) for epoch in range(1, 10)]
    assert found == [0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125, 0.125, 0.125]
    assert rates(scheduler, [0, 9, 10, 19, 20]) == [0.125, 0.125, 0.75, 0.75, 1.0]
    assert schedule("manual", lr=[0.3]).step_update(5) == 0.3


@pytest.mark.parametrize("text", ["[1]", "{1: 'x'}", "__import__('os')", "{'a': 1}"])
def test_manual_reads_literals_only(schedule, text):
    with pytest.raises(ValueError, match="--update2lr"):
        schedule("manual", update2lr=text)


def test_pass_through(schedule, optimizer):
    with pytest.raises(ValueError, match="--lr-scheduler"):
        schedule("pass_through")
    optimizer.lr_scheduler = build_lr_scheduler(
        argparse.Namespace(
            lr_scheduler="inverse_sqrt", lr=[0.5], warmup_updates=4, warmup_init_lr=-1
        ),
        optimizer,
    )
    scheduler = schedule("pass_through")
    assert rates(scheduler, [2, 16]) == [0.25, 0.25]
    scheduler.step(1, 3.0)
    assert scheduler.state_dict() == {"best": 3.0}
    scheduler.load_state_dict({"best": 2.0})
    assert optimizer.lr_scheduler.best == 2.0


@pytest.mark.parametrize("name", ["cosine", "inverse_sqrt", "triangular", "tri_stage"])
def test_one_rate_only(schedule, name):
    with pytest.raises(ValueError, match=f"{name} takes one --lr"):
        schedule(name, lr=[0.1, 0.2])


def test_plateau_takes_one_rate_only(schedule):
    with pytest.raises(ValueError, match="takes one --lr"):
        schedule("reduce_lr_on_plateau", lr=[0.1, 0.2])


def test_best_is_the_lowest_loss(schedule):
    scheduler = schedule("inverse_sqrt")
    assert scheduler.state_dict() == {"best": None}
    for epoch, loss in enumerate([3.0, 2.0, None, 2.5], start=1):
        scheduler.step(epoch, loss)
    assert scheduler.state_dict() == {"best": 2.0}
    scheduler.load_state_dict({"best": 1.0})
    assert scheduler.best == 1.0


def test_contract(schedule_config):
    with pytest.raises(TypeError, match="FairseqOptimizer"):
        FairseqLRScheduler(schedule_config("fixed"), torch.optim.SGD([torch.zeros(1)], lr=0.1))
    with pytest.raises(ValueError, match="--lr-scheduler"):
        build_lr_scheduler(argparse.Namespace(lr_scheduler=None), None)


FIELDS = {
    "polynomial_decay": [
        "warmup_updates",
        "force_anneal",
        "end_learning_rate",
        "power",
        "total_num_update",
        "lr",
    ],
    "fixed": ["force_anneal", "lr_shrink", "warmup_updates", "lr"],
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_go_into_checkpoints(name):
    fields = LR_SCHEDULERS.dataclass_of(name).__dataclass_fields__.values()
    stored = [f.name for f in fields if not f.metadata.get("extension") and f.name != "_name"]
    assert stored == FIELDS[name]
