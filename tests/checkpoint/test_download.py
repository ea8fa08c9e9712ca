"""Published checkpoints: downloaded whole, recognised later, and their dictionary."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
from web_server import serving

from fairseq import fetch as fetch_module
from fairseq.checkpoint import download
from fairseq.data.dictionary import Dictionary
from fairseq.fetch import DownloadError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "invented"
CHECKPOINT = (GOLDEN / "ckpt/wiki103_tiny/checkpoint_last.pt").read_bytes()
SHA256 = hashlib.sha256(CHECKPOINT).hexdigest()
NAME = "alibi_wt103_L512"


@pytest.fixture
def web(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch_module, "PAUSE_S", 0.001)
    with serving(**{f"models/{NAME}.pt": CHECKPOINT, f"models/{NAME}.log": b"log\n"}) as server:
        monkeypatch.setenv("FAIRSEQ_CHECKPOINT_URL", server.url + "/models/")
        monkeypatch.setenv("FAIRSEQ_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture
def small_vocabulary(monkeypatch):
    """Lets the published models be of the golden data's dictionary."""
    size = len(Dictionary.load(str(GOLDEN / "bin/main/dict.txt")))
    small = {k: dataclasses.replace(v, vocabulary=size) for k, v in download.PUBLISHED.items()}
    monkeypatch.setattr(download, "PUBLISHED", small)


def test_what_is_published():
    lengths = {name: published.train_length for name, published in download.PUBLISHED.items()}
    assert lengths == {f"alibi_wt103_L{n}": n for n in (64, 128, 256, 512, 1024, 1536, 2048, 3072)}
    with pytest.raises(ValueError, match=r"did you mean alibi_wt103_L512\?"):
        download.published_checkpoint("alibi_wt103_L51")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    variables = ["FAIRSEQ_CACHE", "PYTORCH_FAIRSEQ_CACHE", "TORCH_HOME", "XDG_CACHE_HOME"]
    for variable in variables:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    found = [download.cache_folder()]
    for variable in reversed(variables):
        monkeypatch.setenv(variable, f"/{variable.lower()}")
        found.append(download.cache_folder())
    assert [str(folder) for folder in found] == [
        "/home/me/.cache/torch/pytorch_fairseq/alibi_wt103",
        "/xdg_cache_home/torch/pytorch_fairseq/alibi_wt103",
        "/torch_home/pytorch_fairseq/alibi_wt103",
        "/pytorch_fairseq_cache/alibi_wt103",
        "/fairseq_cache/alibi_wt103",
    ]


def test_downloaded_once_and_compared_afterwards(web, tmp_path):
    web.faults = ["drop", 503]
    path = download.published_checkpoint(NAME)
    assert path == tmp_path / f"cache/alibi_wt103/{NAME}.pt"
    assert path.read_bytes() == CHECKPOINT
    sidecar = path.with_name(f"{NAME}.pt.sha256")
    assert sidecar.read_text() == f"{SHA256}  {NAME}.pt\n"
    requests = len(web.ranges)
    assert download.published_checkpoint(NAME, sha256=SHA256) == path
    assert len(web.ranges) == requests

    damaged = bytearray(CHECKPOINT)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"not {SHA256} as recorded in .*remove it"):
        download.published_checkpoint(NAME)
    # The sidecar stays: another file in its place is noticed also when it is downloaded again.
    path.unlink()
    web.files[f"models/{NAME}.pt"] = (GOLDEN / "ckpt/gpt_tiny/checkpoint_last.pt").read_bytes()
    with pytest.raises(ValueError, match=f"not {SHA256} as recorded in"):
        download.published_checkpoint(NAME)


def test_a_demanded_hash(web, tmp_path):
    with pytest.raises(DownloadError, match=f"has the SHA-256 {SHA256}, not {'0' * 64}"):
        download.published_checkpoint(NAME, sha256="0" * 64)
    assert not list((tmp_path / "cache").rglob("*.pt*"))
    path = download.published_checkpoint(NAME, sha256=SHA256)
    with pytest.raises(ValueError, match=f"has the SHA-256 {SHA256}, not {'0' * 64} as asked for"):
        download.published_checkpoint(NAME, sha256="0" * 64)
    assert path.read_bytes() == CHECKPOINT


@pytest.mark.parametrize(
    "body",
    [b"<html>moved</html>", b"", CHECKPOINT[: len(CHECKPOINT) // 2], CHECKPOINT[:-1]],
    ids=["a page", "nothing", "half", "a byte less"],
)
def test_what_is_no_checkpoint_is_not_kept(web, tmp_path, body):
    web.files[f"models/{NAME}.pt"] = body
    with pytest.raises(ValueError, match=rf"{NAME}\.pt\.part"):
        download.published_checkpoint(NAME)
    assert not list((tmp_path / "cache").rglob("*.pt*"))


def test_a_file_put_there_by_hand_is_recorded_too(web, tmp_path):
    (tmp_path / f"{NAME}.pt").write_bytes(CHECKPOINT)
    assert download.published_checkpoint(NAME, folder=tmp_path) == tmp_path / f"{NAME}.pt"
    assert (tmp_path / f"{NAME}.pt.sha256").read_text().startswith(SHA256)
    assert web.ranges == []


def test_the_log(web, tmp_path):
    path = download.published_log(NAME, folder=tmp_path)
    assert path.read_text() == "log\n"
    assert download.published_log(NAME, folder=tmp_path) == path
    assert len(web.ranges) == 1


def test_the_dictionary_has_to_be_prepared_once(web, tmp_path, monkeypatch, small_vocabulary):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"without its dictionary.*fairseq-preprocess"):
        download.published_data(NAME)
    assert download.published_data(NAME, GOLDEN / "bin/main") == GOLDEN / "bin/main"
    download.keep_dictionary(GOLDEN / "bin/main/dict.txt")
    cache = tmp_path / "cache" / "alibi_wt103"
    assert download.published_data(NAME) == download.published_data(NAME, ".") == cache
    with pytest.raises(FileNotFoundError, match=r"other/dict\.txt"):
        download.published_data(NAME, "other")


def test_another_dictionary_is_noticed(web, tmp_path):
    with pytest.raises(ValueError, match=r"symbols, alibi_wt103_L512 was trained with 267,744"):
        download.published_data(NAME, GOLDEN / "bin/main")
    with pytest.raises(ValueError, match="needs the dictionary of all of WikiText-103"):
        download.keep_dictionary(GOLDEN / "bin/main/dict.txt")
    assert not (tmp_path / "cache").exists()
