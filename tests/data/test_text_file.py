"""Chunks of a text file, and functions applied to them."""

import io
import itertools
import os
import re
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq.data import text_file
from fairseq.data.text_file import (
    check_text_file,
    map_chunks,
    read_chunk,
    split_lines,
    text_chunks,
)

NASTY = st.text(
    st.sampled_from("ab \t\n\r\n\r\u2028\u0085\x0b\x0c\x1c\u3000\xa0\ufeff\x00\U0001f600"),
    max_size=60,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("text") / "text.txt"


@given(NASTY)
def test_lines_are_those_that_python_reads(text):
    lines = split_lines(text)
    expected = [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]
    assert (lines if lines[-1] else lines[:-1]) == expected


@given(NASTY, st.integers(1, 20), st.booleans())
def test_chunks_are_the_file_and_cut_nothing(path, text, chunk_bytes, whole_lines):
    path.write_bytes(text.encode())
    parts = [read_chunk(c) for c in text_chunks(path, chunk_bytes, whole_lines=whole_lines)]
    assert "".join(parts) == text
    for part, following in itertools.pairwise(parts):
        assert part[-1] in ("\r\n" if whole_lines else "\r\n ")
        assert not (part[-1] == "\r" and following[0] == "\n")


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r", " "])
def test_chunks_are_small_whatever_ends_the_lines(path, line_end):
    path.write_bytes(f"word{line_end}".encode() * 1000)
    sizes = [chunk.end - chunk.start for chunk in text_chunks(path, 100)]
    assert max(sizes) <= 100 and min(sizes[:-1]) > 90


def test_a_line_longer_than_a_chunk_stays_whole_if_asked(path):
    path.write_bytes(b"a\n" + b"b " * 500 + b"\nc\n")
    chunks = [read_chunk(chunk) for chunk in text_chunks(path, 10, whole_lines=True)]
    assert "b " * 500 + "\n" in "".join(chunks[1:2])


@pytest.mark.parametrize("chunk_bytes", [3, 7, 1 << 20])
def test_bad_utf8_is_located(path, chunk_bytes):
    path.write_bytes("é\r\nb c\rd e\n f ".encode() + b"g\xffh\n" + b"more\n" * 10)
    with pytest.raises(ValueError, match=r"text.txt: not UTF-8: byte 0xff at offset 16, in line 4"):
        for chunk in text_chunks(path, chunk_bytes):
            read_chunk(chunk)


def test_a_character_cut_off_at_the_end_is_located(path):
    path.write_bytes(b"a\nb " + "é".encode()[:1])
    with pytest.raises(ValueError, match=r"byte 0xc3 at offset 4, in line 2"):
        list(map_chunks(len, path))


def test_missing_empty_and_irregular_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        check_text_file(tmp_path / "nothing.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        check_text_file(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="not a regular file"):
        check_text_file(tmp_path)


@pytest.fixture
def numbers(path, monkeypatch):
    """A text of the numbers 0 to 99, one per line, in chunks of a few lines."""
    monkeypatch.setattr(text_file, "CHUNK_BYTES", 10)
    path.write_text("".join(f"{number}\n" for number in range(100)))
    return path


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_come_in_the_order_of_the_file(numbers, workers):
    done = []
    results = map_chunks(str.split, numbers, workers=workers, on_progress=done.append)
    assert [int(word) for words in results for word in words] == list(range(100))
    assert sum(done) == os.path.getsize(numbers) and len(done) > 20


def fail_at_50(text):
    if re.search(r"\b50\b", text):
        raise ValueError("found 50")


def kill_at_50(text):
    if re.search(r"\b50\b", text):
        os.kill(os.getpid(), signal.SIGKILL)


def test_errors_of_workers_arrive(numbers):
    with pytest.raises(ValueError, match="found 50"):
        list(map_chunks(fail_at_50, numbers, workers=2))
    with numbers.open("ab") as file:
        file.write(b"\xff\n")
    with pytest.raises(ValueError, match="not UTF-8: byte 0xff at offset 290, in line 101"):
        list(map_chunks(len, numbers, workers=2))


def test_a_killed_worker_is_noticed(numbers):
    with pytest.raises(RuntimeError, match="--workers"):
        list(map_chunks(kill_at_50, numbers, workers=2))
