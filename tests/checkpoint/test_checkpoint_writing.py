"""Whole files or none, in the foreground and in the background."""

from __future__ import annotations

import errno
import os
import threading

import pytest
import torch

from fairseq.checkpoint import writing
from fairseq.checkpoint.writing import (
    BackgroundWriter,
    copy_atomically,
    save_atomically,
    snapshot,
    write_atomically,
)


def _load(path):
    return torch.load(path, weights_only=True)


def test_a_save_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "a.pt"
    save_atomically({"x": 1}, path)
    save_atomically({"x": 2}, path)
    assert _load(path) == {"x": 2}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_what_cannot_be_serialized_raises_and_keeps_the_file_before(tmp_path):
    path = tmp_path / "a.pt"
    save_atomically({"x": 1}, path)
    with pytest.raises((TypeError, AttributeError)):
        save_atomically({"x": threading.Lock()}, path)
    assert _load(path) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.pt"]


class _FullDisk:
    """A stream that takes some bytes and then no more."""

    def __init__(self, stream, room, error):
        self._stream, self._room, self._error = stream, room, error

    def write(self, data):
        self._room -= len(data)
        if self._room < 0:
            raise self._error
        return self._stream.write(data)

    def __getattr__(self, name):
        return getattr(self._stream, name)


def _break_disk(monkeypatch, error, times=10**9):
    """Makes the first `times` saves fail after 300 bytes."""
    left = [times]
    whole = writing._torch_save

    def save(obj, stream):
        left[0] -= 1
        whole(obj, _FullDisk(stream, 300, error) if left[0] >= 0 else stream)

    monkeypatch.setattr(writing, "_torch_save", save)
    monkeypatch.setattr(writing, "_PAUSE_S", 0.0)


def test_a_full_disk_is_named_and_keeps_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_last.pt"
    save_atomically({"x": torch.zeros(10)}, path)
    _break_disk(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="not written: No space left") as caught:
        save_atomically({"x": torch.zeros(100_000)}, path)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert _load(path)["x"].shape == (10,)
    assert os.listdir(tmp_path) == ["checkpoint_last.pt"]


def test_a_passing_failure_is_tried_again(tmp_path, monkeypatch, caplog):
    _break_disk(monkeypatch, OSError(errno.EIO, "Input/output error"), times=2)
    save_atomically({"x": torch.zeros(1000)}, tmp_path / "a.pt")
    assert _load(tmp_path / "a.pt")["x"].shape == (1000,)
    assert caplog.text.count("trying again") == 2


def test_a_lasting_failure_is_raised_after_three_tries(tmp_path, monkeypatch):
    _break_disk(monkeypatch, OSError(errno.EIO, "Input/output error"), times=3)
    with pytest.raises(OSError, match="Input/output error"):
        save_atomically({"x": torch.zeros(1000)}, tmp_path / "a.pt")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("can_link", [True, False])
def test_a_copy_is_whole_and_independent(tmp_path, monkeypatch, can_link):
    if not can_link:

        def refuse(*_):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    source, target = tmp_path / "a.pt", tmp_path / "b.pt"
    save_atomically({"x": 1}, source)
    save_atomically({"x": 0}, target)
    copy_atomically(source, target)
    copy_atomically(source, target)  # once more onto what is the same file already
    save_atomically({"x": 2}, source)
    assert _load(target) == {"x": 1}
    assert _load(source) == {"x": 2}
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt"]


def test_what_an_interrupted_copy_left_is_not_written_into(tmp_path):
    good, path = tmp_path / "good.pt", tmp_path / "a.pt"
    save_atomically({"x": 1}, good)
    os.link(good, tmp_path / "a.pt.tmp")
    save_atomically({"x": 2}, path)
    assert _load(good) == {"x": 1}
    assert _load(path) == {"x": 2}


def test_a_snapshot_does_not_see_later_changes():
    weight = torch.zeros(3)
    state = {"model": {"w": weight, "tied": weight}, "groups": [(weight, 1)], "n": 3}
    copied = snapshot(state)
    weight += 1
    assert copied["model"]["w"].tolist() == [0, 0, 0]
    assert copied["model"]["w"] is copied["model"]["tied"]
    assert copied["groups"][0][0].tolist() == [0, 0, 0]
    assert copied["n"] == 3


def test_background_work_is_done_in_order_and_its_failure_is_raised():
    writer, done, gate = BackgroundWriter(), [], threading.Event()
    writer.submit(lambda: (gate.wait(10), done.append(1)))
    writer.submit(lambda: done.append(2))
    assert done == []
    gate.set()
    writer.wait()
    assert done == [1, 2]

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.submit(fail)
    with pytest.raises(OSError, match="No space left"):
        writer.wait()
    writer.wait()


def test_a_failure_inside_the_writing_function_removes_the_half_written_file(tmp_path):
    def write(stream):
        stream.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.bin", write)
    assert os.listdir(tmp_path) == []
