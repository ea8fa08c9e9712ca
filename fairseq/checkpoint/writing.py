"""Files that are either whole or not there, written now or in the background."""

from __future__ import annotations

import atexit
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = [
    "BackgroundWriter",
    "copy_atomically",
    "save_atomically",
    "snapshot",
    "sync_folder",
    "write_atomically",
]

logger = logging.getLogger(__name__)

_TRIES = 3
_PAUSE_S = 1.0
# Errors that another try a moment later does not mend.
_LASTING = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EROFS, errno.ENOENT, errno.EISDIR),
}


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    """Writes a file beside its place and moves it there when it is complete and on the disk.

    A failure leaves the file that was there before untouched, and nothing half written.
    """
    path = Path(path)
    temporary = _free_name_beside(path)
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def _free_name_beside(path: Path) -> Path:
    """Returns the temporary name for a file, free of what an interrupted run left there.

    What is left may be a second link of a good file, so it is removed, never written into.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    return temporary


def save_atomically(obj: Any, path: str | os.PathLike[str]) -> None:
    """Writes `torch.save(obj)` to a file, whole or not at all.

    Raises:
        OSError: it could not be written, after three tries where trying again can help.
    """
    for left in reversed(range(_TRIES)):
        try:
            write_atomically(path, lambda stream: _torch_save(obj, stream))
            return
        except OSError as error:
            if left and error.errno not in _LASTING:
                logger.warning(f"writing {path} failed ({error}); trying again")
                time.sleep(_PAUSE_S)
                continue
            raise OSError(
                error.errno,
                f"checkpoint not written: {error.strerror or error}; "
                "a file of that name from before is unchanged",
                str(path),
            ) from error


class _Watched:
    """A stream that remembers why writing failed; torch reports such failures without the cause."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._stream.flush()


def _torch_save(obj: Any, stream: BinaryIO) -> None:
    watched = _Watched(stream)
    try:
        torch.save(obj, watched)  # type: ignore[arg-type]
    except RuntimeError as error:
        if watched.error is not None:
            raise watched.error from error
        raise


def copy_atomically(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Gives a file a second name, by a hard link where the file system can, else by a copy.

    Files written by this module are replaced and never changed in place, so a link is as good as
    a copy.
    """
    target = Path(target)
    temporary = _free_name_beside(target)
    try:
        os.link(source, temporary)
    except OSError:
        with Path(source).open("rb") as stream:
            write_atomically(target, lambda out: shutil.copyfileobj(stream, out, 1 << 22))
        return
    try:
        # Renaming one link of a file onto another of its links does nothing; then both names stay.
        os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink()
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename last, where the system lets folders be synchronised."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def snapshot(value: Any) -> Any:
    """Copies every tensor in nested containers, so that training may go on changing its own."""
    return _copied(value, {})


def _copied(value: Any, done: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if id(value) not in done:
            done[id(value)] = value.detach().to("cpu", copy=True)
        return done[id(value)]
    if isinstance(value, Mapping):
        return {key: _copied(item, done) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, done) for item in value)
    return value


class BackgroundWriter:
    """Does file work in one background thread, in the order in which it was handed over.

    A failure is raised by the next `submit` or `wait`, in the thread that trains.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    def submit(self, work: Callable[[], None]) -> None:
        """Hands over work; raises what earlier work failed with."""
        self._raise_failures(wait=False)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
            atexit.register(self._report_failures)
        self._pending.append(self._pool.submit(work))

    def wait(self) -> None:
        """Waits until everything is written; raises what it failed with."""
        self._raise_failures(wait=True)

    def _raise_failures(self, *, wait: bool) -> None:
        while self._pending and (wait or self._pending[0].done()):
            self._pending.pop(0).result()

    def _report_failures(self) -> None:
        """Says aloud, when the process ends, what nobody waited for."""
        for work in self._pending:
            if (error := work.exception()) is not None:
                logger.error(f"a checkpoint was not written: {error}")
