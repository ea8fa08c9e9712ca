"""Files from the web that are either whole or not there.

A file grows beside its place under the name `<name>.part`, with `<name>.part.json` telling which
version of it the server gave. It moves to its place when as many bytes as announced have come, its
hash fits where one is known, and it is on the disk. A broken transfer goes on where it stopped, as
long as the server still has the same version.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

__all__ = ["DownloadError", "fetch", "hash_of"]

logger = logging.getLogger(__name__)

TRIES = 5
PAUSE_S = 1.0
TIMEOUT_S = 60.0
_LONGEST_PAUSE_S = 60.0
_CHUNK = 1 << 20
# Answers after which the same request can succeed a little later.
_PASSING = {408, 425, 429, 500, 502, 503, 504}


class DownloadError(OSError):
    """A file could not be had; the message says from where and why."""


@dataclass(frozen=True)
class _Part:
    """What is there of a file: its bytes, and which version they belong to."""

    path: Path

    @property
    def record(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def known(self) -> dict[str, Any]:
        """Returns the address, the mark of the version and the length that belong to the bytes."""
        try:
            known = json.loads(self.record.read_text())
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def validator(self, url: str) -> str | None:
        """Returns the mark of the version that the bytes belong to; None if they are of no use."""
        known = self.known()
        return known.get("validator") if known.get("url") == url and self.size() else None

    def begin(self, url: str, validator: str | None, total: int | None) -> None:
        self.path.write_bytes(b"")
        self.record.write_text(json.dumps({"url": url, "validator": validator, "total": total}))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)


def fetch(
    url: str,
    path: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    check: Callable[[Path], None] | None = None,
    headers: dict[str, str] | None = None,
    tries: int | None = None,
    pause_s: float | None = None,
    timeout_s: float | None = None,
) -> Path:
    """Downloads a file, going on with what an interrupted download left.

    Args:
        url: http or https.
        path: where it goes; a file there is replaced when the new one is whole.
        sha256: what its hash must be, in hexadecimal digits.
        check: called with the complete file before it takes its place; raises what is wrong.
        headers: more for the request.
        tries: requests in a row that may bring nothing new, 5 by default. In between it waits 1, 2,
            4, ... s, or as long as the server asks for, at most a minute.
        pause_s: the first wait, in seconds.
        timeout_s: silence after which a connection counts as broken, 60 s by default.

    Returns:
        `path`.

    Raises:
        ValueError: the address is not http or https.
        DownloadError: the server refuses, keeps failing, does not say how long the file is, or
            gives a file with another hash.
        OSError: the disk is full or not writable.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url!r} is no http or https address")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _Part(target.with_name(target.name + ".part"))
    before = _stamp(target)
    with _alone(target):
        if _stamp(target) != before:
            return target  # another process has downloaded it while this one waited
        _transfer(
            url,
            part,
            headers or {},
            tries=TRIES if tries is None else tries,
            pause_s=PAUSE_S if pause_s is None else pause_s,
            timeout_s=TIMEOUT_S if timeout_s is None else timeout_s,
            is_checked=sha256 is not None,
        )
        _accept(url, part, target, sha256, check)
    return target


def _accept(
    url: str, part: _Part, target: Path, sha256: str | None, check: Callable[[Path], None] | None
) -> None:
    """Moves a complete file to its place if it is what it should be, else removes it."""
    try:
        found = hash_of(part.path) if sha256 is not None else None
        if sha256 is not None and found != sha256.lower():
            raise DownloadError(
                f"{url} has the SHA-256 {found}, not {sha256.lower()}; it was not kept"
            )
        if check is not None:
            check(part.path)
    except (ValueError, DownloadError):
        part.remove()
        raise
    os.replace(part.path, target)
    part.record.unlink(missing_ok=True)
    _sync_folder(target.parent)


def _transfer(
    url: str,
    part: _Part,
    headers: dict[str, str],
    *,
    tries: int,
    pause_s: float,
    timeout_s: float,
    is_checked: bool,
) -> None:
    """Brings the part to its full length, with as many requests as it takes."""
    failures, most = 0, part.size()
    while True:
        try:
            _request(url, part, headers, timeout_s, is_checked)
            return
        except _Passing as problem:
            failures = 1 if part.size() > most else failures + 1
            most = max(most, part.size())
            if failures >= tries:
                raise DownloadError(
                    f"{url}: {problem}; {tries} tries brought nothing more than "
                    f"{part.size():,} bytes. The same command goes on from there"
                ) from problem
            pause = min(max(pause_s * 2 ** (failures - 1), problem.wait_s), _LONGEST_PAUSE_S)
            logger.warning(f"{url}: {problem}; trying again in {pause:g} s")
            time.sleep(pause)


class _Passing(Exception):
    """A failure that another try may mend; `wait_s` is what the server asks to wait."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


def _request(
    url: str, part: _Part, headers: dict[str, str], timeout_s: float, is_checked: bool
) -> None:
    """Makes one request and appends what comes; returns if the file is complete."""
    validator = part.validator(url)
    sent = {"User-Agent": "fairseq-alibi", "Accept-Encoding": "identity", **headers}
    if validator is not None:
        sent |= {"Range": f"bytes={part.size()}-", "If-Range": validator}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=sent), timeout=timeout_s
        ) as answer:
            _receive(url, answer, part, is_checked)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            _end_of_range(error, part)
            return
        _refused(url, error)
    except urllib.error.URLError as error:
        raise _Passing(f"no connection ({error.reason})") from error
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise _Passing(f"the connection broke ({type(error).__name__})") from error


def _refused(url: str, error: urllib.error.HTTPError) -> None:
    reason = f"the server answers {error.code} {error.reason}"
    if error.code not in _PASSING:
        raise DownloadError(f"{url}: {reason}") from error
    wait = error.headers.get("Retry-After") or ""
    raise _Passing(reason, float(wait) if wait.isdigit() else 0.0) from error


def _end_of_range(error: urllib.error.HTTPError, part: _Part) -> None:
    """The server has nothing after our bytes: they are all, or not of this version."""
    total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range") or "")
    sizes = {part.size(), part.known().get("total"), int(total.group(1)) if total else None}
    if len(sizes) > 1:
        part.remove()
        raise _Passing("what was there of the file did not fit it, and is removed") from error


def _receive(url: str, answer: Any, part: _Part, is_checked: bool) -> None:
    """Appends an answer's body to the part; raises if it is shorter than announced."""
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError(f"{url}: the server sends it compressed, though asked not to")
    length = answer.headers.get("Content-Length")
    total: int | None
    if answer.status == 206:
        total = _total_of(answer, part)
    else:
        total = None if length is None else int(length)
        part.begin(url, _validator(answer), total)
    is_framed = "chunked" in (answer.headers.get("Transfer-Encoding") or "")
    if total is None and not is_framed and not is_checked:
        raise DownloadError(
            f"{url}: the server does not say how long the file is, so nobody can tell whether it "
            "came whole; give its SHA-256"
        )
    _check_space(part, total)
    with part.path.open("ab") as out:
        _copy(answer, out)
    if total is not None and part.size() != total:
        raise _Passing(f"it broke off at {part.size():,} of {total:,} bytes")


def _total_of(answer: Any, part: _Part) -> int:
    """Returns the length of the whole file; the answer must begin where our bytes end."""
    text = answer.headers.get("Content-Range") or ""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", text)
    announced = part.known().get("total")
    if found is None or [int(found[1]), int(found[3])] != [part.size(), announced]:
        had = part.size()
        part.remove()
        raise _Passing(f"asked for bytes from {had} on of {announced}, the server sent {text!r}")
    return int(found[3])


def _validator(answer: Any) -> str | None:
    """Returns what tells versions of a file apart: a strong ETag or the time of change."""
    tag: str | None = answer.headers.get("ETag")
    if tag is not None and not tag.startswith("W/"):
        return tag
    changed: str | None = answer.headers.get("Last-Modified")
    return changed


def _copy(answer: Any, out: BinaryIO) -> None:
    try:
        while chunk := answer.read(_CHUNK):
            out.write(chunk)
    except http.client.IncompleteRead as error:
        out.write(error.partial)
        raise
    finally:
        out.flush()
        os.fsync(out.fileno())


def _check_space(part: _Part, total: int | None) -> None:
    free = shutil.disk_usage(part.path.parent).free
    missing = 0 if total is None else total - part.size()
    if missing > free:
        raise OSError(
            errno.ENOSPC, f"{missing:,} bytes are to come, {free:,} are free", str(part.path)
        )


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Lets one process at a time download into a folder; the others wait."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        # Some network file systems cannot lock; then whoever starts two downloads has two.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Tells one file of a name from another."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def hash_of(path: str | os.PathLike[str], algorithm: str = "sha256") -> str:
    """Returns the hash of a file in hexadecimal digits.

    Args:
        path: the file.
        algorithm: a name that `hashlib` knows.
    """
    digest = hashlib.new(algorithm)
    with Path(path).open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Makes a rename last, where the system lets folders be synchronised."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
