"""Several workers train as one process does with as many batches per update."""

import json
import re

import pytest
import torch
from train_runs import TINY_MODEL, TINY_TRAINING, make_tiny_data, train

# 7 batches an epoch, so that in its last update one of two workers has a real batch and then none.
BATCHES = "--tokens-per-sample 13 --max-tokens 52 --max-update 4"

PLAIN_MODEL = (
    "--task language_modeling --arch transformer_lm_gpt --decoder-layers 2 --decoder-embed-dim 32 "
    "--decoder-ffn-embed-dim 64 --decoder-attention-heads 4 --share-decoder-input-output-embed "
    "--dropout 0 --attention-dropout 0 --criterion cross_entropy"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def on_workers(monkeypatch, caplog, capsys, tmp_path, data):
    """Returns a function: (workers, options) -> update -> interim line of rank 0."""

    def run(workers, options, save_dir="several", model=TINY_MODEL):
        log = tmp_path / f"{save_dir}.{workers}.log"
        command = (
            f"{data} {model} {TINY_TRAINING} {BATCHES} --save-dir {tmp_path / save_dir} "
            f"--distributed-world-size {workers} --log-file {log} {options}"
        )
        code = train(monkeypatch, caplog, command).exit_code
        assert code == 0, capsys.readouterr().err
        found = re.findall(r"train_inner.*?(\{.*\})", log.read_text())
        return {int(line["num_updates"]): line for line in map(json.loads, found)}

    return run


@pytest.fixture
def alone(monkeypatch, caplog, tmp_path, data):
    """Returns a function: options -> update -> interim line of one process."""

    def run(options, save_dir="one", model=TINY_MODEL):
        command = (
            f"{data} {model} {TINY_TRAINING} {BATCHES} --save-dir {tmp_path / save_dir} {options}"
        )
        found = train(monkeypatch, caplog, command)
        assert found.exit_code == 0
        return {int(line["num_updates"]): line for line in found.json("train_inner")}

    return run


def assert_same_curve(ours, wanted, updates=None):
    assert list(ours) == list(updates or wanted)
    for update, line in ours.items():
        for key in ("loss", "gnorm"):
            near = pytest.approx(float(wanted[update][key]), abs=0.0011, rel=2e-4)
            assert float(line[key]) == near, (update, key)
        for key in ("wpb", "bsz", "lr", "num_updates", "clip"):
            assert line[key] == wanted[update][key], (update, key)


def weights(folder):
    return torch.load(folder / "checkpoint_last.pt", weights_only=True)


def assert_close_files(ours, wanted):
    assert list(ours["model"]) == list(wanted["model"])
    for name, tensor in wanted["model"].items():
        torch.testing.assert_close(ours["model"][name], tensor, atol=2e-5, rtol=1e-4)
    for index, state in wanted["last_optimizer_state"]["state"].items():
        for name, value in state.items():
            own = ours["last_optimizer_state"]["state"][index][name]
            torch.testing.assert_close(own, value, atol=2e-5, rtol=1e-3)


@pytest.mark.slow
def test_four_workers(on_workers, alone, tmp_path):
    several = on_workers(4, "--update-freq 1 --ddp-backend legacy_ddp")
    assert_same_curve(several, alone("--update-freq 4"))
    assert_close_files(weights(tmp_path / "several"), weights(tmp_path / "one"))


def test_shards_go_on_from_one_process_and_back(on_workers, alone, tmp_path):
    """Update 2, 4 and 6 end an epoch; there a position in the data fits any number of workers."""
    alone("--update-freq 4 --max-update 2", save_dir="both")
    one = alone("--update-freq 4 --max-update 6")
    options = "--ddp-backend fully_sharded --update-freq 2 --max-update 4"
    assert_same_curve(on_workers(2, options, "both"), one, range(3, 5))
    assert_same_curve(alone("--update-freq 4 --max-update 6", save_dir="both"), one, range(5, 7))
    assert_close_files(weights(tmp_path / "both"), weights(tmp_path / "one"))


def test_torch_ddp(on_workers, alone):
    options = "--max-update 3 --num-workers 0"
    several = on_workers(
        2,
        f"{options} --update-freq 1 --ddp-backend c10d --bucket-cap-mb 1 --gradient-as-bucket-view",
        model=PLAIN_MODEL,
    )
    assert_same_curve(several, alone(f"{options} --update-freq 2", model=PLAIN_MODEL))


@pytest.mark.slow
def test_shards_of_a_position_method_s_weights(on_workers, alone, tmp_path):
    """They are not in any layer, and every layer's gradients flow into them."""
    options = "--position-method fire --update-freq 2 --ddp-backend fully_sharded"
    several = on_workers(2, options, model=PLAIN_MODEL)
    assert_same_curve(several, alone("--position-method fire --update-freq 4", model=PLAIN_MODEL))
    assert_close_files(weights(tmp_path / "several"), weights(tmp_path / "one"))
