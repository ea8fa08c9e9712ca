"""Text to token ids: a text file goes through a dictionary into the builder of a dataset.

Several processes may encode, one writes; what is written does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fairseq.data.alignments import AlignmentParser
from fairseq.data.binary_files import TokenWriter
from fairseq.data.dictionary import Dictionary, Tokenizer
from fairseq.data.text_file import check_text_file, map_chunks, split_lines
from fairseq.tokenizer import tokenize_line

__all__ = ["BinarizeSummary", "binarize_alignments", "binarize_text"]

OnProgress = Callable[[int], object]

_UNK_IN_TEXT = -1
"""Stands, while a chunk is encoded, for the unknown word where the text itself has it."""


@dataclass
class BinarizeSummary:
    """What a text consists of.

    Attributes:
        sentences: lines.
        tokens: ids, the end of each sentence included.
        replaced: words that the dictionary lacks.
    """

    sentences: int = 0
    tokens: int = 0
    replaced: int = 0

    @property
    def percent_replaced(self) -> float:
        """Returns the replaced words in percent of the tokens, 0 for an empty text."""
        return 100 * self.replaced / self.tokens if self.tokens else 0.0


class EncodedLines(NamedTuple):
    """The lines of a chunk of text, as ids.

    Attributes:
        ids: of all lines, one after the other.
        sizes: ids per line.
        is_open: the last line goes on in the next chunk, its end is still missing.
        replaced: words that the dictionary lacks.
    """

    ids: np.ndarray
    sizes: np.ndarray
    is_open: bool
    replaced: int


def binarize_text(
    path: str | Path,
    dictionary: Dictionary,
    builder: TokenWriter,
    *,
    tokenize: Tokenizer = tokenize_line,
    append_eos: bool = True,
    reverse_order: bool = False,
    workers: int = 1,
    on_progress: OnProgress | None = None,
) -> BinarizeSummary:
    """Writes the lines of a text file as items of a dataset.

    Args:
        path: UTF-8 text.
        dictionary: gives words their ids; words it lacks become unknown.
        builder: takes up the ids; the caller finalizes it.
        tokenize: splits a line.
        append_eos: end each line with the id of the end of a sentence.
        reverse_order: last word first.
        workers: most processes to use.
        on_progress: called with the number of bytes done since the last call.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is empty or not UTF-8.
    """
    check_text_file(path)
    encoder_class = _ChunkEncoder
    if type(dictionary).encode_line is not Dictionary.encode_line:
        encoder_class = _LineEncoder
    encode = encoder_class(dictionary, tokenize, append_eos, reverse_order)
    summary = BinarizeSummary()
    carried = 0  # ids written of a line that is not finished
    is_open = False
    for lines in map_chunks(
        encode,
        path,
        workers=workers,
        whole_lines=encode.needs_whole_lines,
        on_progress=on_progress,
    ):
        builder.write_tokens(lines.ids)
        sizes = lines.sizes
        sizes[0] += carried
        is_open = lines.is_open
        carried = int(sizes[-1]) if is_open else 0
        _end_lines(builder, sizes[:-1] if is_open else sizes, summary)
        summary.replaced += lines.replaced
    if is_open:
        if append_eos:
            builder.write_tokens(np.array([dictionary.eos()], dtype=np.int32))
        _end_lines(builder, np.array([carried + append_eos]), summary)
    return summary


def _end_lines(builder: TokenWriter, sizes: np.ndarray, summary: BinarizeSummary) -> None:
    builder.end_items(sizes)
    summary.sentences += len(sizes)
    summary.tokens += int(sizes.sum())


class _ChunkEncoder:
    """Encodes the lines of a chunk together."""

    def __init__(
        self, dictionary: Dictionary, tokenize: Tokenizer, append_eos: bool, reverse_order: bool
    ) -> None:
        self.dictionary = dictionary
        self.tokenize = tokenize
        self.append_eos = append_eos
        self.reverse_order = reverse_order
        self._id_of = dict(dictionary.indices)
        if dictionary.index(dictionary.unk_word) == dictionary.unk():
            self._id_of[dictionary.unk_word] = _UNK_IN_TEXT

    @property
    def needs_whole_lines(self) -> bool:
        """Tells whether a line cannot be encoded in parts."""
        return self.reverse_order or self.tokenize is not tokenize_line

    def __call__(self, text: str) -> EncodedLines:
        lines = split_lines(text)
        is_open = lines[-1] != ""
        words = [self.tokenize(line) for line in (lines if is_open else lines[:-1])]
        if self.reverse_order:
            words = [line[::-1] for line in words]
        sizes = np.fromiter(map(len, words), np.int64, len(words))
        ids = self._ids(chain.from_iterable(words), int(sizes.sum()))
        unk = self.dictionary.unk()
        replaced = int(np.count_nonzero(ids == unk))
        ids[ids == _UNK_IN_TEXT] = unk
        if self.append_eos:
            num_ended = len(words) - is_open
            ids = np.insert(ids, np.cumsum(sizes)[:num_ended], self.dictionary.eos())
            sizes[:num_ended] += 1
        return EncodedLines(ids, sizes, is_open, replaced)

    def _ids(self, words: chain[str], count: int) -> np.ndarray:
        return np.fromiter(
            map(self._id_of.get, words, repeat(self.dictionary.unk())), np.int32, count
        )


class _LineEncoder(_ChunkEncoder):
    """Encodes line by line, for dictionaries with an `encode_line` of their own."""

    needs_whole_lines = True

    def __call__(self, text: str) -> EncodedLines:
        lines = split_lines(text)
        lines = lines if lines[-1] else lines[:-1]
        replaced: list[str] = []

        def note(word: str, index: int) -> None:
            if index == self.dictionary.unk() and word != self.dictionary.unk_word:
                replaced.append(word)

        encoded = [
            self.dictionary.encode_line(
                line,
                line_tokenizer=self.tokenize,
                add_if_not_exist=False,
                consumer=note,
                append_eos=self.append_eos,
                reverse_order=self.reverse_order,
            ).numpy()
            for line in lines
        ]
        sizes = np.array([len(ids) for ids in encoded], dtype=np.int64)
        return EncodedLines(np.concatenate(encoded), sizes, False, len(replaced))


def binarize_alignments(
    path: str | Path,
    builder: TokenWriter,
    *,
    workers: int = 1,
    on_progress: OnProgress | None = None,
) -> int:
    """Writes the lines of an alignment file, pairs like `0-0 1-2`, as items of a dataset.

    Args:
        path: the file.
        builder: takes up the numbers of a line, source and target in turn.
        workers: most processes to use.
        on_progress: called with the number of bytes done since the last call.

    Returns:
        The number of lines.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is empty, not UTF-8, or has something that is no pair.
    """
    check_text_file(path)
    num_lines = 0
    parse = AlignmentParser(path)
    for lines in map_chunks(
        parse, path, workers=workers, whole_lines=True, on_progress=on_progress
    ):
        for pairs in lines:
            builder.add_item(np.array(pairs, dtype=np.int64).reshape(-1))
        num_lines += len(lines)
    return num_lines
