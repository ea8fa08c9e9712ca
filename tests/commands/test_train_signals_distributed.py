"""SIGTERM and SIGINT with several processes: they save together after the same update."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest
import torch
from train_runs import TINY_TRAINING, make_tiny_data, processes_below, same_bits

UPDATES = 40
MODEL = (
    "--task language_modeling --arch transformer_lm_gpt --decoder-layers 2 --decoder-embed-dim 32 "
    "--decoder-ffn-embed-dim 64 --decoder-attention-heads 4 --share-decoder-input-output-embed "
    "--dropout 0.1 --criterion cross_entropy"
)
SPAWN = [sys.executable, "-c", "from fairseq_cli.train import cli_main; cli_main()"]
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run"),
    *("--standalone", "--nproc-per-node", "2", "-m", "fairseq_cli.train"),
]
WAYS = {"spawn": SPAWN, "torchrun": TORCHRUN}
DATA_PARALLEL = {
    "legacy_ddp": "--ddp-backend legacy_ddp",
    "c10d": "--ddp-backend c10d",
    "fsdp2": "--data-parallel fsdp2",
    "tensor parallel": "--tensor-parallel-size 2",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def start(start_process):
    """Starts a training of two processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return lambda *settings: start_process(command(*settings), env=environment)


def command(way, parallel, data, folder, *more):
    line = (
        f"{data} {MODEL} {TINY_TRAINING} --update-freq 1 --save-dir {folder} "
        f"--max-update {UPDATES} --validate-interval 1000 --no-epoch-checkpoints "
        f"{DATA_PARALLEL[parallel]}"
    )
    world = ["--distributed-world-size", "2"] if way == "spawn" else []
    return [*WAYS[way], *line.split(), *world, *more]


def wait_for(process, text="train_inner"):
    for line in process.stdout:
        if text in line:
            return


def finished(process):
    """Returns the exit code and stderr of a process."""
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def updates_in(folder):
    state = torch.load(folder / "checkpoint_last.pt", weights_only=True)
    return state["optimizer_history"][-1]["num_updates"]


@pytest.mark.slow
def test_they_save_end_and_go_on(start, data, tmp_path):
    """torchrun passes the signal on to both."""
    whole, process = (
        start("torchrun", "fsdp2", data, tmp_path / run) for run in ("whole", "asked")
    )
    wait_for(process)
    process.send_signal(signal.SIGTERM)
    code, errors = finished(process)
    # torchrun itself ends with 1, and says which signal it was.
    assert code == 1
    assert "SIGTERM: saving after this update" in errors
    assert 1 <= updates_in(tmp_path / "asked") < UPDATES
    assert finished(start("torchrun", "fsdp2", data, tmp_path / "asked"))[0] == 0
    assert finished(whole)[0] == 0
    states = [
        torch.load(tmp_path / run / "checkpoint_last.pt", weights_only=True)
        for run in ("whole", "asked")
    ]
    for key in ("model", "last_optimizer_state"):
        assert same_bits(states[0][key], states[1][key])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_process_that_started_them_passes_it_on(start, number, code, data, tmp_path):
    process = start("spawn", "c10d", data, tmp_path)
    wait_for(process)
    process.send_signal(number)
    ended, errors = finished(process)
    assert ended == code
    assert "Traceback" not in errors
    assert 1 <= updates_in(tmp_path) < UPDATES


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("way", "parallel", "code"),
    [("spawn", "tensor parallel", 130), ("torchrun", "legacy_ddp", 1)],
)
def test_one_worker_is_enough(start, way, parallel, code, data, tmp_path):
    process = start(way, parallel, data, tmp_path)
    wait_for(process)
    os.kill(processes_below(process.pid)[-1], signal.SIGINT)  # the youngest trains
    ended, _ = finished(process)
    assert ended == code
    assert 1 <= updates_in(tmp_path) < UPDATES


def test_a_second_signal_ends_at_once(start, data, tmp_path):
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "__init__.py").write_text(
        "import time\nfrom fairseq_cli import train\n"
        "def validate(*args):\n    print('validating', flush=True)\n    time.sleep(120)\n"
        "train.validate = validate\n"
    )
    process = start(
        *("spawn", "legacy_ddp", data, tmp_path / "ckpt"),
        *("--user-dir", str(slow), "--validate-interval-updates", "2"),
    )
    wait_for(process, "validating")
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline().startswith("SIGTERM: saving after this update")
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)
    code, errors = finished(process)
    assert code == 143
    assert "Traceback" not in errors
    assert not (tmp_path / "ckpt/checkpoint_last.pt").exists()
