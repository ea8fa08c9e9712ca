"""The token files of WikiText-103, from each form in which its text is found."""

from __future__ import annotations

import hashlib
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

from fairseq import fetch as fetch_module

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "language_model"
_spec = importlib.util.spec_from_file_location("prepare", FOLDER / "prepare_wikitext_103.py")
script = importlib.util.module_from_spec(_spec)
sys.modules["prepare"] = script  # dataclasses look their module up
_spec.loader.exec_module(script)

# As in the token files: a blank at each end of a line, one blank for an empty one.
LINES = [" \n", " = A <unk> title = \n", " \n", " Some w\xf6rds , in 1 @.@ 5 lines . \n", " \n"]
FILES = {
    "train": "".join(LINES * 3).encode(),
    "valid": "".join(LINES * 2).encode(),
    "test": "".join(LINES).encode(),
}
# As the data set's own loader gives them.
ROWS = [line if line.strip() else "" for line in LINES]


def zipped(files=FILES, **options):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, content in files.items():
            archive.writestr(f"wikitext-103/wiki.{split}.tokens", content)
    return out.getvalue()


def parquet(rows):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    pq.write_table(pa.table({"text": rows}), out)
    return out.getvalue()


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(
        script, "SHA1", {split: hashlib.sha1(body).hexdigest() for split, body in FILES.items()}
    )
    monkeypatch.setattr(fetch_module, "PAUSE_S", 0.001)
    monkeypatch.delenv("WIKITEXT_URL", raising=False)


@pytest.fixture
def prepare(tmp_path, capsys):
    """Runs the script; returns what it printed."""

    def run(*arguments):
        capsys.readouterr()
        script.main([str(tmp_path / "out"), *map(str, arguments)])
        return capsys.readouterr().out

    return run


def assert_prepared(folder):
    """There are the three files, byte for byte, and nothing else."""
    names = {f"wiki.{split}.tokens": body for split, body in FILES.items()}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == names


def test_a_local_zip_and_the_counts(prepare, tmp_path):
    (tmp_path / "my.zip").write_bytes(zipped())
    printed = prepare("--from", tmp_path / "my.zip").splitlines()
    assert_prepared(tmp_path / "out")
    sha1 = hashlib.sha1(FILES["test"]).hexdigest()
    # 5 + 9 words by hand, and 5 line ends.
    assert printed[2] == f"{tmp_path}/out/wiki.test.tokens: 5 lines, 19 tokens, SHA-1 {sha1}"
    assert printed[0].split(": ")[1].startswith("15 lines, 57 tokens, ")


def test_rows_become_the_lines_they_were():
    assert [script.line_of(row) for row in ROWS] == LINES
    assert [script.line_of(row.strip()) for row in ROWS] == LINES


def as_jsonl(rows):
    return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()


def as_text(rows):
    return "".join(row.strip() + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("{}-00000-of-00001.parquet", parquet),
        ("{}.jsonl", as_jsonl),
        ("{}.txt", as_text),
        ("wiki.{}.tokens", lambda rows: "".join(map(script.line_of, rows)).encode()),
    ],
)
def test_a_local_folder_in_each_form(prepare, tmp_path, name, form):
    rows = tmp_path / "rows"
    rows.mkdir()
    for split, times in {"train": 3, "valid": 2, "test": 1}.items():
        long = "validation" if split == "valid" and "wiki" not in name else split
        (rows / name.format(long)).write_bytes(form(ROWS * times))
    prepare("--from", rows)
    assert_prepared(tmp_path / "out")


@pytest.fixture
def web(monkeypatch):
    with serving() as server:
        monkeypatch.setattr(script, "ZIP_URL", f"{server.url}/a.zip")
        monkeypatch.setattr(script, "ROWS_URL", f"{server.url}/rows")
        yield server


@pytest.fixture
def plain_rows(monkeypatch):
    """Lets the data set be of text, which needs no library to read."""
    names = {
        split: [name.replace(".parquet", ".jsonl") for name in names]
        for split, names in script.ROWS.items()
    }
    monkeypatch.setattr(script, "ROWS", names)


def serve_rows(web):
    counts = {"train": 3, "valid": 2, "test": 1}
    for split, names in script.ROWS.items():
        rows = ROWS * counts[split]
        cut = len(rows) // len(names)
        for i, name in enumerate(names):
            end = None if i + 1 == len(names) else cut
            form = parquet if name.endswith(".parquet") else as_jsonl
            web.files[f"rows/{name}"] = form(rows[i * cut : end])


def test_the_rows_as_they_are_published(prepare, web, tmp_path):
    serve_rows(web)
    prepare()
    assert_prepared(tmp_path / "out")


def test_the_first_source_is_a_zip_for_browsers(prepare, web, tmp_path):
    web.files["a.zip"] = zipped()
    web.faults = ["drop", 503]
    prepare()
    assert_prepared(tmp_path / "out")
    assert all(agent.startswith("Mozilla/5.0") for agent in web.agents)
    requests = len(web.ranges)
    prepare()
    assert len(web.ranges) == requests


@pytest.mark.parametrize("trouble", [403, 404, b"<html>", zipped({"train": b"x"}), zipped()[:-9]])
def test_the_next_source_is_taken_where_one_fails(prepare, web, plain_rows, tmp_path, trouble):
    serve_rows(web)
    if isinstance(trouble, bytes):
        web.files["a.zip"] = trouble
    else:
        web.faults = [trouble]
    prepare()
    assert_prepared(tmp_path / "out")


def test_another_text_is_no_wikitext_103(prepare, web, tmp_path):
    web.files["a.zip"] = zipped({**FILES, "test": b" other \n"})
    with pytest.raises(ValueError, match=r"no source gave WikiText-103(.|\n)*SHA-1(.|\n)*404"):
        prepare()
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"wiki.train.tokens", "wiki.valid.tokens"}
    assert "  not WikiText-103" in prepare("--any-text")
    assert (tmp_path / "out/wiki.test.tokens").read_bytes() == b" other \n"


def test_the_environment_names_another_address(prepare, web, plain_rows, tmp_path, monkeypatch):
    web.files["mine.zip"] = zipped()
    monkeypatch.setenv("WIKITEXT_URL", f"{web.url}/mine.zip")
    prepare()
    assert_prepared(tmp_path / "out")
    for split in FILES:
        (tmp_path / f"out/wiki.{split}.tokens").unlink()
    serve_rows(web)
    monkeypatch.setenv("WIKITEXT_URL", f"{web.url}/rows/")
    prepare()
    assert_prepared(tmp_path / "out")


def test_damage_and_absence_are_told(prepare, tmp_path):
    with pytest.raises(FileNotFoundError, match="--from: there is no"):
        prepare("--from", tmp_path / "nowhere.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no wiki\.train\.tokens and no train"):
        prepare("--from", tmp_path / "empty")
    for split in FILES:
        (tmp_path / "empty" / f"{split}.jsonl").write_text('{"txt": 1}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: not an object with an entry"):
        prepare("--from", tmp_path / "empty")
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match="is no zip file or damaged"):
        prepare("--from", tmp_path / "a.zip")
    assert not list((tmp_path / "out").iterdir())


def test_the_shell_script_calls_it(tmp_path):
    (tmp_path / "my.zip").write_bytes(zipped())
    command = ["bash", FOLDER / "prepare-wikitext-103.sh", "--from", "my.zip"]
    environment = {**os.environ, "PYTHON": sys.executable}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    refused = subprocess.run(command, **options)
    assert refused.returncode == 1
    assert "--any-text accepts other text" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert subprocess.run([*command, "--any-text"], **options).returncode == 0
    assert_prepared(tmp_path / "wikitext-103")
