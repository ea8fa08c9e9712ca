"""scripts/reproduce_paper.py, all of it, with small models and text from a server of our own."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from web_server import serving

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "invented"
_spec = importlib.util.spec_from_file_location("paper", ROOT / "scripts/reproduce_paper.py")
script = importlib.util.module_from_spec(_spec)
sys.modules["paper"] = script  # dataclasses look their module up
_spec.loader.exec_module(script)


def text_as_zip():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for split in ("train", "valid", "test"):
            body = (GOLDEN / f"text/{split}.txt").read_bytes()
            archive.writestr(f"wikitext-103/wiki.{split}.tokens", body)
    return out.getvalue()


def test_from_downloads_to_the_table(tmp_path):
    model = (GOLDEN / "ckpt/wiki103_tiny/checkpoint_last.pt").read_bytes()
    with serving(**{"w.zip": text_as_zip(), "alibi_wt103_L64.pt": model}) as web:
        web.faults = ["drop"]
        environment = {
            **os.environ,
            "PYTHON": sys.executable,
            "WIKITEXT_URL": f"{web.url}/w.zip",
            "FAIRSEQ_CHECKPOINT_URL": web.url,
            "FAIRSEQ_CACHE": str(tmp_path / "cache"),
        }
        command = [sys.executable, ROOT / "scripts/reproduce_paper.py", "--dir", tmp_path / "out"]
        found = subprocess.run(
            [*command, "--lengths", "64", "--longest", "128", "--cpu", "--any-text"],
            env=environment,
            capture_output=True,
            text=True,
        )
    assert found.returncode == 0, found.stderr
    rows = json.loads((tmp_path / "out/paper.json").read_text())
    assert [(row["eval_length"], row["perplexity"]) for row in rows] == [(64, 28.46), (128, 24.7)]
    # The original's own evaluation of this checkpoint at 64.
    lines = (GOLDEN / "eval/RESULTS.jsonl").read_text().splitlines()
    golden = {row["name"]: row for row in map(json.loads, lines)}["wiki103_tiny_valid_l64_c0"]
    assert rows[0]["ours"] == pytest.approx(2 ** golden["loss_base2"], rel=1e-4)
    text = (tmp_path / "out/paper.md").read_text()
    ours = rows[0]["ours"]
    shown = f"| 28.46 | {ours:.2f} | {ours - 28.46:+.2f} |"
    assert text.splitlines()[2] == f"| 5 | 64 | 64 | non-overlapping | valid {shown}"
    assert text in found.stdout


def test_the_papers_numbers_are_grouped_into_evaluations():
    options = script.get_parser().parse_args([])
    groups = script.figures_of(options)
    assert sum(map(len, groups)) == 36 + 2 + 4
    assert len(groups) == 8 + 2 + 4
    best = [f for f in script.PAPER if f.train_length == f.eval_length == 3072]
    assert [f.perplexity for f in best] == [17.60, 18.30, 16.97, 17.66]
    options = script.get_parser().parse_args(["--one-by-one", "--lengths", "1024"])
    assert [len(group) for group in script.figures_of(options)] == [4, 4]
    with pytest.raises(ValueError, match="leave no number"):
        script.figures_of(script.get_parser().parse_args(["--lengths", "512", "--longest", "256"]))


def test_sliding_windows_score_their_new_tokens_only(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(script, "run", lambda *words: commands.append(list(map(str, words))))
    monkeypatch.setattr(script, "published_checkpoint", lambda name, folder: f"{name}.pt")
    (tmp_path / "L512-test-512").mkdir()
    (tmp_path / "L512-test-512/report.json").write_text(
        json.dumps([{"eval_length": 3072, "perplexity": 19.0}])
    )
    options = script.get_parser().parse_args(["--dir", str(tmp_path)])
    figure = next(f for f in script.PAPER if f.stride == 512 and f.subset == "test")
    assert script.evaluate(options, tmp_path / "data", [figure]) == [19.0]
    words = commands[0]
    assert words[words.index("--strides") + 1] == "512"
    assert words[words.index("--lengths") + 1] == "3072"
    assert words[words.index("--path") + 1] == "alibi_wt103_L512.pt"
    assert "--cpu" not in words


def test_a_failed_step_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("WIKITEXT_URL", "ftp://nowhere")
    with pytest.raises(RuntimeError, match="--data names data"):
        script.main(["--dir", str(tmp_path), "--lengths", "64"])
    with pytest.raises(RuntimeError, match="fairseq-extrapolate ended with exit code 1"):
        words = ["--path", "nowhere.pt", "--lengths", "8", "--results-path", tmp_path]
        script.run("fairseq-extrapolate", GOLDEN / "bin/main", *words)
