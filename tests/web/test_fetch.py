"""Downloads from a server that fails in every way: whole or not there."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest
from web_server import serving

from fairseq import fetch as fetch_module
from fairseq.fetch import DownloadError, fetch

BODY = bytes(range(256)) * 40


@pytest.fixture
def web():
    with serving(file=BODY) as server:
        yield server


@pytest.fixture
def get(web, tmp_path, monkeypatch):
    """Fetches the file; returns its place."""
    monkeypatch.setattr(fetch_module, "PAUSE_S", 0.001)

    def run(**options) -> Path:
        return fetch(f"{web.url}/file", tmp_path / "folder" / "file.bin", timeout_s=5, **options)

    return run


def names(tmp_path):
    folder = tmp_path / "folder"
    return sorted(path.name for path in folder.iterdir())


def test_a_file_comes_whole_and_alone(get, web, tmp_path):
    assert get().read_bytes() == BODY
    assert names(tmp_path) == ["file.bin"]
    assert web.ranges == [None]
    assert web.agents == ["fairseq-alibi"]
    get(headers={"User-Agent": "Mozilla/5.0"})
    assert web.agents[1] == "Mozilla/5.0"


def test_a_dropped_connection_goes_on_where_it_broke(get, web):
    web.faults = ["drop", "drop"]
    assert get().read_bytes() == BODY
    half, quarter = len(BODY) // 2, len(BODY) // 4
    assert web.ranges == [None, f"bytes={half}-", f"bytes={half + quarter}-"]


def test_what_an_earlier_run_left_is_used(get, web, tmp_path):
    web.faults = ["drop"]
    with pytest.raises(DownloadError, match=rf"1 tries brought nothing more than {5120:,} bytes"):
        get(tries=1)
    assert names(tmp_path) == ["file.bin.part", "file.bin.part.json"]
    assert get().read_bytes() == BODY
    assert web.ranges == [None, "bytes=5120-"]


def test_another_version_on_the_server_is_taken_from_its_start(get, web):
    web.faults = ["drop"]
    with pytest.raises(DownloadError):
        get(tries=1)
    web.files["file"] = b"new" * 3000
    assert get().read_bytes() == b"new" * 3000


def test_without_a_mark_of_the_version_nothing_is_resumed(get, web):
    web.has_etag = False
    web.faults = ["drop"]
    assert get().read_bytes() == BODY
    assert web.ranges == [None, None]


def test_a_part_from_elsewhere_is_not_used(get, web, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file.bin.part").write_bytes(b"something else")
    (tmp_path / "folder/file.bin.part.json").write_text('{"url": "http://else", "validator": "x"}')
    assert get().read_bytes() == BODY
    (tmp_path / "folder/file.bin.part").write_bytes(b"something else")
    (tmp_path / "folder/file.bin.part.json").write_text("[broken")
    assert get().read_bytes() == BODY
    assert web.ranges == [None, None]


@pytest.mark.parametrize("fault", ["ignore range", "wrong range"])
def test_servers_that_misunderstand_ranges(get, web, fault):
    web.faults = ["drop", fault]
    assert get().read_bytes() == BODY


def test_a_complete_part_only_has_to_be_moved(get, web, tmp_path):
    web.faults = ["drop"]
    with pytest.raises(DownloadError):
        get(tries=1)
    part = tmp_path / "folder/file.bin.part"
    part.write_bytes(BODY)
    assert get().read_bytes() == BODY
    # One that is too long cannot be a part of it.
    web.faults = ["drop"]
    with pytest.raises(DownloadError):
        get(tries=1)
    part.write_bytes(BODY + b"x")
    assert get().read_bytes() == BODY


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_a_refusal_is_final(get, web, tmp_path, status):
    web.faults = [status]
    with pytest.raises(DownloadError, match=f"the server answers {status}"):
        get()
    assert len(web.ranges) == 1
    assert names(tmp_path) == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(get, web, status):
    web.faults = [status, "drop", status, status]
    web.retry_after = "0"
    assert get().read_bytes() == BODY
    assert len(web.ranges) == 5


def test_a_server_that_stays_busy_is_given_up(get, web, tmp_path):
    web.faults = [503] * 9
    with pytest.raises(DownloadError, match=r"503 .*; 3 tries brought nothing more than 0 bytes"):
        get(tries=3)
    assert len(web.ranges) == 3
    assert names(tmp_path) == []


def test_waits_double_and_the_server_may_ask_for_more(get, web, monkeypatch):
    waits = []
    monkeypatch.setattr(fetch_module.time, "sleep", waits.append)
    web.faults = [503] * 4
    get(pause_s=1)
    assert waits == [1, 2, 4, 8]
    web.faults, web.retry_after = [503], "9"
    get(pause_s=1)
    web.faults, web.retry_after = [503], "86400"
    get(pause_s=1)
    assert waits[4:] == [9, 60]


@pytest.mark.parametrize("lie", [1, 10_000])
def test_a_file_shorter_than_announced_is_never_whole(get, web, tmp_path, lie):
    web.lie = lie
    with pytest.raises(DownloadError, match="tries brought nothing more"):
        get()
    assert "file.bin" not in names(tmp_path)


def test_a_file_longer_than_announced_is_caught_by_its_hash(get, web, tmp_path):
    web.lie = -1
    with pytest.raises(DownloadError, match="SHA-256"):
        get(sha256=hashlib.sha256(BODY).hexdigest())
    assert names(tmp_path) == []


def test_a_length_is_needed_unless_the_hash_is_known(get, web, tmp_path):
    web.announce = False
    with pytest.raises(DownloadError, match="does not say how long the file is"):
        get()
    assert "file.bin" not in names(tmp_path)
    assert get(sha256=hashlib.sha256(BODY).hexdigest()).read_bytes() == BODY
    web.faults = ["drop"]
    with pytest.raises(DownloadError, match="SHA-256"):
        get(sha256=hashlib.sha256(BODY).hexdigest())


def test_a_wrong_hash_leaves_what_was_there_before(get, web, tmp_path):
    path = get()
    web.files["file"] = b"forged"
    wanted = hashlib.sha256(BODY).hexdigest()
    with pytest.raises(DownloadError, match=f"not {wanted}; it was not kept"):
        get(sha256=wanted.upper())
    assert path.read_bytes() == BODY
    assert names(tmp_path) == ["file.bin"]


def test_a_check_of_ones_own(get, tmp_path):
    def refuse(path):
        assert path.read_bytes() == BODY
        raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        get(check=refuse)
    assert names(tmp_path) == []


def test_no_server_and_no_web_address(tmp_path):
    with serving() as server:
        gone = server.url
    with pytest.raises(DownloadError, match="no connection"):
        fetch(f"{gone}/x", tmp_path / "x", tries=2, pause_s=0.001)
    with pytest.raises(ValueError, match="no http or https address"):
        fetch("file:///etc/passwd", tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_a_disk_without_room_is_noticed_before(get, web, monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 9))
    with pytest.raises(OSError, match=r"10,240 bytes are to come, 9 are free"):
        get()
    assert "file.bin" not in names(tmp_path)


def test_several_at_once_download_it_once(get, web, monkeypatch):
    all_have_looked = threading.Barrier(4)
    alone = fetch_module._alone

    def alone_later(target):
        all_have_looked.wait()
        return alone(target)

    monkeypatch.setattr(fetch_module, "_alone", alone_later)
    web.faults = ["drop"]
    found = []
    threads = [threading.Thread(target=lambda: found.append(get())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in found] == [BODY] * 4
    assert len(web.ranges) == 2
