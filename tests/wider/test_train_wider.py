"""Log formats, kept files and resumed runs of the original on WikiText-2."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "commands"))

from train_runs import train

WIDER = os.environ.get("GOLDEN_DIR")
FOLDER = Path(WIDER or ".").resolve() / "wikitext-2"

pytestmark = pytest.mark.skipif(not WIDER, reason="GOLDEN_DIR is not set")


def run_command(monkeypatch, caplog, line, save_dir):
    line = re.sub(r"(\([\d., ]+\))", r"'\1'", line)
    arguments = shlex.split(line.removeprefix("command: "))[1:]
    arguments[arguments.index("--save-dir") + 1] = str(save_dir)
    monkeypatch.chdir(FOLDER)
    return train(monkeypatch, caplog, [*arguments, "--cpu"])


def comparable(name, message, save_dir):
    """Returns a line without numbers that depend on the clock, and without the folder."""
    message = message.replace(str(save_dir), "S").splitlines()[0]
    message = re.sub(r"(wps|ups|wall)([= ])[\d.]+", r"\1\2#", message)
    message = re.sub(r"[\d.]+ seconds", "# seconds", message)
    return name, message


@pytest.mark.parametrize("log", ["format_default", "format_none", "format_simple", "naming_keep"])
def test_the_log_and_the_files_are_those_of_the_original(monkeypatch, caplog, tmp_path, log):
    text = (FOLDER / "logs" / f"{log}.log").read_text()
    run = run_command(monkeypatch, caplog, text.splitlines()[0], tmp_path)
    assert run.exit_code == 0
    listed = re.findall(r"(?m)^(checkpoint\S*\.pt)$", text)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == sorted(listed)
    theirs = re.findall(r"(?m)^[\d-]+ [\d:]+ \| INFO \| (\S+) \| (.*)", text)
    theirs = [
        comparable(*line, "S")
        for line in theirs
        if "'_name'" not in line[1] and not re.search(r"shared parameter.*bias", line[1])
    ]
    if not theirs:
        return
    ours = [comparable(n, m, tmp_path) for n, _, m in run.records if "'_name'" not in m]
    ours.remove(("fairseq_cli.train", "position method: alibi"))
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert_close_texts([m for _, m in ours], [m for _, m in theirs])


def assert_close_texts(ours, theirs):
    """Compares texts; their numbers may differ by rounding."""
    for got, wanted in zip(ours, theirs, strict=True):
        number = r"\d+(?:\.\d+)?"
        assert re.sub(number, "#", got) == re.sub(number, "#", wanted)
        numbers = zip(re.findall(number, got), re.findall(number, wanted), strict=True)
        assert all(float(a) == pytest.approx(float(b), rel=2e-3) for a, b in numbers), (got, wanted)


@pytest.mark.parametrize("name", ["a0_resume", "b0_resume", "a0_uf3"])
def test_curves_with_sample_ids(monkeypatch, caplog, tmp_path, name):
    command = (FOLDER / "ckpt" / name / "COMMAND.txt").read_text().splitlines()[0]
    run = run_command(monkeypatch, caplog, command, tmp_path)
    curve = (FOLDER / "ckpt" / name / "curve.jsonl").read_text()
    wanted = [json.loads(line) for line in curve.splitlines()]
    assert run.ids == [line["ids"] for line in wanted]
    for line in wanted:
        got = run.curve()[line["update"]]
        assert got["loss"] == pytest.approx(line["loss_base2"], abs=0.0011)
        assert got["gnorm"] == pytest.approx(line["grad_norm"], rel=0.003, abs=0.0006)
