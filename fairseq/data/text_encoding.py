"""A text as numbers of its words, whatever the numbers are.

`ChunkEncoder` turns a chunk of text into one number for each word and for each end of a line. A
dictionary gives the numbers, or, where there is none yet, `number_text` does, in the order in which
words appear. It counts them as well, so that a dictionary can be built, and can keep the numbers in
a file, so that the text need not be split and looked up a second time.
"""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from fairseq.data.text_file import check_text_file, map_chunks, split_lines
from fairseq.tokenizer import tokenize_line

__all__ = ["ChunkEncoder", "EncodedLines", "NumberedText", "number_text"]

Tokenizer = Callable[[str], list[str]]

_END = -2
"""Stands for the end of a line while a chunk is encoded."""

_MARKS = [chr(code) for code in (*range(9), *range(0xE000, 0xF900))]
"""Characters that are no white space and hardly ever stand in a text; a word of one ends lines."""

_MOST_WORDS = 1 << 20
"""Words that a process remembers; with more it forgets them all and begins anew."""


class EncodedLines(NamedTuple):
    """The lines of a chunk of text.

    Attributes:
        ids: of all lines, one after the other, int32.
        sizes: ids in each line, int64.
        is_open: the last line goes on in the next chunk, its end is still missing.
    """

    ids: np.ndarray
    sizes: np.ndarray
    is_open: bool


class ChunkEncoder(ABC):
    """Encodes the lines of a chunk together.

    Args:
        tokenize: splits a line.
        end: id of the end of a line; None leaves it out.
        reverse_order: last word first.
        known: ids by word.
    """

    def __init__(
        self,
        tokenize: Tokenizer,
        end: int | None,
        *,
        reverse_order: bool = False,
        known: dict[str, int],
    ) -> None:
        self.tokenize = tokenize
        self.end = end
        self.reverse_order = reverse_order
        self.known = known

    @abstractmethod
    def look_up(self, words: Iterable[str], count: int) -> np.ndarray:
        """Returns the ids of words, int32 (count,)."""

    @property
    def needs_whole_lines(self) -> bool:
        """Tells whether a line cannot be encoded in parts."""
        return self.reverse_order or self.tokenize is not tokenize_line

    def encode(self, text: str) -> EncodedLines:
        """Encodes a chunk."""
        return self._by_line(text) if self.needs_whole_lines else self._at_once(text)

    def _at_once(self, text: str) -> EncodedLines:
        """Splits all lines in one call, with a word of its own for the ends of lines."""
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        mark = next(mark for mark in _MARKS if mark not in text and mark not in self.known)
        words = text.replace("\n", f" {mark} ").split()
        self.known[mark] = _END
        ids = self.look_up(words, len(words))
        del self.known[mark]
        is_open = not text.endswith("\n")
        is_end = ids == _END
        ends = np.flatnonzero(is_end)
        sizes = np.diff(np.append(ends, len(ids) - 1) if is_open else ends, prepend=-1)
        if self.end is None:
            sizes[: len(ends)] -= 1
            ids = ids[~is_end]
        else:
            ids[ends] = self.end
        return EncodedLines(ids, sizes, is_open)

    def _by_line(self, text: str) -> EncodedLines:
        lines = split_lines(text)
        is_open = lines[-1] != ""
        words = [self.tokenize(line) for line in (lines if is_open else lines[:-1])]
        if self.reverse_order:
            words = [line[::-1] for line in words]
        sizes = np.fromiter(map(len, words), np.int64, len(words))
        ids = self.look_up(itertools.chain.from_iterable(words), int(sizes.sum()))
        if self.end is not None:
            num_ended = len(words) - is_open
            ids = np.insert(ids, np.cumsum(sizes)[:num_ended], self.end)
            sizes[:num_ended] += 1
        return EncodedLines(ids, sizes, is_open)


class _FoundLines(NamedTuple):
    """A chunk in the numbers of the process that read it.

    Attributes:
        lines: 0 is the end of a line.
        source: the process, and how often it began anew.
        words: those that it met for the first time; their numbers follow the ones before.
    """

    lines: EncodedLines
    source: tuple[int, int]
    words: list[str]


class _Numberer(ChunkEncoder):
    """Numbers words from 1, in the order in which this process meets them."""

    known: defaultdict[str, int]

    def __init__(self, tokenize: Tokenizer) -> None:
        super().__init__(tokenize, 0, known=_numbers())
        self._times = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, known=_numbers())

    def look_up(self, words: Iterable[str], count: int) -> np.ndarray:
        return np.fromiter(map(self.known.__getitem__, words), np.int32, count)

    def __call__(self, text: str) -> _FoundLines:
        if len(self.known) > _MOST_WORDS:
            self.known = _numbers()
            self._times += 1
        num_before = len(self.known)
        lines = self.encode(text)
        num_new = len(self.known) - num_before
        words = list(itertools.islice(reversed(self.known), num_new))
        return _FoundLines(lines, (os.getpid(), self._times), words[::-1])


def _numbers() -> defaultdict[str, int]:
    return defaultdict(itertools.count(1).__next__)


class NumberedText:
    """The words of a text with their counts, and the text in their numbers if it was kept.

    Args:
        kept: an open file that chunks are appended to, or None.
    """

    def __init__(self, kept: IO[bytes] | None = None) -> None:
        self._kept = kept
        self._known = _numbers()
        self._counts = np.zeros(1, np.int64)  # of the ends of lines, and of each word
        self._tables: dict[int, tuple[int, np.ndarray]] = {}
        self._is_open = False

    def counts(self, end: str) -> Counter[str]:
        """Returns how often each word occurs.

        Args:
            end: word that each line ends with, the last too if its end is missing.
        """
        found = Counter(dict(zip(self._known, self._counts[1:].tolist(), strict=True)))
        found[end] += int(self._counts[0]) + self._is_open
        return found

    def append(self, found: _FoundLines) -> None:
        """Takes the next chunk."""
        ids = self._table_of(found)[found.lines.ids]
        counts = np.bincount(ids, minlength=len(self._known) + 1)
        counts[: len(self._counts)] += self._counts
        self._counts = counts
        self._is_open = found.lines.is_open
        if self._kept is not None:
            sizes = found.lines.sizes
            head = np.array([len(ids), len(sizes), self._is_open], np.int64)
            for numbers in (head, sizes.astype(np.int64, copy=False), ids):
                self._kept.write(numbers.data)

    def _table_of(self, found: _FoundLines) -> np.ndarray:
        """Returns the number here for each number of the process that read a chunk, int32."""
        process, times = found.source
        known_times, table = self._tables.get(process, (times, np.zeros(1, np.int32)))
        if known_times != times:
            table = np.zeros(1, np.int32)
        if found.words:
            new = map(self._known.__getitem__, found.words)
            table = np.append(table, np.fromiter(new, np.int32, len(found.words)))
        self._tables[process] = times, table
        return table

    def ids_of_words(self, ids: dict[str, int], end: int, unknown: int) -> np.ndarray:
        """Returns the id for each number, int32.

        Args:
            ids: by word.
            end: id of the end of a line.
            unknown: id of words that have none.
        """
        of_words = map(ids.get, self._known, itertools.repeat(unknown))
        return np.fromiter(itertools.chain([end], of_words), np.int32, len(self._known) + 1)

    def chunks(self) -> Iterator[EncodedLines]:
        """Yields the chunks that were kept, in numbers.

        Raises:
            ValueError: none were.
        """
        if self._kept is None:
            raise ValueError("the numbers of this text were not kept")
        self._kept.seek(0)
        while len(head := np.fromfile(self._kept, np.int64, 3)):
            num_ids, num_sizes, is_open = head.tolist()
            sizes = np.fromfile(self._kept, np.int64, num_sizes)
            yield EncodedLines(np.fromfile(self._kept, np.int32, num_ids), sizes, bool(is_open))


def number_text(
    path: str | Path,
    *,
    tokenize: Tokenizer = tokenize_line,
    workers: int = 1,
    keep_in: IO[bytes] | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> NumberedText:
    """Numbers and counts the words of a text file.

    Args:
        path: UTF-8 text.
        tokenize: splits a line.
        workers: most processes to use; counts do not depend on it.
        keep_in: an empty binary file, open for both ways, that takes the text in numbers, 4 bytes
            for each word and 8 for each line; it has to stay open as long as they are needed.
        on_progress: called with the number of bytes done since the last call.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is empty or not UTF-8.
    """
    check_text_file(path)
    numbered = NumberedText(keep_in)
    numberer = _Numberer(tokenize)
    for found in map_chunks(
        numberer,
        path,
        workers=workers,
        whole_lines=numberer.needs_whole_lines,
        on_progress=on_progress,
    ):
        numbered.append(found)
    return numbered
