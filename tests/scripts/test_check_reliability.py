"""scripts/check_reliability.py with a tenth of its cases, and that it would notice faults."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_reliability.py"
_spec = importlib.util.spec_from_file_location("check_reliability", SCRIPT)
script = importlib.util.module_from_spec(_spec)
sys.modules["check_reliability"] = script  # dataclasses look their module up
_spec.loader.exec_module(script)
KINDS = {kind.name: kind for kind in script.kinds()}


@pytest.mark.parametrize("name", list(KINDS))
def test_damage_is_noticed_or_does_no_harm(name):
    found = script.check_kind(KINDS[name], 100, seed_=1)
    assert script.faults(found["outcomes"]) == []
    assert found["outcomes"]["refused"] > 10
    assert sum(found["outcomes"].values()) >= 90


def test_damage_by_hand():
    content = bytes(range(10))
    assert script.damaged(content, [("flip", 0.5, 1, b"\x01")])[5] == 4
    assert script.damaged(content, [("truncate", 0.5, 1, b"x")]) == bytes(range(5))
    assert script.damaged(content, [("zero", 0.9, 9, b"x")]) == bytes(range(9)) + b"\0"
    assert script.damaged(content, [("cut out", 0.0, 4, b"x")]) == bytes(range(4, 10))
    assert script.damaged(content, [("insert", 0.0, 4, b"xy")]) == b"xy" + content


def test_faults_would_be_seen(tmp_path, monkeypatch):
    def examine(read, is_checked=True):
        kind = script.Kind("k", {"f": b"x"}, "f", read, is_checked=is_checked)
        return script.examine(kind, b"y", 1, tmp_path)

    def hang(folder):
        while True:
            pass

    monkeypatch.setattr(script, "TIME_LIMIT_S", 1)
    assert examine(lambda folder: 1) == "same"
    assert examine(lambda folder: 2, is_checked=False) == "other"
    assert examine(lambda folder: 2).startswith("FAULT: other content")
    assert examine(lambda folder: [][0]).startswith("FAULT: IndexError")
    assert examine(hang).startswith("FAULT: longer than 1 s")


@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_not_been(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    found = script.check_kills(5, 1, tmp_path)
    assert found["outcomes"] == {"same, float32": 3, "same, fp16": 2}
    assert sum(found["moments"].values()) == 5


def test_where_a_kill_fell(tmp_path):
    def save(name, time):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time, time))

    assert script.moment_of(tmp_path / "missing") == "before the first save"
    save("checkpoint_1_1.pt.tmp", 1)
    assert script.moment_of(tmp_path) == "inside a save"
    (tmp_path / "checkpoint_1_1.pt.tmp").rename(tmp_path / "checkpoint_1_1.pt")
    assert script.moment_of(tmp_path) == "inside a save"  # the last one is not linked yet
    save("checkpoint_last.pt", 1)
    assert script.moment_of(tmp_path) == "between saves"
    save("checkpoint_1_2.pt", 2)
    assert script.moment_of(tmp_path) == "inside a save"
    save("checkpoint_1_3.pt", 3)
    save("checkpoint_last.pt", 3)
    assert script.moment_of(tmp_path) == "inside a save"  # the oldest is not removed yet
    (tmp_path / "checkpoint_1_1.pt").unlink()
    assert script.moment_of(tmp_path) == "between saves"
    save("checkpoint_last.pt", 4)  # after an epoch's end no file by update is written
    assert script.moment_of(tmp_path) == "between saves"
