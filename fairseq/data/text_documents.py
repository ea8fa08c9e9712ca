"""Documents in a text: lines, with a blank line between one document and the next."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

__all__ = ["documents", "open_text", "write_document"]


def documents(lines: Iterable[str]) -> Iterator[list[str]]:
    """Yields the lines of each document, line ends included; blank lines are left out."""
    document: list[str] = []
    for line in lines:
        if line.strip():
            document.append(line)
        elif document:
            yield document
            document = []
    if document:
        yield document


@contextlib.contextmanager
def open_text(path: str | Path, *, is_gzip: bool = False) -> Iterator[TextIO]:
    """Opens UTF-8 text for reading; lines end at line feeds alone."""
    opener: Any = gzip.open if is_gzip else open
    with opener(path, "rt", encoding="utf-8", newline="\n") as stream:
        yield stream


def write_document(out: TextIO, document: Iterable[str], *, is_first: bool) -> None:
    """Writes a document, after a blank line unless it is the first."""
    if not is_first:
        out.write("\n")
    for line in document:
        out.write(line if line.endswith("\n") else line + "\n")
