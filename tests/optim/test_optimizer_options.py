"""From the command line to what is built."""

import pytest
import torch
from torch import nn

from fairseq.dataclass.arguments import CommandParser, fill_dataclass
from fairseq.dataclass.configs import CheckpointConfig, OptimizationConfig
from fairseq.optim import build_optimizer
from fairseq.optim.lr_scheduler import build_lr_scheduler
from fairseq.registry import LR_SCHEDULERS, OPTIMIZERS


def parse(registry, name, *argv):
    parser = CommandParser()
    for config in (OptimizationConfig, CheckpointConfig):
        parser.add_dataclass("section", config)
    config = registry.dataclass_of(name)
    parser.add_dataclass(name, config)
    args = parser.parse_args(argv)
    parser.refuse_unsupported(args)
    return fill_dataclass(config, args, name=name)


def built(name, *argv):
    return build_optimizer(parse(OPTIMIZERS, name, *argv), [nn.Parameter(torch.zeros(2))])


def scheduled(name, *argv):
    return build_lr_scheduler(parse(LR_SCHEDULERS, name, *argv), built("sgd"))


@pytest.mark.parametrize("flag", ["--wd", "--weight-decay"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_reaches_every_optimizer(name, flag):
    assert built(name, "--lr", "0.3", flag, "0.25").param_groups[0]["weight_decay"] == 0.25


GROUPS = [
    ("nag", [], {"lr": 0.25, "momentum": 0.99}),
    ("nag", ["--lr", "0.5,0.1", "--momentum", "0.9"], {"lr": 0.5, "momentum": 0.9}),
    ("adam", [], {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}),
    ("adam", ["--adam-betas", "(0.9,0.98)", "--adam-eps", "1e-6"], {"betas": (0.9, 0.98)}),
    ("adamax", ["--adamax-betas", "(0.8, 0.9)"], {"betas": (0.8, 0.9), "bias_correction": True}),
    ("adamax", ["--no-bias-correction"], {"bias_correction": False}),
    ("adafactor", [], {"eps": (1e-30, 1e-3), "beta1": None, "scale_parameter": False}),
    ("adafactor", ["--beta1", "0.9", "--scale-parameter"], {"beta1": 0.9, "scale_parameter": True}),
    ("adadelta", ["--adadelta-rho", "0.8"], {"rho": 0.8, "eps": 1e-6}),
]


@pytest.mark.parametrize(("name", "argv", "expected"), GROUPS)
def test_settings_reach_the_groups(name, argv, expected):
    group = built(name, *argv).param_groups[0]
    assert {key: group[key] for key in expected} == expected


def test_the_fused_kernel_can_be_switched_off():
    assert built("adam").optimizer.fused
    assert not built("adam", "--use-old-adam").optimizer.fused


def test_betas_stay_text_in_the_settings():
    assert parse(OPTIMIZERS, "adam", "--adam-betas", "(0.9,0.98)").adam_betas == "(0.9,0.98)"


def test_an_option_without_effect_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(OPTIMIZERS, "adadelta", "--anneal-eps")
    assert stop.value.code == 2
    assert "--anneal-eps is not supported" in capsys.readouterr().err


RATES = [
    ("fixed", ["--lr", "0.5", "--warmup-updates", "4"], 1, 0.25),
    ("inverse_sqrt", ["--lr", "0.5", "--warmup-updates", "4"], 16, 0.25),
    ("cosine", ["--lr", "1", "--max-update", "10"], 5, 0.5),
    ("polynomial_decay", ["--lr", "1", "--max-update", "10"], 5, 0.5),
    ("polynomial_decay", ["--lr", "1", "--max-update", "9", "--total-num-update", "20"], 5, 0.75),
    ("triangular", ["--lr", "0.5", "--max-lr", "1", "--lr-period-updates", "4"], 2, 1.0),
    ("tri_stage", ["--lr", "1", "--phase-ratio", "(0.5,0.3,0.2)", "--max-update", "10"], 10, 0.01),
    ("manual", ["--update2lr", "{3: 0.125}"], 4, 0.125),
    ("reduce_lr_on_plateau", ["--lr", "0.5", "--warmup-updates", "4"], 2, 0.25),
]


@pytest.mark.parametrize(("name", "argv", "updates", "rate"), RATES)
def test_settings_reach_the_schedules(name, argv, updates, rate):
    assert scheduled(name, *argv).step_update(updates) == pytest.approx(rate)


def test_triangular_asks_for_its_rate(capsys):
    with pytest.raises(SystemExit):
        scheduled("triangular", "--lr", "0.5")
    assert "--max-lr" in capsys.readouterr().err
