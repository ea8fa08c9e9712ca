"""SIGTERM and SIGINT: the run saves after its update, ends, and goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from train_runs import GOLDEN, TINY_MODEL, TINY_TRAINING, make_tiny_data, processes_below, same_bits

UPDATES = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory.mktemp("data"))


def command(data, folder, *more):
    line = (
        f"{sys.executable} -m fairseq_cli.train {data} {TINY_MODEL} {TINY_TRAINING} --dropout 0.1 "
        f"--save-dir {folder} --max-update {UPDATES} --disable-validation --no-epoch-checkpoints"
    )
    return [*line.split(), *more]


def train_to_the_end(data, folder):
    """Returns what it saved."""
    subprocess.run(command(data, folder), check=True, capture_output=True)
    return torch.load(folder / "checkpoint_last.pt", weights_only=True)


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return


def signalled(process, number, after="train_inner"):
    """Sends the signal when the log has a line with some text; returns exit code and stderr."""
    wait_for(process, after)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    return process.returncode, errors


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    return train_to_the_end(data, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_run_saves_ends_and_goes_on(start_process, number, code, data, uninterrupted, tmp_path):
    ended, errors = signalled(start_process(command(data, tmp_path)), number)
    assert ended == code
    assert f"{signal.Signals(number).name}: saving after this update" in errors
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    assert 1 <= state["optimizer_history"][-1]["num_updates"] < UPDATES
    resumed = train_to_the_end(data, tmp_path)
    assert same_bits(resumed["model"], uninterrupted["model"])
    assert same_bits(resumed["last_optimizer_state"], uninterrupted["last_optimizer_state"])


def test_a_second_signal_ends_at_once(start_process, data, tmp_path):
    # The first signal waits for the validation to end, which here takes for ever.
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time\nfrom fairseq_cli import train\n"
        "def validate(*args):\n    print('validating', flush=True)\n    time.sleep(120)\n"
        "train.validate = validate\ntrain.cli_main()\n"
    )
    line = f"{data} {TINY_MODEL} {TINY_TRAINING} --save-dir {tmp_path}/ckpt"
    process = start_process(
        [sys.executable, slow, *line.split(), "--validate-interval-updates", "2"]
    )
    wait_for(process, "validating")
    process.send_signal(signal.SIGTERM)
    first = process.stderr.readline()
    assert first.startswith("SIGTERM: saving after this update")
    process.send_signal(signal.SIGTERM)  # belongs to the first one
    time.sleep(1.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in errors
    assert not (tmp_path / "ckpt/checkpoint_last.pt").exists()


def test_loaders_of_data_end_with_it(start_process, data, tmp_path):
    process = start_process(command(data, tmp_path, "--num-workers", "2"))
    code, _ = signalled(process, signal.SIGTERM)
    assert code == 143
    assert (tmp_path / "checkpoint_last.pt").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loaders_obey_nobody_but_the_training(start_process, tmp_path):
    """Who signals a whole group, as `timeout`, torchrun and scancel do, means the training."""
    more = ["--num-workers", "2", "--max-update", "400"]  # its first epoch is long
    process = start_process(command(GOLDEN / "bin" / "main", tmp_path, *more))
    wait_for(process, "train_inner")
    loaders = processes_below(process.pid)
    assert len(loaders) == 2
    for loader in loaders:
        os.kill(loader, signal.SIGTERM)
    for _ in range(30):  # more than loaders have ready
        wait_for(process, "train_inner")
    assert processes_below(process.pid) == loaders
    process.send_signal(signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    assert process.returncode == 143
    assert (tmp_path / "checkpoint_last.pt").exists()
