"""Models from checkpoints: what overrides change, what they do not, and what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from fairseq import checkpoint_utils
from fairseq.sequence_scorer import SequenceScorer

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "invented"
WIKI = str(GOLDEN / "ckpt" / "wiki103_tiny" / "checkpoint_last.pt")
GPT = str(GOLDEN / "ckpt" / "gpt_tiny" / "checkpoint_last.pt")
HERE = {"data": str(GOLDEN / "bin" / "main")}


def test_overrides_replace_a_name_in_every_section():
    state = checkpoint_utils.load_checkpoint_to_cpu(
        WIKI, {"max_tokens": 128, "tokens_per_sample": 96, "optimizer": {"momentum": 0.5}}
    )
    cfg = state["cfg"]
    assert (cfg.dataset.max_tokens, cfg.model.max_tokens) == (128, 128)
    assert (cfg.task.tokens_per_sample, cfg.model.tokens_per_sample) == (96, 96)
    assert cfg.optimizer.momentum == 0.5
    assert cfg.model.max_target_positions == 64


def test_the_training_length_is_kept_apart_from_overrides():
    state = checkpoint_utils.load_checkpoint_to_cpu(WIKI, {"tokens_per_sample": 96})
    assert state["alibi"]["train_length"] == 64
    assert state["alibi"]["position_method"] == "alibi"


def test_an_unknown_override_is_warned_of_with_its_nearest_names(caplog):
    checkpoint_utils.load_checkpoint_to_cpu(WIKI, {"max_target_position": 96})
    assert "max_target_positions" in caplog.text


def test_settings_in_flat_args_become_the_same_configuration(tmp_path):
    state = torch.load(GPT, weights_only=True)
    expected = checkpoint_utils.load_checkpoint_to_cpu(GPT)["cfg"]
    cfg = state.pop("cfg")
    flat = {k: v for section in cfg.values() for k, v in (section or {}).items() if k != "_name"}
    names = {key: cfg[key]["_name"] for key in ("criterion", "optimizer", "lr_scheduler", "task")}
    # As old versions wrote it: no train iterator, the rate a number, another name of the stop rate.
    flat.update(names, arch=cfg["model"]["_name"], lr=0.005, min_lr=-1.0)
    del flat["stop_min_lr"]
    state["args"] = argparse.Namespace(**flat)
    state["extra_state"] = {"epoch": 2, "batch_offset": 7}
    torch.save(state, tmp_path / "args.pt")
    loaded = checkpoint_utils.load_checkpoint_to_cpu(tmp_path / "args.pt")
    assert loaded["args"] is None
    # Building a model fills it in; in flat settings, model and task share the name.
    expected.model.max_target_positions = expected.task.max_target_positions
    assert loaded["extra_state"]["train_iterator"] == {"epoch": 2, "iterations_in_epoch": 7}
    for section in ("model", "task", "criterion", "optimizer", "lr_scheduler", "optimization"):
        assert getattr(loaded["cfg"], section) == getattr(expected, section), section


def _batch(task):
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    return dataset.collater([dataset[5], dataset[len(dataset) - 1]])


def test_an_ensemble_averages_the_models_probabilities():
    models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([WIKI, GPT], HERE)
    assert cfg.model._name == "transformer_lm_gpt"
    batch = _batch(task)
    scorer = SequenceScorer(task.target_dictionary)
    first, second = (scorer.score([model], batch).values.double().exp() for model in models)
    both = scorer.score(models, batch).values.double().exp()
    torch.testing.assert_close(both, (first + second) / 2, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("path", [WIKI, GPT], ids=["adaptive", "plain"])
@pytest.mark.parametrize("softmax_batch", [None, 3])
def test_target_scores_are_those_of_the_whole_distribution(path, softmax_batch):
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([path], HERE)
    batch = _batch(task)
    scores = SequenceScorer(task.target_dictionary, softmax_batch).score([model], batch)
    model.eval()
    with torch.no_grad():
        whole = model.get_normalized_probs(model(**batch["net_input"]), log_probs=True)
    is_word = batch["target"].ne(1)
    expected = whole.double().gather(2, batch["target"][..., None]).squeeze(2)[is_word]
    torch.testing.assert_close(scores.values.double(), expected, rtol=0, atol=2e-5)
    sums = whole.double().exp().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=2e-6)


def test_a_task_may_be_given(monkeypatch):
    monkeypatch.chdir(GOLDEN)
    _, cfg, task = checkpoint_utils.load_model_ensemble_and_task([WIKI])
    models, _ = checkpoint_utils.load_model_ensemble([WIKI], task=task)
    assert task.args.data == cfg.task.data == "bin/main"
    assert not any(parameter.is_cuda for parameter in models[0].parameters())


def test_a_suffix_is_part_of_the_name():
    with pytest.raises(FileNotFoundError, match=r"checkpoint_last-x\.pt"):
        checkpoint_utils.load_model_ensemble_and_task([WIKI], suffix="-x")


def test_what_is_not_one_whole_file_is_refused():
    with pytest.raises(ValueError, match="--checkpoint-shard-count 2 is not supported"):
        checkpoint_utils.load_model_ensemble_and_task([WIKI], num_shards=2)
    with pytest.raises(ValueError, match="no checkpoint is named"):
        checkpoint_utils.load_model_ensemble_and_task([])


def test_a_dictionary_without_model_is_no_checkpoint(tmp_path):
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no entry 'model', only weights"):
        checkpoint_utils.load_checkpoint_to_cpu(tmp_path / "other.pt")


def test_an_architecture_that_is_not_known_is_named_with_the_file(tmp_path):
    state = torch.load(GPT, weights_only=True)
    state["cfg"]["model"]["_name"] = "fconv_lm"
    torch.save(state, tmp_path / "conv.pt")
    with pytest.raises(ValueError, match=r"conv\.pt: settings in the checkpoint: .*fconv_lm"):
        checkpoint_utils.load_checkpoint_to_cpu(tmp_path / "conv.pt")


def test_the_moving_average_in_place_of_the_parameters(tmp_path):
    state = torch.load(GPT, weights_only=True)
    with pytest.raises(ValueError, match="holds no moving average"):
        checkpoint_utils.load_ema_from_checkpoint(GPT)
    name = "decoder.layer_norm.bias"
    state["extra_state"]["ema"] = {name: torch.full((48,), 3.0)}
    torch.save(state, tmp_path / "ema.pt")
    model = checkpoint_utils.load_ema_from_checkpoint(tmp_path / "ema.pt")["model"]
    assert model[name].unique().tolist() == [3.0]
    assert torch.equal(
        model["decoder.layer_norm.weight"], state["model"]["decoder.layer_norm.weight"]
    )
