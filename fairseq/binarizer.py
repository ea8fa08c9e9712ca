"""Text to token ids: a text file goes through a dictionary into the builder of a dataset.

Several processes may encode, one writes; what is written does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np

from fairseq.data.alignments import AlignmentParser
from fairseq.data.binary_files import TokenWriter
from fairseq.data.dictionary import Dictionary, Tokenizer
from fairseq.data.text_encoding import ChunkEncoder, EncodedLines, NumberedText
from fairseq.data.text_file import check_text_file, map_chunks, split_lines
from fairseq.tokenizer import tokenize_line

__all__ = ["BinarizeSummary", "binarize_alignments", "binarize_numbered", "binarize_text"]

OnProgress = Callable[[int], object]

_Encoded = tuple[EncodedLines, int]
"""A chunk in ids, and how many of its words the dictionary lacks."""

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
    encoder_class = _DictionaryEncoder
    if type(dictionary).encode_line is not Dictionary.encode_line:
        encoder_class = _LineEncoder
    encode = encoder_class(dictionary, tokenize, append_eos, reverse_order)
    chunks = map_chunks(
        encode,
        path,
        workers=workers,
        whole_lines=encode.needs_whole_lines,
        on_progress=on_progress,
    )
    return _write(chunks, builder, dictionary.eos() if append_eos else None)


def binarize_numbered(
    text: NumberedText, dictionary: Dictionary, builder: TokenWriter
) -> BinarizeSummary:
    """Does what `binarize_text` does, for a text that was read already and kept in numbers."""
    return _write(_in_ids(text, dictionary), builder, dictionary.eos())


def _write(chunks: Iterable[_Encoded], builder: TokenWriter, end: int | None) -> BinarizeSummary:
    summary = BinarizeSummary()
    carried = 0  # ids written of a line that is not finished
    is_open = False
    for lines, replaced in chunks:
        builder.write_tokens(lines.ids)
        sizes = lines.sizes
        sizes[0] += carried
        is_open = lines.is_open
        carried = int(sizes[-1]) if is_open else 0
        _end_lines(builder, sizes[:-1] if is_open else sizes, summary)
        summary.replaced += replaced
    if is_open:
        if end is not None:
            builder.write_tokens(np.array([end], dtype=np.int32))
        _end_lines(builder, np.array([carried + (end is not None)]), summary)
    return summary


def _end_lines(builder: TokenWriter, sizes: np.ndarray, summary: BinarizeSummary) -> None:
    builder.end_items(sizes)
    summary.sentences += len(sizes)
    summary.tokens += int(sizes.sum())


class _DictionaryEncoder(ChunkEncoder):
    """Gives words the ids that a dictionary has for them."""

    def __init__(
        self, dictionary: Dictionary, tokenize: Tokenizer, append_eos: bool, reverse_order: bool
    ) -> None:
        super().__init__(
            tokenize,
            dictionary.eos() if append_eos else None,
            reverse_order=reverse_order,
            known=_known(dictionary),
        )
        self.dictionary = dictionary

    def look_up(self, words: Iterable[str], count: int) -> np.ndarray:
        unk = self.dictionary.unk()
        return np.fromiter(map(self.known.get, words, repeat(unk)), np.int32, count)

    def __call__(self, text: str) -> _Encoded:
        return _count_replaced(self.encode(text), self.dictionary.unk())


class _LineEncoder(_DictionaryEncoder):
    """Encodes line by line, for dictionaries with an `encode_line` of their own."""

    needs_whole_lines = True

    def __call__(self, text: str) -> _Encoded:
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
                append_eos=self.end is not None,
                reverse_order=self.reverse_order,
            ).numpy()
            for line in lines
        ]
        sizes = np.array([len(ids) for ids in encoded], dtype=np.int64)
        return EncodedLines(np.concatenate(encoded), sizes, False), len(replaced)


def _known(dictionary: Dictionary) -> dict[str, int]:
    """Returns ids by word, in which the unknown word of the text itself has an id of its own."""
    known = dict(dictionary.indices)
    if dictionary.index(dictionary.unk_word) == dictionary.unk():
        known[dictionary.unk_word] = _UNK_IN_TEXT
    return known


def _count_replaced(lines: EncodedLines, unk: int) -> _Encoded:
    replaced = int(np.count_nonzero(lines.ids == unk))
    lines.ids[lines.ids == _UNK_IN_TEXT] = unk
    return lines, replaced


def _in_ids(text: NumberedText, dictionary: Dictionary) -> Iterator[_Encoded]:
    """Yields the chunks of a text whose words are known, with the ids of a dictionary."""
    table = text.ids_of_words(_known(dictionary), dictionary.eos(), dictionary.unk())
    for chunk in text.chunks():
        yield _count_replaced(chunk._replace(ids=table[chunk.ids]), dictionary.unk())


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
