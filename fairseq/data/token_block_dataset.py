"""Blocks of tokens cut out of a dataset of lines.

All blocks are half-open ranges of one stream, the lines one after the other. Only the offsets of
lines and blocks are kept (8 bytes each); where a block lies is looked up when it is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from fairseq.data.fairseq_dataset import FairseqDataset

__all__ = ["BREAK_MODES", "TokenBlockDataset", "cut_blocks", "file_of"]

BREAK_MODES = ("none", "complete", "complete_doc", "eos")


def cut_blocks(
    line_offsets: np.ndarray, break_mode: str, block_size: int | None, document_sep_len: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a stream of lines into blocks.

    * `none`: every `block_size` tokens, whatever the lines; the last block may be shorter.
    * `complete`: as many whole lines as fit `block_size`; a longer line is a block by itself.
    * `complete_doc`: as `complete`, but a line of `document_sep_len` tokens ends the block and
      belongs to none; blocks of a single token are left out.
    * `eos`: every line is a block, `block_size` is not used.

    Args:
        line_offsets: int64, where each line starts, and at the end the number of tokens.
        break_mode: one of `BREAK_MODES`.
        block_size: tokens, at least 1; None only for `eos`.
        document_sep_len: length of the line that separates documents.

    Returns:
        Start in the stream and length of every block, int64.

    Raises:
        ValueError: an unknown mode or a block size below 1.
    """
    if break_mode not in BREAK_MODES:
        raise ValueError(
            f"--sample-break-mode is {break_mode!r}; it must be one of {', '.join(BREAK_MODES)}"
        )
    if break_mode == "eos":
        return line_offsets[:-1], np.diff(line_offsets)
    if block_size is None or block_size < 1:
        raise ValueError(
            f"blocks of {block_size} tokens cannot be cut; --tokens-per-sample must be at least 1 "
            "(less --context-window, and less 1 with --add-bos-token)"
        )
    if break_mode == "none":
        total = int(line_offsets[-1])
        starts = np.arange(0, total, block_size, dtype=np.int64)
        return starts, np.minimum(block_size, total - starts)
    if break_mode == "complete":
        return _pack_lines(line_offsets, block_size, separator_len=-1, shortest=1)
    return _pack_lines(line_offsets, block_size, separator_len=document_sep_len, shortest=2)


def _pack_lines(
    line_offsets: np.ndarray, block_size: int, *, separator_len: int, shortest: int
) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.diff(line_offsets)
    kept = (sizes > 0) | (sizes == separator_len)
    begin, end = line_offsets[:-1][kept], line_offsets[1:][kept]
    num_lines = len(begin)
    separators = np.flatnonzero(end - begin == separator_len)
    lines = np.arange(num_lines)

    # For each line: the line after the fullest block that starts with it.
    following = np.searchsorted(end, begin + block_size, side="right")
    following = np.maximum(following, lines + 1)
    next_separator = np.append(separators, num_lines)[np.searchsorted(separators, lines)]
    following = np.minimum(following, next_separator)

    firsts, stops = [], []
    line = 0
    while line < num_lines:
        stop = int(following[line])
        if stop == line:
            line += 1
            continue
        firsts.append(line)
        stops.append(stop)
        line = stop
    block_starts = begin[np.asarray(firsts, dtype=np.int64)]
    block_sizes = end[np.asarray(stops, dtype=np.int64) - 1] - block_starts
    long_enough = block_sizes >= shortest
    return block_starts[long_enough], block_sizes[long_enough]


class TokenBlockDataset(FairseqDataset):
    """Blocks of a dataset of lines, and on request what a language model reads and predicts.

    With `include_targets` an item is `(source, block, past)`, each as long as the block. The
    source is the block shifted right by one: first the token before the block, or `eos` where the
    block starts a line. `past` is shifted by two, with `pad` before that `eos`.

    Args:
        dataset: lines, as vectors of token ids (`__getitem__`) or arrays (`read`).
        sizes: tokens in each line.
        block_size: tokens in a block; None is allowed for `eos`.
        pad: id of padding.
        eos: id of the end of a line.
        break_mode: see `cut_blocks`; None is `none`.
        include_targets: whether items are triples.
        document_sep_len: length of the line that separates documents.
        num_symbols: size of the dictionary; a larger id in the data is an error when it is read.

    Raises:
        ValueError: no lines, an unknown mode, or a block size below 1.
    """

    def __init__(
        self,
        dataset: Any,
        sizes: Any,
        block_size: int | None,
        pad: int,
        eos: int,
        break_mode: str | None = None,
        include_targets: bool = False,
        document_sep_len: int = 1,
        *,
        num_symbols: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.pad = pad
        self.eos = eos
        self.include_targets = include_targets
        self.num_symbols = num_symbols
        line_sizes = np.asarray(sizes, dtype=np.int64)
        if len(line_sizes) == 0:
            raise ValueError("the dataset holds no lines, so no blocks can be cut from it")
        self._line_offsets = np.zeros(len(line_sizes) + 1, dtype=np.int64)
        np.cumsum(line_sizes, out=self._line_offsets[1:])
        self._starts, self._sizes = cut_blocks(
            self._line_offsets, break_mode or "none", block_size, document_sep_len
        )

    @property
    def sizes(self) -> np.ndarray:
        """Tokens in each block, int64."""
        return self._sizes

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        begin = int(self._starts[index])
        num_tokens = int(self._sizes[index])
        if not self.include_targets:
            return torch.from_numpy(self.read_range(begin, begin + num_tokens))
        num_before = min(2, begin - self._line_start(begin))
        before = [self.pad, self.eos][num_before:]
        ids = self.read_range(begin - num_before, begin + num_tokens)
        shifted = torch.from_numpy(np.concatenate([np.asarray(before, dtype=np.int64), ids]))
        # The two tokens before the block, then the block: one shift further for each.
        return shifted[1 : 1 + num_tokens], shifted[2:], shifted[:num_tokens]

    def read_range(self, begin: int, end: int) -> np.ndarray:
        """Returns tokens `[begin, end)` of the stream of lines, int64.

        Raises:
            ValueError: an id that is not in the dictionary.
        """
        ids = np.empty(end - begin, dtype=np.int64)
        if begin == end:
            return ids
        first, last = self._line_of(begin), self._line_of(end - 1)
        offsets = self._line_offsets[first : last + 2].tolist()
        for i, line in enumerate(range(first, last + 1)):
            line_start, line_stop = offsets[i], offsets[i + 1]
            a, b = max(begin, line_start), min(end, line_stop)
            ids[a - begin : b - begin] = self._read_line(line)[a - line_start : b - line_start]
        # A negative id is a huge one when taken as unsigned.
        if self.num_symbols is not None and ids.view(np.uint64).max() >= self.num_symbols:
            self._refuse_unknown_id(first, last, self.num_symbols)
        return ids

    def sources_at(self, blocks: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Returns source tokens by block and offset in it, both in rising order, int64."""
        if len(blocks) == 0:
            return np.empty(0, dtype=np.int64)
        positions = self._starts[blocks] + offsets
        lines = np.searchsorted(self._line_offsets, positions, side="right") - 1
        after_eos = (offsets == 0) & (self._line_offsets[lines] == positions)
        begin = max(int(positions[0]) - 1, 0)
        stream = self.read_range(begin, max(int(positions[-1]), begin))
        sources = np.full(len(positions), self.eos, dtype=np.int64)
        sources[~after_eos] = stream[positions[~after_eos] - 1 - begin]
        return sources

    @property
    def supports_prefetch(self) -> bool:
        return bool(getattr(self.dataset, "supports_prefetch", False))

    def prefetch(self, indices: Iterable[int]) -> None:
        """Loads the lines of these blocks."""
        blocks = np.unique(np.fromiter(indices, dtype=np.int64))
        begins = self._starts[blocks]
        lasts = begins + np.maximum(self._sizes[blocks], 1) - 1
        first_lines = np.searchsorted(self._line_offsets, begins, side="right") - 1
        last_lines = np.searchsorted(self._line_offsets, lasts, side="right") - 1
        num_starting = np.zeros(len(self._line_offsets) + 1, dtype=np.int64)
        np.add.at(num_starting, first_lines, 1)
        np.add.at(num_starting, last_lines + 1, -1)
        lines = np.flatnonzero(np.cumsum(num_starting)[: len(self._line_offsets) - 1] > 0)
        self.dataset.prefetch(lines.tolist())

    def _line_of(self, position: int) -> int:
        return int(np.searchsorted(self._line_offsets, position, side="right")) - 1

    def _line_start(self, position: int) -> int:
        return int(self._line_offsets[self._line_of(position)])

    def _read_line(self, line: int) -> np.ndarray:
        if hasattr(self.dataset, "read"):
            return np.asarray(self.dataset.read(line))
        return np.asarray(self.dataset[line])

    def _refuse_unknown_id(self, first: int, last: int, num_symbols: int) -> None:
        for line in range(first, last + 1):
            ids = np.asarray(self._read_line(line), dtype=np.int64)
            unknown = ids[(ids < 0) | (ids >= num_symbols)]
            if len(unknown):
                raise ValueError(
                    f"{file_of(self.dataset, line)}: token id {int(unknown[0])} in line "
                    f"{line + 1}, but the dictionary has {num_symbols} symbols (ids 0 to "
                    f"{num_symbols - 1}); the data were binarized with another dict.txt, or the "
                    "file is damaged"
                )


def file_of(dataset: Any, line: int) -> str:
    """Returns the name of the file a line was read from, for messages."""
    if hasattr(dataset, "path_of"):
        return str(dataset.path_of(line))
    path = getattr(dataset, "path", None) or getattr(dataset, "_path", None)
    return f"{path}.bin" if path else "the dataset"
