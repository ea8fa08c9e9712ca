"""Shortened lines."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fairseq.data.shorten_dataset import (
    RandomCropDataset,
    TruncateDataset,
    maybe_shorten_dataset,
)
from fairseq.data.token_block_dataset import TokenBlockDataset


class Lines:
    supports_prefetch = True
    _path = "folder/train"

    def __init__(self, sizes):
        self.sizes = np.array(sizes)
        self.prefetched = None

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return torch.arange(self.sizes[index]) + 100 * index

    def prefetch(self, indices):
        self.prefetched = indices


def test_truncation_keeps_the_first_tokens():
    lines = TruncateDataset(Lines([3, 9, 4]), 4)
    assert [line.tolist() for line in lines] == [
        [0, 1, 2],
        [100, 101, 102, 103],
        [200, 201, 202, 203],
    ]
    assert lines.sizes.tolist() == [3, 4, 4]
    assert len(lines) == 3


@pytest.mark.parametrize("epoch", [0, 7])
def test_a_crop_starts_where_seed_epoch_and_line_say(epoch):
    sizes = [4, 30, 5, 17]
    lines = RandomCropDataset(Lines(sizes), 4, seed=3)
    lines.set_epoch(epoch)
    for index, size in enumerate(sizes):
        np.random.seed(int(hash((3, epoch, index)) % 1e6))
        start = np.random.randint(0, size - 4) if size > 4 else 0
        expected = list(range(100 * index + start, 100 * index + start + 4))
        assert lines[np.int64(index)].tolist() == expected
    assert lines.sizes.tolist() == [4, 4, 4, 4]


def test_a_block_dataset_does_not_pass_the_epoch_on():
    lines = RandomCropDataset(Lines([40, 40]), 4)
    blocks = TokenBlockDataset(lines, lines.sizes, None, 1, 2, "eos")
    before = [block.tolist() for block in blocks]
    blocks.set_epoch(5)
    assert [block.tolist() for block in blocks] == before


def test_which_splits_are_shortened():
    lines = Lines([9])

    def shorten(split, splits, method):
        return maybe_shorten_dataset(lines, split, splits, method, 4, 1)

    assert shorten("train", "", "none") is lines
    assert isinstance(shorten("train", "", "truncate"), TruncateDataset)
    assert shorten("valid", "train", "truncate") is lines
    assert isinstance(shorten("valid", "train,valid", "random_crop"), RandomCropDataset)
    with pytest.raises(ValueError, match="--shorten-method is 'crop'"):
        shorten("train", "", "crop")
    with pytest.raises(ValueError, match="shortened to 0"):
        TruncateDataset(lines, 0)


def test_prefetch_and_the_file_name_reach_the_lines():
    lines = Lines([9, 9])
    shortened = TruncateDataset(lines, 4)
    assert shortened.supports_prefetch
    shortened.prefetch([1])
    assert lines.prefetched == [1]
    assert shortened.path_of(0) == "folder/train.bin"
