"""fairseq-preprocess against what the original wrote for WikiText-2 and for odd small texts."""

import hashlib
import logging
import os
import re
import shlex
from pathlib import Path

import pytest

from fairseq import options
from fairseq.data import text_file
from fairseq_cli import preprocess

GOLDEN_DIR = os.environ.get("GOLDEN_DIR")
pytestmark = pytest.mark.skipif(not GOLDEN_DIR, reason="GOLDEN_DIR is not set")

FOLDER = Path(GOLDEN_DIR or ".") / "wikitext-2"
RIGHT_RUN_OF = {"edge_longline_w4": "edge_longline"}
"""Runs of the original that went wrong, and those that tell what is right."""


def runs():
    """Returns name -> (arguments, name of file -> (hash, size), messages) of the original."""
    path = FOLDER / "bin/PREPROCESS.txt"
    if not path.exists():
        return {}
    found = {}
    for block in path.read_text(encoding="utf-8").split("### ")[1:]:
        name, command, _, *rest = block.strip().splitlines()
        files = re.findall(r"(?m)^([0-9a-f]{64}) +(\d+) +(\S+)$", "\n".join(rest))
        messages = [line for line in rest if line.startswith("[")]
        hashes = {file: (digest, int(size)) for digest, size, file in files}
        found[name] = (shlex.split(command)[2:], hashes, messages)
    return found


RUNS = runs()


def run(arguments):
    parser = options.get_preprocessing_parser(default_task="language_modeling")
    preprocess.main(options.parse_args(parser, arguments))


def hashes(folder):
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
        for path in folder.iterdir()
        if path.name != "preprocess.log"
    }


@pytest.mark.parametrize("name", sorted(RUNS))
def test_run(name, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(text_file, "CHUNK_BYTES", 4096)
    caplog.set_level(logging.INFO)
    arguments = list(RUNS[name][0])
    arguments[arguments.index("--destdir") + 1] = str(tmp_path)
    run(arguments)
    _, expected, messages = RUNS[RIGHT_RUN_OF.get(name, name)]
    expected = {
        file.removesuffix(".None-None"): entry
        for file, entry in expected.items()
        if file != "preprocess.log"
    }
    assert hashes(tmp_path) == expected
    assert [m for m in caplog.messages if m.startswith("[")] == messages


def boundaries():
    path = FOLDER / "bin/DTYPE_BOUNDARY.txt"
    if not path.exists():
        return []
    pattern = r"dict_len (\d+) +text sha256 (\w+) .*train.bin sha256 (\w+) +dict sha256 (\w+)"
    return re.findall(pattern, path.read_text())


@pytest.mark.parametrize(("types", "text_hash", "bin_hash", "dict_hash"), boundaries())
def test_element_type(types, text_hash, bin_hash, dict_hash, tmp_path):
    words = [f"w{number:05d}" for number in range(int(types) - 4)]
    lines = [" ".join(words[start : start + 100]) + "\n" for start in range(0, len(words), 100)]
    text = tmp_path / "text.txt"
    text.write_text("".join(lines))
    assert hashlib.sha256(text.read_bytes()).hexdigest() == text_hash
    out = tmp_path / "bin"
    run(["--only-source", "--trainpref", str(text), "--padding-factor", "1", "--destdir", str(out)])
    found = hashes(out)
    assert (found["train.bin"][0], found["dict.txt"][0]) == (bin_hash, dict_hash)
