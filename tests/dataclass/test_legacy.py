"""The configuration in a checkpoint, and back."""

import argparse
import logging
import shlex
from pathlib import Path

import pytest
import torch

from fairseq import options
from fairseq.dataclass.legacy import (
    apply_overrides,
    config_from_dict,
    config_to_dict,
    extension_fields,
    namespace_to_config,
)
from fairseq.dataclass.settings_file import resolved_settings, write_resolved_settings

GOLDEN = Path(__file__).parent.parent / "golden/invented/ckpt"
RUNS = ("gpt_tiny", "wiki103_tiny")


def command_of(run):
    text = (GOLDEN / run / "COMMAND.txt").read_text().splitlines()[0]
    return shlex.split(text.replace("(0.9,0.98)", "'(0.9,0.98)'"))[1:]


def parsed(run, *more):
    parser = options.get_training_parser()
    return options.parse_args_and_arch(parser, [*command_of(run), *more])


@pytest.fixture(params=RUNS)
def stored(request):
    return torch.load(GOLDEN / request.param / "checkpoint_last.pt", weights_only=True)["cfg"]


def same(ours, theirs, path=""):
    """Yields where two nested dictionaries differ, order of keys included."""
    if isinstance(theirs, dict):
        if list(ours) != list(theirs):
            yield f"{path}: {list(ours)} for {list(theirs)}"
        for key in theirs:
            yield from same(ours.get(key), theirs[key], f"{path}.{key}")
    elif ours != theirs or type(ours) is not type(theirs):
        yield f"{path}: {ours!r} for {theirs!r}"


@pytest.mark.parametrize("run", RUNS)
def test_a_command_gives_the_configuration_that_the_original_stored(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    ours = config_to_dict(namespace_to_config(parsed(run)))
    theirs = torch.load(GOLDEN / run / "checkpoint_last.pt", weights_only=True)["cfg"]
    # Building the model sets this one from tokens_per_sample.
    ours["model"]["max_target_positions"] = theirs["model"]["max_target_positions"]
    # The original's default lies in a temporary folder whose name the golden data leave out.
    for section in ("common", "task"):
        ours[section]["plasma_path"] = theirs[section]["plasma_path"]
    assert list(same(ours, theirs)) == []


def test_a_stored_configuration_survives(stored):
    assert list(same(config_to_dict(config_from_dict(stored)), stored)) == []


def test_extension_fields_are_kept_apart_and_come_back():
    config = namespace_to_config(parsed("gpt_tiny", "--store-ema", "--position-method", "none"))
    extensions = extension_fields(config)
    assert extensions["ema"]["store_ema"] is True
    assert extensions["model"]["position_method"] == "none"
    plain = config_to_dict(config)
    assert "ema" not in plain and "position_method" not in plain["model"]
    again = config_from_dict(plain, extensions)
    assert again.ema.store_ema and again.model.position_method == "none"


def test_settings_of_other_versions_are_named(stored, caplog):
    stored["model"].update(scale_attn=True, scale_fc=False)
    with caplog.at_level(logging.WARNING):
        config_from_dict(stored)
    assert "scale_attn" in caplog.text and "scale_fc" not in caplog.text


def test_an_args_namespace_is_cut_into_sections():
    args = parsed("gpt_tiny")
    config = namespace_to_config(argparse.Namespace(**vars(args)))
    assert config.model.decoder_attention_heads == 6
    assert config.model.activation_fn == "gelu"
    assert config.optimizer.lr == [0.005]
    assert config.task.data == "bin/main"


def test_overrides_reach_every_section_that_has_the_field(stored, caplog):
    config = config_from_dict(stored)
    unknown = apply_overrides(
        config, {"tokens_per_sample": 96, "max_tokens": "1024", "dropuot": 0.1, "task": {"seed": 5}}
    )
    assert (config.model.tokens_per_sample, config.task.tokens_per_sample) == (96, 96)
    assert (config.model.max_tokens, config.dataset.max_tokens) == (1024, 1024)
    assert (config.task.seed, config.common.seed) == (5, stored["common"]["seed"])
    assert unknown == ["dropuot"] and "'dropuot'" in caplog.text and "dropout" in caplog.text


def test_resolved_settings_repeat_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    first = namespace_to_config(parsed("wiki103_tiny"))
    path = tmp_path / "config.yaml"
    write_resolved_settings(first, path)
    parser = options.get_training_parser()
    second = namespace_to_config(options.parse_args_and_arch(parser, ["--config", str(path)]))
    assert second == first
    parser = options.get_training_parser()
    third = options.parse_args_and_arch(parser, ["--config", str(path), "other", "--lr", "0.5"])
    assert (third.data, third.lr) == ("other", [0.5])
    assert resolved_settings(first)["arch"] == "transformer_lm_wiki103"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning-rate: 1", "sets 'learning_rate', which is no option here"),
        ("- a\n- b", "holds no mapping"),
        ("a: [", "is not a YAML file"),
        ("lr: fast", "'fast' is not a number"),
    ],
)
def test_wrong_settings_files_are_named(content, message, tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        arguments = ["data", "--arch", "transformer_lm", "--task", "language_modeling"]
        options.parse_args_and_arch(
            options.get_training_parser(), [*arguments, "--config", str(path)]
        )
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
