"""fairseq-diagnose: the table, the files, the picture, and what goes wrong."""

from __future__ import annotations

import csv
import json
import shlex
import sys

import pytest
from eval_runs import GOLDEN

from fairseq_cli import diagnose

WIKI = "bin/main --path ckpt/wiki103_tiny/checkpoint_last.pt"
GPT = "bin/main --path ckpt/gpt_tiny/checkpoint_last.pt"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command; returns exit code, standard output and standard error."""

    def command(text):
        monkeypatch.chdir(GOLDEN)
        argv = ["fairseq-diagnose", *shlex.split(text), "--cpu", "--num-workers", "0"]
        monkeypatch.setattr(sys, "argv", argv)
        capsys.readouterr()
        code = 0
        try:
            diagnose.cli_main()
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def test_table_and_files(run, tmp_path):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "folder"
    code, out, _ = run(f"{WIKI} --results-path {folder}")
    assert code == 0
    report = json.loads((folder / "heads.json").read_text())
    assert report["checkpoint"] == "ckpt/wiki103_tiny/checkpoint_last.pt"
    assert (report["position_method"], report["train_length"]) == ("alibi", 64)
    assert (report["subset"], report["tokens_per_sample"]) == ("valid", 64)
    # The whole split: 5601 tokens in 88 windows, the last of which is shorter.
    assert (report["tokens"], report["windows"]) == (5601, 88)
    heads = report["heads"]
    assert [(row["layer"], row["head"]) for row in heads] == [
        (layer, head) for layer in (0, 1) for head in range(8)
    ]
    assert [row["slope"] for row in heads[:8]] == [2.0 ** -(head + 1) for head in range(8)]
    spans = [row["mean_distance"] for row in heads[:8]]
    assert spans == sorted(spans)
    assert 1 < spans[0] < 2 < 13 < spans[7] < report["uniform"]["mean_distance"]

    with (folder / "heads.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(heads[0])
    assert [float(row["entropy_bits"]) for row in rows] == [row["entropy_bits"] for row in heads]

    assert (folder / "heads.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = out.splitlines()
    at = next(n for n, line in enumerate(lines) if line.split()[:2] == ["layer", "head"])
    table = [line.split() for line in lines[at + 2 : at + 19]]
    assert [words[2] for words in table[:3]] == ["0.50000", "0.25000", "0.12500"]
    assert [words[3] for words in table[:16]] == [f"{row['mean_distance']:.1f}" for row in heads]
    assert table[16][:2] == ["equal", "weights"]
    assert "5,601 tokens of valid in 88 windows of 64" in out


def test_other_windows_some_batches_another_method_and_no_files(run, tmp_path):
    text = f"{GPT} --tokens-per-sample 128 --max-tokens 256 --max-batches 2 --gen-subset test"
    code, out, _ = run(f"{text} --position-method sinusoidal")
    assert code == 0
    # Batches hold windows of like length, the shortest of which is the end of the split.
    assert "sinusoidal, trained at length 64" in out
    assert "in 4 windows of 128" in out or "in 3 windows of 128" in out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("0   ")]
    assert len(rows) == 6
    assert {row[2] for row in rows} == {"-"}  # no slopes


def test_no_plots(run, tmp_path):
    code, _, _ = run(f"{GPT} --results-path {tmp_path} --no-plots --max-batches 1")
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.csv", "heads.json"]


def test_without_matplotlib_the_remedy_is_told_before_anything_is_computed(
    run, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run(f"{GPT} --results-path {tmp_path}")
    assert code == 1
    assert "--no-plots" in err
    assert "layer" not in out


def test_a_folder_for_results_is_tried_before_anything_is_computed(run, tmp_path):
    (tmp_path / "file").touch()
    code, out, err = run(f"{GPT} --results-path {tmp_path}/file/results --no-plots")
    assert code == 1
    assert "--results-path: cannot write there: Not a directory" in err
    assert "layer" not in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bin/main", "--path is needed"),
        ("bin/main --path nowhere.pt", "nowhere.pt"),
        (f"{GPT} --gen-subset nothing", "nothing"),
        (f"{GPT} --max-batches -1", "--max-batches is -1"),
        (f"{GPT} --tokens-per-sample 1", "at least 2"),
        ("bin/nwords1000_thr2_pf16 --path ckpt/gpt_tiny/checkpoint_last.pt", "--srcdict"),
    ],
)
def test_one_message_for_bad_input(run, text, message):
    code, _, err = run(text)
    assert code == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_an_unknown_option_is_an_error_of_the_command_line(run):
    code, _, err = run(f"{GPT} --max-batch 3")
    assert code == 2
    assert "--max-batches" in err
