"""Programs beside the commands: what is missing or cannot be written ends in one message."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def message_of(monkeypatch, path, *arguments):
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    return stopped.value.code


@pytest.mark.parametrize(
    ("name", "number"),
    [("data", 2), ("mixed", 4), ("sequence_packed", 2), ("sequence_parallel", 2)],
)
def test_examples_without_torchrun_name_the_command(monkeypatch, name, number):
    if name == "sequence_packed":
        pytest.importorskip("transformers")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.syspath_prepend(ROOT / "examples" / "parallel")
    monkeypatch.delitem(sys.modules, "tiny", raising=False)
    path = f"examples/parallel/{name}.py"
    told = message_of(monkeypatch, path)
    del sys.modules["tiny"]
    assert told == f"start it with: torchrun --nproc-per-node {number} {ROOT / path}"
    documented = f"    torchrun --nproc-per-node {number} {path}\n"
    assert documented in (ROOT / path).read_text()


def test_the_demo_tries_its_folder_first(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    told = message_of(monkeypatch, "scripts/demo.py", "--out", str(tmp_path / "file"), "--quick")
    assert told == f"--out: cannot write there: Not a directory: {tmp_path / 'file' / 'quick'}"
