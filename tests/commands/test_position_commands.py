"""Every position method from training through the checkpoint to evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from eval_runs import evaluate, fails
from train_runs import TINY_MODEL, TINY_TRAINING, make_tiny_data, train

from fairseq.checkpoint_utils import load_checkpoint_to_cpu
from fairseq.positions import METHODS

COMMAND = f"{TINY_MODEL} {TINY_TRAINING} --max-update 6 --no-epoch-checkpoints"
WEIGHTS = {
    "t5": {"buckets"},
    "kerple-log": {"log_r1", "log_r2"},
    "kerple-power": {"log_r1", "r2_logits"},
    "fire": {
        "c", "threshold_factor", "first_threshold",
        "hidden.weight", "hidden.bias", "output.weight", "output.bias",
    },
    "ggd": {"log_widths", "log_shapes"},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def run_training(monkeypatch, caplog, tmp_path, data):
    def run(options, folder=None):
        command = f"{data} --save-dir {folder or tmp_path} {COMMAND} {options}"
        return train(monkeypatch, caplog, command)

    return run


@pytest.fixture
def run(monkeypatch, caplog, tmp_path, data):
    def run(options, folder=None):
        path = f"{folder or tmp_path}/checkpoint_last.pt"
        return evaluate(monkeypatch, caplog, f"{data} --path {path} --gen-subset valid {options}")

    return run


def stored_in(folder):
    return torch.load(folder / "checkpoint_last.pt", weights_only=True)


@pytest.mark.parametrize("method", METHODS)
def test_from_training_to_evaluation(run_training, run, tmp_path, method):
    found = run_training(f"--position-method {method}")
    assert found.exit_code == 0, found.text()
    assert f"position method: {method}" in found.messages("fairseq_cli.train")
    curve = found.curve()
    assert curve[6]["loss"] < curve[1]["loss"] - 0.2

    state = stored_in(tmp_path)
    assert state["alibi"]["position_method"] == method
    assert state["alibi"]["train_length"] == 16
    prefix = "decoder.positions."
    names = {n.removeprefix(prefix) for n in state["model"] if n.startswith(prefix)}
    assert names == WEIGHTS.get(method, set())
    assert "rotary_base" not in state["cfg"]["model"]

    known = run("--tokens-per-sample 16")
    named = run(f"--tokens-per-sample 16 --position-method {method}")
    assert known.loss == named.loss
    assert any(m.startswith(f"position method: {method} (recorded") for m in known.log)

    if method == "learned":
        with pytest.raises(ValueError, match="longer than the 16 positions"):
            run("--tokens-per-sample 64")
    else:
        assert math.isfinite(run("--tokens-per-sample 64").loss)


@pytest.mark.parametrize("method", ["t5", "fire", "alibi --alibi-learned-slopes"])
def test_a_run_that_is_resumed_equals_one_that_is_not(run_training, tmp_path, method):
    option = f"--position-method {method} --optimizer adam --lr 0.01"
    whole = run_training(option, tmp_path / "whole").curve()
    run_training(f"{option} --max-update 3", tmp_path / "parts")
    parts = run_training(option, tmp_path / "parts").curve()
    assert parts[6]["loss"] == whole[6]["loss"]
    first, second = (stored_in(tmp_path / each)["model"] for each in ("whole", "parts"))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ggd", "--fp16 --cpu-half --fp16-init-scale 4 --store-ema --ema-decay 0.9"),
        ("fire", "--bf16 --cpu-half"),
        ("t5", "--memory-efficient-fp16 --cpu-half --fp16-init-scale 4"),
        ("kerple-log", "--optimizer adafactor --lr 0.01"),
        ("kerple-power", "--optimizer sgd --lr 0.1 --checkpoint-activations"),
    ],
)
def test_wrappers_train_the_weights(run_training, run, tmp_path, method, options):
    found = run_training(f"--position-method {method} {options}")
    assert found.exit_code == 0, found.text()
    state = stored_in(tmp_path)
    moved = {
        name.removeprefix("decoder.positions."): tensor
        for name, tensor in state["model"].items()
        if name.startswith("decoder.positions.")
    }
    assert set(moved) == WEIGHTS[method]
    for name, tensor in moved.items():
        assert tensor.dtype == torch.float32 and torch.isfinite(tensor).all()
        if name in ("log_widths", "log_shapes"):
            assert tensor.abs().max() > 0  # where they start
    if "--store-ema" in options:
        assert {f"decoder.positions.{name}" for name in moved} <= set(state["extra_state"]["ema"])
    assert math.isfinite(run("--tokens-per-sample 32").loss)


# ---- settings ----


def test_settings_are_recorded_and_taken_from_the_checkpoint(run_training, run, tmp_path):
    run_training("--alibi-bias-max 3 --alibi-learned-slopes")
    record = stored_in(tmp_path)["alibi"]
    assert (record["slope_rule"], record["bias_max"]) == ("interleave", 3.0)
    recorded, same = run(""), run("--alibi-bias-max 3")
    assert recorded.loss == same.loss != run("--alibi-bias-max 8").loss
    state = load_checkpoint_to_cpu(tmp_path / "checkpoint_last.pt")
    assert state["cfg"].model.alibi_bias_max == 3.0
    assert state["cfg"].model.alibi_learned_slopes is True
    assert "decoder.positions.slope_log_factors" in state["model"]


def test_methods_without_slopes_record_none(run_training, tmp_path):
    run_training("--position-method rotary --rotary-base 500")
    record = stored_in(tmp_path)["alibi"]
    assert "slope_rule" not in record and "bias_max" not in record
    assert record["extensions"]["model"]["rotary_base"] == 500.0


def test_a_rule_for_slopes_that_is_not_known(run_training, run, tmp_path):
    run_training("--max-update 1")
    state = stored_in(tmp_path)
    state["alibi"]["slope_rule"] = "plain"
    torch.save(state, tmp_path / "checkpoint_last.pt")
    with pytest.raises(ValueError, match="slopes by the rule 'plain', which is not known here"):
        run("")


def test_another_method_forgets_the_settings_of_the_stored_one(run_training, run):
    run_training("--alibi-bias-max 3")
    assert math.isfinite(run("--position-method none").loss)
    with pytest.raises(ValueError, match=r"--alibi-bias-max does not belong to .*none"):
        run("--position-method none --alibi-bias-max 4")


def test_going_on_with_other_settings(run_training, tmp_path):
    run_training("--alibi-bias-max 8 --max-update 1")
    found = run_training("--alibi-bias-max 16")
    assert found.exit_code == 1
    found = run_training(
        f"--alibi-bias-max 16 --finetune-from-model {tmp_path}/checkpoint_last.pt",
        tmp_path / "tuned",
    )
    assert found.exit_code == 0
    assert "--alibi-bias-max 8.0 became 16.0" in found.text()


# ---- interpolation ----


def test_interpolation_at_evaluation(run_training, run, tmp_path):
    """A length 4 times that of training divides slopes by 4, as a fixed factor does."""
    run_training("--max-update 3")
    plain = run("--tokens-per-sample 64")
    linear = run("--tokens-per-sample 64 --alibi-interpolation linear")
    assert linear.loss != plain.loss
    fixed = "--alibi-interpolation linear --alibi-interpolation-factor"
    assert linear.loss == run(f"--tokens-per-sample 64 {fixed} 4").loss
    by_hand = "--alibi-interpolation linear --alibi-train-length 32"
    assert (
        run(f"--tokens-per-sample 64 {by_hand}").loss
        == run(f"--tokens-per-sample 64 {fixed} 2").loss
    )
    assert run("--tokens-per-sample 64 --alibi-interpolation ntk").loss not in (
        plain.loss,
        linear.loss,
    )
    # Up to the training length nothing happens.
    for kind in ("linear", "ntk"):
        short = run(f"--tokens-per-sample 16 --alibi-interpolation {kind}")
        assert short.loss == run("--tokens-per-sample 16").loss


def test_overrides_do_not_move_the_training_length(run_training, run):
    run_training("--max-update 1")
    overrides = (
        "--model-overrides \"{'max_tokens':64,'tokens_per_sample':64,'max_target_positions':64}\""
    )
    for kind in ("linear", "ntk"):
        options = f"--tokens-per-sample 64 --alibi-interpolation {kind}"
        assert run(f"{options} {overrides}").loss == run(options).loss


@pytest.mark.parametrize(
    "options",
    [
        "--alibi-interpolation linear",
        "--rotary-scaling yarn",
    ],
)
def test_the_factor_is_that_of_the_window_whatever_the_batch(run_training, run, options):
    """The last window of the split is shorter, and shares its batch with others or does not."""
    method = "rotary" if "rotary" in options else "alibi"
    run_training(f"--position-method {method} --max-update 3")
    for window in ("--tokens-per-sample 48", "--tokens-per-sample 48 --context-window 40"):
        together = run(f"{window} {options} --max-tokens 2000")
        alone = run(f"{window} {options} --max-tokens 48 --max-sentences 1")
        assert together.loss == pytest.approx(alone.loss, abs=1e-6)
        assert together.loss != run(f"{window} --max-tokens 2000").loss


def test_tuning_with_a_fixed_factor(run_training, run, tmp_path):
    run_training("--max-update 2")
    options = "--alibi-interpolation linear --alibi-interpolation-factor 2 --tokens-per-sample 32"
    path = tmp_path / "checkpoint_last.pt"
    tuned = tmp_path / "tuned"
    found = run_training(f"{options} --finetune-from-model {path} --max-update 2", tuned)
    assert found.exit_code == 0
    assert stored_in(tuned)["alibi"]["train_length"] == 32
    stored = run("--tokens-per-sample 32", tuned)
    assert stored.loss == run(f"{options}", tuned).loss
    assert stored.loss != run("--tokens-per-sample 32 --alibi-interpolation-factor 1", tuned).loss


# ---- bad input ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--position-method rotery", "unknown method 'rotery'; known are rotary, "),
        ("--position-method rotary --alibi-bias-max 4", "--alibi-bias-max does not belong to"),
        ("--rotary-scaling ntk", "--rotary-scaling does not belong to --position-method alibi"),
        ("--alibi-interpolation-factor 2", "needs --alibi-interpolation linear or ntk"),
        (
            "--alibi-interpolation linear --alibi-interpolation-factor -2",
            "--alibi-interpolation-factor",
        ),
        ("--alibi-bias-max 0", "bias"),
        ("--position-method rotary --rotary-base 0", "--rotary-base"),
        ("--position-method rotary --decoder-attention-heads 32", "a head has 1"),
    ],
)
def test_training_that_cannot_be(run_training, capsys, options, message):
    found = run_training(options)
    assert found.exit_code in (1, 2)
    assert message in capsys.readouterr().err + found.text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--position-method kerple", "unknown method 'kerple'; known are kerple-log"),
        ("--rotary-scaling linear", "--rotary-scaling does not belong to --position-method alibi"),
        ("--alibi-interpolation cubic", "cubic"),
        ("--alibi-interpolation linear --alibi-train-length 0", "--alibi-train-length"),
    ],
)
def test_evaluations_that_cannot_be(
    run_training, monkeypatch, capsys, data, tmp_path, options, message
):
    run_training("--max-update 1")
    code, printed = fails(
        monkeypatch, capsys, f"{data} --path {tmp_path}/checkpoint_last.pt {options}"
    )
    assert code in (1, 2) and message in printed
