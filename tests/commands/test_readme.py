"""Every command and every block of Python in the README is run, in its order, with small models."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from web_server import serving

from fairseq_cli import _commands

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "invented"
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")

SMALL_MODEL = (
    "--decoder-layers 1 --decoder-embed-dim 32 --decoder-input-dim 32 --decoder-output-dim 32 "
    "--decoder-ffn-embed-dim 32 --adaptive-input-cutoff 20,60 --adaptive-softmax-cutoff 20,60 "
    "--max-update 2 --warmup-updates 1 --lr-period-updates 2 --num-workers 0 --cpu "
    "--max-tokens 1024"
)
# What makes a command small; the last of two equal flags counts.
SMALLER = {
    "fairseq-preprocess": "--workers 1",
    "python train.py": SMALL_MODEL,
    "fairseq-train": f"{SMALL_MODEL} --save-dir other",
    "fairseq-eval-lm": "--num-workers 0 --cpu",
    "fairseq-extrapolate": "--lengths 16,32 --strides length,8 --cpu",
    "fairseq-generate": "--cpu --beam 2 --batch-size 8 --tokens-per-sample 32 --max-len-b 20",
    "fairseq-doctor": "--cpu",
    "fairseq-diagnose": "--cpu --max-batches 1 --no-plots",
}
# Run by .ci/run, or by a person with a GPU; tests of what they call are in tests/scripts.
SCRIPTS = {
    "bash scripts/demo.sh",
    "bash scripts/test.sh",
    "pip install -c constraints.txt -e .",
}


def steps() -> list[tuple[str, str]]:
    """Returns (language, text) of everything to be run."""
    found = []
    for language, block in re.findall(r"```(bash|python)\n(.*?)```", TEXT, flags=re.DOTALL):
        if language == "python":
            found.append((language, block))
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append((language, shlex.join(words)))
    return found


def name_of(step: tuple[str, str]) -> str:
    return " ".join(step[1].split()[:2]) if step[0] == "bash" else "python"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the text that the README starts from, and the checkout's files beside it."""
    place = tmp_path_factory.mktemp("readme")
    for split, most in (("train", 2000), ("valid", 8), ("test", 8)):
        lines = (GOLDEN / "text" / f"{split}.txt").read_text().splitlines(keepends=True)
        (place / f"wiki.{split}.tokens").write_text("".join(lines[:most]))
    for name in ("examples", "scripts", "train.py", "fairseq"):
        (place / name).symlink_to(ROOT / name)
    return place


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command line of the README, made smaller."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FAIRSEQ_CACHE", str(folder / "cache"))

    def command(line: str) -> str:
        words = shlex.split(line)
        first = "python train.py" if words[:2] == ["python", "train.py"] else words[0]
        # Half precision needs a GPU.
        words = [word for word in words if word != "--fp16"]
        words += shlex.split(SMALLER.get(first, ""))
        if words[0] == "python":
            monkeypatch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1], run_name="__main__")
        else:
            monkeypatch.setattr(sys, "argv", words)
            getattr(_commands, words[0].removeprefix("fairseq-").replace("-", "_"))()
        return capsys.readouterr().out

    return command


@pytest.mark.parametrize("step", steps(), ids=name_of)
def test_the_readme_runs(step, run, folder, monkeypatch):
    language, text = step
    if language == "python":
        exec(compile(text, "README.md", "exec"), {"__name__": "readme"})
    elif text in SCRIPTS:
        assert not text.startswith("bash") or (ROOT / text.split()[1]).exists()
    elif "download_checkpoints" in text:
        whole = (GOLDEN / "ckpt/wiki103_tiny/checkpoint_last.pt").read_bytes()
        with serving(**{f"alibi_wt103_L{text.split()[-1]}.pt": whole}) as web:
            monkeypatch.setenv("FAIRSEQ_CHECKPOINT_URL", web.url)
            run(text)
        assert len(web.ranges) == 1
    else:
        if "alibi.pt:sinusoidal.pt" in text:
            shutil.copy(folder / "checkpoints/checkpoint_best.pt", folder / "alibi.pt")
            shutil.rmtree(folder / "other")
            run(
                "fairseq-train data-bin/wikitext-103 --arch transformer_lm_wiki103 "
                "--task language_modeling --criterion adaptive_loss --tokens-per-sample 16 "
                "--position-method sinusoidal --optimizer nag --lr 0.1 --lr-scheduler cosine"
            )
            os.replace(folder / "other/checkpoint_last.pt", folder / "sinusoidal.pt")
        run(text)


def test_what_the_commands_left(folder):
    # After the tests above, in the README's order.
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "data-bin/wikitext-103/dict.txt",
        "checkpoints/checkpoint_best.pt",
        "checkpoints/config.yaml",
        "report/report.json",
        "exported/config.json",
        "heads/heads.csv",
        "cache/alibi_wt103/alibi_wt103_L512.pt",
    } <= written
