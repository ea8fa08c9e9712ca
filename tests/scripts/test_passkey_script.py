"""scripts/passkey.py: text, data, a model, the table."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "passkey.py"
_spec = importlib.util.spec_from_file_location("passkey_script", SCRIPT)
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


@pytest.fixture
def passkey(monkeypatch, capsys):
    """Runs the script; returns what it printed."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["passkey.py", *map(str, arguments)])
        capsys.readouterr()
        script.main()
        return capsys.readouterr().out

    return command


def test_everything_in_small(passkey, tmp_path):
    folder = tmp_path / "a folder"
    small = ["--length", 16, "--documents", 60, "--updates", 2, "--methods", "alibi"]
    asked = ["--lengths", "16,40", "--depths", "0,1", "--samples", 3]
    printed = passkey("run", "--out", folder, *small, *asked)
    assert len((folder / "text/train.txt").read_text().splitlines()) == 60
    assert len((folder / "text/valid.txt").read_text().splitlines()) == 1
    (report,) = json.loads((folder / "passkey.json").read_text())
    assert report["position_method"] == "alibi"
    cells = [(row["length"], row["depth"], row["num_documents"]) for row in report["rows"]]
    assert cells == [(16, 0.0, 3), (16, 1.0, 3), (40, 0.0, 3), (40, 1.0, 3)]
    assert "| length | depth 0 | depth 1 | tokens |" in printed
    assert "$ fairseq-train" in printed
    assert (folder / "passkey.png").read_bytes().startswith(b"\x89PNG")

    checkpoint = folder / "passkey-alibi/checkpoint_last.pt"
    rows = tmp_path / "rows.json"
    kept = ["--results-path", rows, "--picture", tmp_path / "map.svg"]
    passkey("evaluate", folder / "data-bin", "--path", checkpoint, *asked, *kept)
    assert json.loads(rows.read_text()) == report["rows"]
    shares = {f"{row['exact']:.0%}" for row in report["rows"]}
    picture = (tmp_path / "map.svg").read_text()
    assert all(f"<!-- {share} -->" in picture for share in shares)


def test_what_cannot_be_made_is_refused(passkey, tmp_path):
    with pytest.raises(ValueError, match="at least 10 tokens, not 8"):
        passkey("generate", "--out", tmp_path, "--length", 8)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        passkey("evaluate", tmp_path, "--path", tmp_path / "nowhere.pt")
    with pytest.raises(SystemExit):
        passkey("generate", "--out", tmp_path, "--task", "guess")


def test_the_copy_task_has_no_depths(passkey, tmp_path):
    passkey("generate", "--out", tmp_path, "--task", "copy", "--documents", 100, "--length", 20)
    lines = (tmp_path / "train.txt").read_text().splitlines()
    assert all("copy" in line and "again" in line for line in lines)
    assert {len(line.split()) + 1 for line in lines} == set(range(5, 21))
    made = [script.Accuracy("copy", length, None, 9, 0.5, 0.75) for length in (20, 40)]
    table = script.table(made).splitlines()
    assert table[0] == "| length | exact | tokens |"
    assert table[2:] == ["| 20 | 50% | 75% |", "| 40 | 50% | 75% |"]
