"""Small scripts for texts, checkpoints and sentencepiece, run as commands."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TEXT = "a b\nc\n\n\nd\n\ne f g\nh\ni"  # documents of 2, 1 and 3 lines, 3, 1 and 5 words
DOCUMENTS = [["a b", "c"], ["d"], ["e f g", "h", "i"]]


@pytest.fixture
def script(tmp_path):
    """Runs a script in the test's folder; returns what it printed."""

    def run(name, *arguments, typed="", code=0):
        command = [sys.executable, SCRIPTS / f"{name}.py", *map(str, arguments)]
        found = subprocess.run(command, cwd=tmp_path, input=typed, capture_output=True, text=True)
        assert found.returncode == code, found.stderr
        assert "Traceback" not in found.stderr
        return found.stdout if not code else found.stderr

    (tmp_path / "text").write_text(TEXT)
    return run


def test_count_docs(script, tmp_path):
    counted = "found 3 docs\naverage num lines per doc: 2.0\naverage num toks per doc: 3.0\n"
    assert script("count_docs", "text") == counted
    (tmp_path / "text.gz").write_bytes(gzip.compress(TEXT.encode()))
    assert script("count_docs", "--gzip", "text.gz") == counted
    (tmp_path / "blank").write_text("\n\n")
    assert "nothing but blank lines" in script("count_docs", "blank", code=1)
    assert "nowhere" in script("count_docs", "nowhere", code=1)


def test_shard_docs(script, tmp_path):
    script("shard_docs", "text", "--num-shards", 2)
    assert (tmp_path / "text.shard0").read_text() == "a b\nc\n\ne f g\nh\ni\n"
    assert (tmp_path / "text.shard1").read_text() == "d\n"
    assert "at least 2" in script("shard_docs", "text", "--num-shards", 1, code=2)


def documents_in(path):
    text = path.read_text().rstrip("\n")
    return [part.split("\n") for part in text.split("\n\n")] if text else []


def test_split_train_valid_docs(script, tmp_path):
    drawn = set()
    for seed in range(6):
        script("split_train_valid_docs", "text", "valid", "train", "-k", 1, "--seed", seed)
        sample, rest = documents_in(tmp_path / "valid"), documents_in(tmp_path / "train")
        assert sorted(sample + rest) == sorted(DOCUMENTS)
        assert len(sample) == 1
        drawn.add(sample[0][0])
        first = (tmp_path / "valid").read_bytes()
        script("split_train_valid_docs", "text", "valid", "train", "-k", 1, "--seed", seed)
        assert (tmp_path / "valid").read_bytes() == first
    assert len(drawn) > 1
    (tmp_path / "lines").write_text("".join(f"{i}\n" for i in range(50)))
    script("split_train_valid_docs", "lines", "valid", "train", "-k", 8, "--lines")
    valid, train = ((tmp_path / name).read_text().split() for name in ("valid", "train"))
    assert (len(valid), len(train)) == (8, 42)
    assert sorted(map(int, valid + train)) == list(range(50))
    printed = script("split_train_valid_docs", "text", "valid", "train", "-k", 4, code=1)
    assert "-k 4: text has only 3 documents" in printed


NAMES = [
    "checkpoint1.pt",
    "checkpoint2.pt",
    "checkpoint10.pt",
    "checkpoint_best.pt",
    "checkpoint_last.pt",
    "model.pt",
]


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ([], {"checkpoint_best.pt", "checkpoint_last.pt", "model.pt"}),
        (
            ["--save-last", "1"],
            {"checkpoint10.pt", "checkpoint_best.pt", "checkpoint_last.pt", "model.pt"},
        ),
        (
            ["--save-every", "2", "--delete-best"],
            {"checkpoint1.pt", "checkpoint10.pt", "checkpoint_last.pt", "model.pt"},
        ),
        (["--delete-best", "--delete-last"], {"model.pt"}),
    ],
)
def test_rm_pt(script, tmp_path, arguments, left):
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).touch()
    assert "Nothing was deleted" in script("rm_pt", "runs", *arguments, typed="yes\n")
    assert {path.name for path in folder.iterdir()} == set(NAMES)
    printed = script("rm_pt", "runs", *arguments, typed="YES\n")
    assert f"Deleted {6 - len(left)} files" in printed
    assert {path.name for path in folder.iterdir()} == left


def test_rm_pt_follows_links_where_told(script, tmp_path):
    for name in ("test_a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "checkpoint_1_10.pt").touch()
    (tmp_path / "elsewhere.pt").touch()
    (tmp_path / "runs/b/checkpoint_1_20.pt").symlink_to(tmp_path / "elsewhere.pt")
    script("rm_pt", "runs", "--preserve-test", "--no-dereference", typed="YES\n")
    assert (tmp_path / "elsewhere.pt").exists()
    assert [p.parent.name for p in (tmp_path / "runs").rglob("*.pt")] == ["test_a"]
    (tmp_path / "runs/b/checkpoint_1_20.pt").symlink_to(tmp_path / "elsewhere.pt")
    script("rm_pt", "runs/b", typed="YES\n")
    assert not (tmp_path / "elsewhere.pt").exists()
    assert "Nothing to delete" in script("rm_pt", "runs/b")
    assert "is no folder" in script("rm_pt", "nowhere", code=1)


def test_sentencepiece(script, tmp_path):
    pytest.importorskip("sentencepiece")
    lines = [f"the cat number {i} sat on mat {i * 7}" for i in range(200)]
    (tmp_path / "corpus").write_text("\n".join(lines) + "\n")
    options = ["--input=corpus", "--model_prefix=m", "--vocab_size=60", "--minloglevel=2"]
    script("spm_train", *options)
    (tmp_path / "in").write_text("the cat sat\n\nthe mat\n")
    model = ["--model", "m.model"]
    script("spm_encode", *model, "--inputs", "in", "--outputs", "out")
    pieces = (tmp_path / "out").read_text()
    assert len(pieces.splitlines()) == 2
    assert script("spm_decode", *model, "--input", "out") == "the cat sat\nthe mat\n"
    ids = script("spm_encode", *model, "--output_format", "id", typed="the cat\n")
    assert all(word.isdigit() for word in ids.split())
    assert script("spm_decode", *model, "--input_format", "id", typed=ids) == "the cat\n"
    unknown = script("spm_decode", *model, "--input_format", "id", typed="<<unk>>\n")
    assert unknown == script("spm_decode", *model, "--input_format", "id", typed="0\n")
    # Two files: a pair is kept or left out as a whole.
    (tmp_path / "other").write_text("the\nthe cat\nthe cat the cat the cat\n")
    count = len(pieces.splitlines()[1].split())
    names = ["--inputs", "in", "other", "--outputs", "a", "b", "--max-len", count]
    script("spm_encode", *model, *names)
    kept = [len((tmp_path / name).read_text().splitlines()) for name in "ab"]
    assert kept[0] == kept[1] < 2
    (tmp_path / "short").write_text("the\n")
    names[2] = "short"
    assert "equally many lines" in script("spm_encode", *model, *names, code=1)
    assert "no id below" in script(
        "spm_decode", *model, "--input_format", "id", typed="999\n", code=1
    )
    assert "there is no" in script("spm_decode", "--model", "nowhere", code=1)
    assert "spm_train: error" in script("spm_train", "--input=nowhere", code=1)
