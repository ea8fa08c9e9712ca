"""scripts/download_checkpoints.py, against a server of our own."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from pathlib import Path

import pytest
from web_server import serving

from fairseq import fetch as fetch_module
from fairseq.checkpoint import download

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "invented"
CHECKPOINT = (GOLDEN / "ckpt/wiki103_tiny/checkpoint_last.pt").read_bytes()
_spec = importlib.util.spec_from_file_location("dl", ROOT / "scripts/download_checkpoints.py")
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


@pytest.fixture
def web(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch_module, "PAUSE_S", 0.001)
    monkeypatch.setenv("FAIRSEQ_CACHE", str(tmp_path / "cache"))
    files = {f"{name}.pt": CHECKPOINT for name in download.PUBLISHED}
    with serving(**files, **{"alibi_wt103_L64.log": b"log"}) as server:
        monkeypatch.setenv("FAIRSEQ_CHECKPOINT_URL", server.url)
        yield server


def test_all_of_them_into_a_folder(web, tmp_path, capsys):
    script.main(["all", "--dir", str(tmp_path / "here")])
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{tmp_path}/here/{name}.pt" for name in download.PUBLISHED]
    assert all(Path(path).read_bytes() == CHECKPOINT for path in printed)
    assert len(web.ranges) == 8


def test_one_with_its_log_into_the_cache(web, tmp_path, capsys):
    script.main(["64", "--logs", "--sha256", hashlib.sha256(CHECKPOINT).hexdigest()])
    cache = tmp_path / "cache/alibi_wt103"
    assert capsys.readouterr().out.split() == [
        f"{cache}/alibi_wt103_L64.pt",
        f"{cache}/alibi_wt103_L64.log",
    ]
    with pytest.raises(OSError, match="404"):
        script.main(["128", "--logs"])


def test_the_dictionary_is_kept_for_the_hub(web, monkeypatch, tmp_path, capsys):
    small = {k: dataclasses.replace(v, vocabulary=4192) for k, v in download.PUBLISHED.items()}
    monkeypatch.setattr(download, "PUBLISHED", small)
    script.main(["--keep-dict", str(GOLDEN / "bin/main/dict.txt")])
    kept = tmp_path / "cache/alibi_wt103/dict.txt"
    assert capsys.readouterr().out == f"{kept}\n"
    assert kept.read_bytes() == (GOLDEN / "bin/main/dict.txt").read_bytes()


@pytest.mark.parametrize(
    "arguments", [[], ["63"], ["all", "--sha256", "0" * 64], ["64", "--sha256", "12"]]
)
def test_wrong_command_lines(web, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    assert web.ranges == []
