"""Averaging checkpoints, by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "average_checkpoints.py"
_spec = importlib.util.spec_from_file_location("average_checkpoints", SCRIPT)
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


def _write(path, **model):
    record = {"train_length": 64, "fp32_masters": torch.zeros(1)}
    torch.save(
        {"args": None, "model": model, "extra_state": {"file": path.name}, "alibi": record}, path
    )
    return str(path)


def test_floats_halves_and_whole_numbers(tmp_path):
    first = _write(
        tmp_path / "a.pt",
        w=torch.tensor([1.0, 2.0]),
        half=torch.tensor([1.0], dtype=torch.float16),
        n=torch.tensor([7]),
    )
    second = _write(
        tmp_path / "b.pt",
        w=torch.tensor([2.0, 5.0]),
        half=torch.tensor([2.0], dtype=torch.float16),
        n=torch.tensor([8]),
    )
    output = tmp_path / "average.pt"
    script.main(["--inputs", first, second, "--output", str(output)])
    state = torch.load(output, weights_only=True)
    assert state["model"]["w"].tolist() == [1.5, 3.5]
    assert state["model"]["half"].tolist() == [1.5]
    assert state["model"]["half"].dtype == torch.float32
    assert state["model"]["n"].tolist() == [7]
    assert state["extra_state"] == {"file": "a.pt"}
    assert state["alibi"] == {"train_length": 64}


def test_tied_parameters_are_averaged_once(tmp_path):
    shared = torch.tensor([1.0])
    first = _write(tmp_path / "a.pt", a=shared, b=shared)
    second = _write(tmp_path / "b.pt", a=shared + 2, b=shared + 2)
    state = script.average_checkpoints([first, second])
    assert state["model"]["a"].tolist() == state["model"]["b"].tolist() == [2.0]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--num-epoch-checkpoints", "2"], ["checkpoint10.pt", "checkpoint9.pt"]),
        (
            ["--num-epoch-checkpoints", "2", "--checkpoint-upper-bound", "9"],
            ["checkpoint9.pt", "checkpoint2.pt"],
        ),
        (["--num-update-checkpoints", "2"], ["checkpoint_1_300.pt", "checkpoint_2_200.pt"]),
    ],
)
def test_the_newest_are_taken_from_a_folder(tmp_path, capsys, arguments, names):
    values = {"checkpoint2.pt": 2, "checkpoint9.pt": 9, "checkpoint10.pt": 10}
    values.update(
        {"checkpoint_2_200.pt": 200, "checkpoint_1_300.pt": 300, "checkpoint_1_50.pt": 50}
    )
    for name, value in values.items():
        _write(tmp_path / name, w=torch.tensor([float(value)]))
    output = tmp_path / "average.pt"
    script.main(["--inputs", str(tmp_path), "--output", str(output), *arguments])
    state = torch.load(output, weights_only=True)
    assert state["model"]["w"].item() == sum(values[name] for name in names) / len(names)
    assert state["extra_state"]["file"] == names[0]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Namespace(")
    assert printed[-1] == f"Finished writing averaged checkpoint to {output}"


def test_too_few_and_different_checkpoints_are_refused(tmp_path):
    _write(tmp_path / "checkpoint1.pt", w=torch.zeros(1))
    with pytest.raises(ValueError, match="Found 1 checkpoint files but need at least 2"):
        script.newest_checkpoints(str(tmp_path), 2, by_update=False)
    other = _write(tmp_path / "other.pt", v=torch.zeros(1))
    with pytest.raises(KeyError, match="has other parameters"):
        script.average_checkpoints([str(tmp_path / "checkpoint1.pt"), other])
