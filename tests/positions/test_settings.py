"""Which settings belong to which method, and what they may be."""

from __future__ import annotations

import dataclasses

import pytest
from formulas import make

from fairseq.positions import METHODS, PositionConfig, check_settings

FIELDS = {
    each.name: each
    for each in dataclasses.fields(PositionConfig)
    if each.name not in ("_name", "position_method", "train_length")
}
SOMETHING_ELSE = {
    "alibi_bias_max": 16.0,
    "alibi_learned_slopes": True,
    "alibi_interpolation": "linear",
    "alibi_interpolation_factor": 2.0,
    "alibi_train_length": 5,
    "rotary_base": 500.0,
    "rotary_scaling": "yarn",
    "rotary_scaling_factor": 2.0,
    "rotary_train_length": 5,
}


def test_every_setting_is_an_extension_and_has_an_owner():
    assert set(FIELDS) == set(SOMETHING_ELSE)
    owned = {name for method in METHODS.values() for name in method.settings}
    assert owned == set(FIELDS)
    for each in dataclasses.fields(PositionConfig):
        assert each.name == "_name" or each.metadata["extension"]


@pytest.mark.parametrize("name", SOMETHING_ELSE)
@pytest.mark.parametrize("method", METHODS)
def test_settings_of_other_methods_are_refused(method, name):
    cfg = PositionConfig(position_method=method, **{name: SOMETHING_ELSE[name]})
    if name in METHODS[method].settings:
        check_settings(cfg)
        return
    flag = "--" + name.replace("_", "-")
    owner = "alibi" if name.startswith("alibi") else "rotary"
    with pytest.raises(ValueError, match=rf"{flag} .*--position-method {method}; .* of {owner}"):
        check_settings(cfg)


@pytest.mark.parametrize("method", METHODS)
def test_defaults_belong_to_every_method(method):
    check_settings(PositionConfig(position_method=method))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("alibi", {"alibi_bias_max": 0.0}, "bias_max 0"),
        ("alibi-log", {"alibi_bias_max": -1.0}, "bias_max -1"),
        ("ggd", {"alibi_bias_max": -1.0}, "bias_max -1"),
        (
            "alibi",
            {"alibi_interpolation": "cubic"},
            "--alibi-interpolation is 'cubic'; it can be none, linear, ntk",
        ),
        ("alibi", {"alibi_interpolation": "linear"}, "give --alibi-train-length"),
        (
            "alibi",
            {"alibi_interpolation_factor": 2.0},
            "--alibi-interpolation-factor 2 needs --alibi-interpolation linear or ntk",
        ),
        (
            "alibi",
            {"alibi_interpolation": "linear", "alibi_interpolation_factor": 0.0},
            "--alibi-interpolation-factor is 0; it must be above 0",
        ),
        (
            "alibi",
            {"alibi_interpolation": "ntk", "alibi_interpolation_factor": float("nan")},
            "--alibi-interpolation-factor is nan",
        ),
        (
            "alibi",
            {"alibi_interpolation": "ntk", "alibi_train_length": 0},
            "--alibi-train-length is 0; it must be at least 1",
        ),
        ("rotary", {"rotary_scaling": "ntk"}, "give --rotary-train-length"),
        (
            "rotary",
            {"rotary_scaling": "yarn", "rotary_scaling_factor": 2.0},
            "--rotary-scaling yarn needs the training length.*--rotary-train-length",
        ),
        (
            "rotary",
            {"rotary_scaling": "linear", "rotary_scaling_factor": -1.0},
            "--rotary-scaling-factor is -1; it must be above 0",
        ),
        ("rotary", {"rotary_base": 0.0}, "--rotary-base is 0; it must be above 0"),
        ("xpos", {"rotary_base": -5.0}, "--rotary-base is -5; it must be above 0"),
        ("rotary", {"head_dim": 5}, "a head has 5.*--decoder-embed-dim"),
        ("xpos", {"head_dim": 7}, "a head has 7.*--decoder-attention-heads"),
    ],
)
def test_bad_input(method, settings, message):
    with pytest.raises(ValueError, match=message):
        make(method, **settings)
