"""k updates, a checkpoint, and k more are 2k updates to the last bit."""

import pytest
import torch
from train_runs import (
    TINY_MODEL,
    TINY_TRAINING,
    make_tiny_data,
    same_bits,
    train,
    without_times,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory.mktemp("data"))


def load(folder, name="checkpoint_last.pt"):
    return torch.load(folder / name, weights_only=True)


def same_lines(ours, wanted):
    return list(map(without_times, ours)) == list(map(without_times, wanted))


SETTINGS = {
    # An epoch has 3 updates of 2 batches: the first cut is mid-epoch, the second at its end.
    "mid-epoch": (4, 8, "--dropout 0.3 --attention-dropout 0.1"),
    "end of epoch": (6, 9, "--dropout 0.3"),
    "adam": (4, 6, "--optimizer adam --lr 0.01 --dropout 0.1"),
    "interim average": (4, 8, "--dropout 0.3 --log-interval 3"),
    "fp16": (5, 8, "--fp16 --cpu-half --fp16-scale-window 3 --dropout 0.1"),
    "bf16": (4, 6, "--bf16 --cpu-half --dropout 0.1"),
    "moving average": (4, 6, "--store-ema --ema-decay 0.9 --ema-fp32"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resume_is_exact(monkeypatch, caplog, tmp_path, data, name):
    cut, end, options = SETTINGS[name]
    base = f"{data} {TINY_MODEL} {TINY_TRAINING} {options} --save-dir"
    whole = train(monkeypatch, caplog, f"{base} {tmp_path}/whole --max-update {end}")
    first = train(monkeypatch, caplog, f"{base} {tmp_path}/parts --max-update {cut}")
    second = train(monkeypatch, caplog, f"{base} {tmp_path}/parts --max-update {end}")
    assert (whole.exit_code, first.exit_code, second.exit_code) == (0, 0, 0)
    assert first.ids + second.ids == whole.ids

    ours, wanted = load(tmp_path / "parts"), load(tmp_path / "whole")
    for part in ("model", "last_optimizer_state"):
        assert same_bits(ours[part], wanted[part])
    for part in ("fp32_masters", "loss_scaler"):
        assert same_bits(ours["alibi"].get(part), wanted["alibi"].get(part))
    assert same_bits(ours["extra_state"].get("ema"), wanted["extra_state"].get("ema"))
    assert len(ours["optimizer_history"]) == 2
    assert ours["extra_state"]["train_iterator"] == wanted["extra_state"]["train_iterator"]

    updates = [int(line["num_updates"]) for line in second.json("train_inner")]
    after = [line for line in whole.json("train_inner") if int(line["num_updates"]) > cut]
    assert updates == [int(line["num_updates"]) for line in after]
    assert same_lines(second.json("train_inner"), after)
    # Epoch averages too, also of the epoch that was cut.
    lines = second.json("train")
    assert same_lines(lines, whole.json("train")[-len(lines) :])
    assert same_lines(second.json("valid")[-1:], whole.json("valid")[-1:])
