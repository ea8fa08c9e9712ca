"""Reading a text file in chunks, by one process or by several, in bounded memory.

Files are UTF-8; a line ends with `\\n`, `\\r\\n` or a lone `\\r`, and with nothing else. A chunk is
a range of bytes that ends where a line ends or, in a line longer than a chunk, after a space, so
that no character, word or line end is ever cut. Chunks depend on the file alone, never on who reads
them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fairseq.utils import end_with_parent

__all__ = [
    "Chunk",
    "check_text_file",
    "decode_lines",
    "map_chunks",
    "read_chunk",
    "read_lines",
    "split_lines",
    "text_chunks",
]

CHUNK_BYTES = 1 << 20
"""Size of a chunk unless a line or word does not fit: about 15 MB of memory while it is encoded."""

T = TypeVar("T")


class Chunk(NamedTuple):
    """A range of bytes of a text file, `end` not included."""

    path: str
    start: int
    end: int


def check_text_file(path: str | Path) -> None:
    """Checks that there is a text to read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no regular file, or empty.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no text file {path}")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a regular file; a text file is read more than once")
    if os.path.getsize(path) == 0:
        raise ValueError(f"{path} is empty; give a text of at least one line, or leave it out")


def text_chunks(
    path: str | Path, chunk_bytes: int = 0, *, whole_lines: bool = False
) -> Iterator[Chunk]:
    """Yields the chunks of a file in order; together they are the file.

    Args:
        path: the text file.
        chunk_bytes: size of a chunk, more where nothing can be cut; 0 for the default.
        whole_lines: never cut within a line, however long.
    """
    size = os.path.getsize(path)
    limit = chunk_bytes or CHUNK_BYTES
    with open(path, "rb") as file:
        start = 0
        while start < size:
            length = limit
            taken = 0
            while not taken and start + length < size:
                file.seek(start)
                taken = _length_of_chunk(file.read(length), whole_lines)
                length *= 2
            end = start + taken if taken else size
            yield Chunk(str(path), start, end)
            start = end


def _length_of_chunk(window: bytes, whole_lines: bool) -> int:
    """Returns how many bytes of a window can be cut off, 0 if none."""
    # A carriage return in the last byte may be the first half of a line end.
    cut = max(window.rfind(b"\n"), window.rfind(b"\r", 0, len(window) - 1)) + 1
    if cut or whole_lines:
        return cut
    return window.rfind(b" ") + 1


def read_chunk(chunk: Chunk) -> str:
    """Returns the text of a chunk, its line ends as they are in the file.

    Raises:
        ValueError: the bytes are not UTF-8; the message says where.
        OSError: the file became shorter meanwhile.
    """
    with open(chunk.path, "rb") as file:
        file.seek(chunk.start)
        data = file.read(chunk.end - chunk.start)
    if len(data) != chunk.end - chunk.start:
        raise OSError(f"{chunk.path} became shorter while it was read")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = chunk.start + error.start
        line = _line_number(chunk.path, offset)
        raise ValueError(
            _not_utf8(chunk.path, error, f"at offset {offset}, in line {line}")
        ) from None


def _not_utf8(name: str, error: UnicodeDecodeError, place: str) -> str:
    bad = error.object[error.start : error.start + 1]
    return (
        f"{name}: not UTF-8: byte 0x{bad.hex()} {place} ({error.reason}); convert the text, for "
        "example with `iconv -f LATIN1 -t UTF-8`"
    )


def decode_lines(file: Iterable[bytes], name: str) -> Iterator[str]:
    """Yields the lines of what can be read once, such as a pipe, each as soon as it is there.

    Args:
        file: the lines as bytes, each up to and with its `\\n`.
        name: what is read, for messages.

    Raises:
        ValueError: a line is not UTF-8.
    """
    number = 1
    for data in file:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            number += len(split_lines(data[: error.start].decode("utf-8"))) - 1
            raise ValueError(_not_utf8(name, error, f"in line {number}")) from None
        # A lone carriage return ends a line too; what follows the last end is no line.
        lines = split_lines(text)
        if not lines[-1]:
            lines.pop()
        number += len(lines)
        yield from lines


def _line_number(path: str, offset: int) -> int:
    """Returns the number, from 1, of the line that a byte of a file stands in."""
    number = 1
    for chunk in text_chunks(path):
        with open(path, "rb") as file:
            file.seek(chunk.start)
            data = file.read(min(chunk.end, offset) - chunk.start)
        number += data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")
        if chunk.end >= offset:
            break
    return number


def split_lines(text: str) -> list[str]:
    """Splits a text at its line ends.

    Returns:
        The lines without their ends; the last entry is what follows the last line end, mostly "".
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.split("\n")


def read_lines(path: str | Path) -> Iterator[str]:
    """Yields the lines of a text file without their ends; raises what `read_chunk` raises."""
    rest = ""
    for chunk in text_chunks(path):
        lines = split_lines(read_chunk(chunk))
        lines[0] = rest + lines[0]
        rest = lines.pop()
        yield from lines
    if rest:
        yield rest


def map_chunks(
    function: Callable[[str], T],
    path: str | Path,
    *,
    workers: int = 1,
    whole_lines: bool = False,
    on_progress: Callable[[int], object] | None = None,
) -> Iterator[T]:
    """Applies a function to the text of each chunk of a file; yields the results in order.

    Args:
        function: what to do with a text; for several workers it and its results can be pickled.
        path: the text file.
        workers: most processes to use; a file of one chunk is read in this one.
        whole_lines: see `text_chunks`.
        on_progress: called with the number of bytes done since the last call.

    Raises:
        ValueError: from `function` or for a text that is not UTF-8, whichever process found it.
        RuntimeError: a process was killed.
    """
    chunks = list(text_chunks(path, whole_lines=whole_lines))
    task = _ReadAndApply(function)
    for chunk, result in zip(chunks, _ordered_map(task, chunks, workers), strict=True):
        if on_progress is not None:
            on_progress(chunk.end - chunk.start)
        yield result


class _ReadAndApply:
    def __init__(self, function: Callable[[str], Any]) -> None:
        self.function = function

    def __call__(self, chunk: Chunk) -> Any:
        return self.function(read_chunk(chunk))


def _ordered_map(task: Callable[[Chunk], T], chunks: list[Chunk], workers: int) -> Iterable[T]:
    workers = min(workers, len(chunks))
    return map(task, chunks) if workers <= 1 else _pool_map(task, chunks, workers)


def _pool_map(task: Callable[[Chunk], T], chunks: list[Chunk], workers: int) -> Iterator[T]:
    """Maps in a pool of processes, with a bounded number of results waiting to be fetched."""
    pool = ProcessPoolExecutor(workers, _pool_context(), _start_worker, (task,))
    waiting: deque[Future[T]] = deque()
    try:
        for chunk in chunks:
            waiting.append(_submit(pool, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process was killed, perhaps for lack of memory; try fewer --workers"
        ) from error
    except ValueError as error:
        raise error.with_traceback(None)  # noqa: B904  (the worker's traceback is its cause)
    finally:
        pool.shutdown(cancel_futures=True)


def _pool_context() -> Any:
    # Forked workers share the dictionary instead of unpickling it each; this code is the only one
    # that runs in them. Elsewhere than on Linux forking is not safe, so the default is used.
    return multiprocessing.get_context("fork" if sys.platform == "linux" else None)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Handles SIGINT and SIGTERM that come meanwhile at the end, as forks of processes need it.

    What a handler raises in the functions that Python calls around a fork gets lost, and a worker
    would die of a ctrl-C that reaches it before it ignores them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    found = {int(number): signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    handlers = {number: handler for number, handler in found.items() if handler is not None}
    try:
        for number in handlers:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _submit(pool: ProcessPoolExecutor, chunk: Chunk) -> Future[Any]:
    with _signals_held(), warnings.catch_warnings():
        # Python >= 3.12 warns of forking beside the threads of numerical libraries, none of which
        # the workers use.
        warnings.simplefilter("ignore", DeprecationWarning)
        return pool.submit(_work, chunk)


_task: Callable[[Chunk], Any]


def _start_worker(task: Callable[[Chunk], Any]) -> None:
    """Prepares a worker process: it holds the task and ends when its parent does."""
    global _task
    _task = task
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()


def _work(chunk: Chunk) -> Any:
    return _task(chunk)
