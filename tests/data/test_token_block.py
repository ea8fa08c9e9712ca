"""Blocks, against a plainly written reading of the rules."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.data.token_block_dataset import TokenBlockDataset

PAD, EOS = 1, 2


class Lines:
    """Lines in memory; reads one beyond the end of 32-bit offsets as well."""

    supports_prefetch = True

    def __init__(self, lines):
        self.lines = [np.asarray(line, dtype=np.uint16) for line in lines]
        self.sizes = np.array([len(line) for line in lines], dtype=np.int32)
        self.prefetched = None

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, index):
        return torch.from_numpy(self.lines[index].astype(np.int64))

    def prefetch(self, indices):
        self.prefetched = list(indices)


class ArrayLines(Lines):
    _path = "folder/train"

    def read(self, index):
        return self.lines[index]


def blocks_of(lines, block_size, mode, **options):
    dataset = Lines(lines)
    return TokenBlockDataset(dataset, dataset.sizes, block_size, PAD, EOS, mode, **options)


def as_lists(dataset):
    return [item.tolist() for item in dataset]


def cut_plainly(sizes, block_size, mode, separator=1):
    """Returns (first line, offset in it, tokens) of each block, by walking over the lines."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    ranges = []
    if mode == "none":
        ranges = [(b, min(b + block_size, starts[-1])) for b in range(0, starts[-1], block_size)]
    elif mode == "eos":
        ranges = list(itertools.pairwise(starts))
    else:
        shortest = 2 if mode == "complete_doc" else 1
        begin = end = 0

        def close():
            if end - begin >= shortest:
                ranges.append((begin, end))

        for size, start in zip(sizes, starts, strict=False):
            if mode == "complete_doc" and size == separator:
                close()
                begin = end = start + size
                continue
            if end > begin and end - begin + size > block_size:
                close()
                begin = end
            end += size
        close()
    located = []
    for begin, end in ranges:
        line = next(i for i in range(len(sizes)) if starts[i] <= begin < starts[i + 1])
        located.append((line, begin - starts[line], end - begin))
    return located


lines_strategy = st.lists(st.integers(1, 9), min_size=1, max_size=25)


def text_of(sizes):
    """Lines of ids that are all different, so that every mistake shows."""
    ids = iter(range(4, 4 + sum(sizes)))
    return [[next(ids) for _ in range(size)] for size in sizes]


@settings(max_examples=150, deadline=None)
@given(
    sizes=lines_strategy,
    block_size=st.integers(1, 12),
    mode=st.sampled_from(["none", "complete", "complete_doc", "eos"]),
    separator=st.integers(1, 2),
)
def test_blocks_and_shifted_streams_follow_the_rules(sizes, block_size, mode, separator):
    lines = text_of(sizes)
    stream = [token for line in lines for token in line]
    dataset = blocks_of(lines, block_size, mode, include_targets=True, document_sep_len=separator)
    expected = cut_plainly(sizes, block_size, mode, separator)
    assert dataset.sizes.tolist() == [size for _, _, size in expected]
    assert len(dataset) == len(expected)
    for index, (line, offset, size) in enumerate(expected):
        start = sum(sizes[:line]) + offset
        block = stream[start : start + size]
        before = [PAD, EOS, *lines[line][:offset]][-2:]
        source, target, past = dataset[index]
        assert target.tolist() == block
        assert source.tolist() == [before[1], *block][:size]
        assert past.tolist() == [*before, *block][:size]
        assert source.dtype == target.dtype == past.dtype == torch.int64


def test_none_cuts_across_lines():
    dataset = blocks_of([[5, 4, 3, 2], [8, 7, 6], [9, 2]], 3, "none")
    assert as_lists(dataset) == [[5, 4, 3], [2, 8, 7], [6, 9, 2]]


def test_none_is_the_default():
    assert as_lists(blocks_of([[5, 4, 2], [7]], 3, None)) == [[5, 4, 2], [7]]


def test_eos_takes_lines_as_they_are():
    lines = [[5, 4, 3, 2, 1], [1], [8, 7, 6, 2]]
    assert as_lists(blocks_of(lines, None, "eos")) == lines


def test_complete_packs_lines_and_keeps_long_ones_whole():
    lines = [[4, 2], [5, 6, 7, 8, 9, 2], [10, 2], [11, 2], [12, 2]]
    dataset = blocks_of(lines, 5, "complete")
    assert as_lists(dataset) == [[4, 2], [5, 6, 7, 8, 9, 2], [10, 2, 11, 2], [12, 2]]


def test_complete_doc_leaves_out_separators_and_single_tokens():
    lines = [[2], [2], [4, 2], [5, 2], [2], [6, 7, 8, 9, 2], [10, 2], [2], [2]]
    dataset = blocks_of(lines, 4, "complete_doc")
    assert as_lists(dataset) == [[4, 2, 5, 2], [6, 7, 8, 9, 2], [10, 2]]
    only_separators = blocks_of([[2], [2]], 4, "complete_doc")
    assert len(only_separators) == 0


def test_sizes_do_not_wrap():
    class LongLines(Lines):
        def __init__(self):
            self.sizes = np.array([2**31, 70_000, 2**31, 5], dtype=np.int64)

        def read(self, index):
            return np.broadcast_to(np.uint16(index + 10), self.sizes[index])

    lines = LongLines()
    for mode in ("eos", "complete"):
        dataset = TokenBlockDataset(lines, lines.sizes, 16, PAD, EOS, mode)
        assert dataset.sizes.tolist() == lines.sizes.tolist()
        assert dataset.sizes.dtype == np.int64
        assert dataset[3].tolist() == [13] * 5
    streamed = TokenBlockDataset(lines, lines.sizes, 2**31, PAD, EOS, "none", include_targets=True)
    assert streamed.sizes.tolist() == [2**31, 2**31, 70_005]
    source, target, _ = streamed[2]
    assert target[-6:].tolist() == [12] + [13] * 5
    assert source[-6:].tolist() == [12, 12] + [13] * 4


def test_a_range_of_the_stream():
    dataset = blocks_of([[5, 4, 2], [7, 2], [8, 9, 2]], 3, "none")
    assert dataset.read_range(2, 7).tolist() == [2, 7, 2, 8, 9]
    assert dataset.read_range(4, 4).tolist() == []


def test_prefetch_names_the_lines_of_the_blocks():
    dataset = blocks_of([[5, 4, 2], [7, 2], [8, 9, 2], [10, 2]], 3, "none")
    assert dataset.supports_prefetch
    dataset.prefetch([1, 3])
    assert dataset.dataset.prefetched == [1, 2, 3]
    dataset.prefetch(np.array([0]))
    assert dataset.dataset.prefetched == [0]


@pytest.mark.parametrize("bad_id", [100, 65535])
def test_an_id_beyond_the_dictionary_names_file_id_and_size(bad_id):
    lines = ArrayLines([[5, 4, 2], [7, bad_id, 2]])
    dataset = TokenBlockDataset(lines, lines.sizes, 3, PAD, EOS, "none", num_symbols=100)
    assert dataset[0].tolist() == [5, 4, 2]
    with pytest.raises(ValueError, match=rf"folder/train\.bin: token id {bad_id} in line 2.* 100 "):
        dataset[1]


def test_a_negative_id_is_refused():
    lines = ArrayLines([[5, 4, 2]])
    lines.lines = [np.array([5, -1, 2])]
    dataset = TokenBlockDataset(lines, lines.sizes, 3, PAD, EOS, "none", num_symbols=100)
    with pytest.raises(ValueError, match="token id -1"):
        dataset[0]


def test_what_cannot_be_cut():
    with pytest.raises(ValueError, match=r"--sample-break-mode.*, complete, complete_doc, eos"):
        blocks_of([[4, 2]], 4, "sentence")
    with pytest.raises(ValueError, match="--tokens-per-sample must be at least 1"):
        blocks_of([[4, 2]], 0, "none")
    with pytest.raises(ValueError, match="--tokens-per-sample"):
        blocks_of([[4, 2]], None, "complete")
    with pytest.raises(ValueError, match="no lines"):
        blocks_of([], 4, "none")
