"""A full disk, a folder that cannot be written, data that is gone, a loss that is no number."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_runs import TINY_MODEL, TINY_TRAINING, make_tiny_data


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    return make_tiny_data(folder)


def run(data, folder, *more, limit=None):
    """Trains; returns exit code and what was said on stderr."""
    command = f"-m fairseq_cli.train {data} {TINY_MODEL} {TINY_TRAINING} --save-dir {folder}"

    def limit_files():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    found = subprocess.run(
        [sys.executable, *command.split(), *more],
        capture_output=True,
        text=True,
        preexec_fn=limit_files,
    )
    assert "Traceback" not in found.stderr
    return found.returncode, found.stderr


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("more", [[], ["--write-checkpoints-asynchronously"]])
def test_a_full_disk_leaves_the_last_good_checkpoint(data, tmp_path, more):
    folder = tmp_path / "ckpt"
    assert run(data, folder, "--max-update", "2")[0] == 0
    good = digest(folder / "checkpoint_last.pt")
    limit = (folder / "checkpoint_last.pt").stat().st_size // 2
    code, said = run(data, folder, "--max-update", "4", *more, limit=limit)
    assert code == 1
    assert "checkpoint not written: File too large" in said
    assert digest(folder / "checkpoint_last.pt") == good
    assert not list(folder.glob("*.tmp"))
    assert run(data, folder, "--max-update", "4")[0] == 0


def test_a_full_device_is_told_before_anything_is_trained(data, tmp_path):
    full = Path("/proc/self")  # where nobody can make a file, whatever the rights
    if not full.exists():
        pytest.skip("there is no /proc here")
    code, said = run(data, full / "ckpt", "--max-update", "2")
    assert code == 1
    assert "--save-dir: cannot write there" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write(data, tmp_path):
    folder = tmp_path / "ckpt"
    folder.mkdir(mode=0o500)
    code, said = run(data, folder, "--max-update", "2")
    assert code == 1 and "--save-dir: cannot write there" in said


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "dict.txt", "valid.bin"])
def test_data_that_is_gone_is_named(data, tmp_path, name):
    folder = tmp_path / "ckpt"
    assert run(data, folder, "--max-update", "2")[0] == 0
    good = digest(folder / "checkpoint_last.pt")
    (data / name).unlink()
    code, said = run(data, folder, "--max-update", "4")
    assert code == 1
    assert name.split(".")[0] in said
    assert digest(folder / "checkpoint_last.pt") == good


def test_a_loss_that_is_no_number(data, tmp_path):
    folder = tmp_path / "ckpt"
    assert run(data, folder, "--max-update", "2")[0] == 0
    state = torch.load(folder / "checkpoint_last.pt", weights_only=True)
    state["model"]["decoder.layers.1.fc2.bias"][0] = float("nan")
    torch.save(state, folder / "checkpoint_last.pt")
    good = digest(folder / "checkpoint_last.pt")
    code, said = run(data, folder, "--max-update", "4")
    assert code == 1
    assert "Nan/Inf" in said
    assert digest(folder / "checkpoint_last.pt") == good
