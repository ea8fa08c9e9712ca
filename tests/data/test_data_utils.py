"""Loading data, seeds, paths and padding."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fairseq.data import data_utils
from fairseq.data.collation import collate_tokens
from fairseq.data.concat_dataset import ConcatDataset
from fairseq.data.dictionary import Dictionary

MAIN = Path(__file__).parents[1] / "golden" / "invented" / "bin" / "main"


def test_paths_are_split_at_colons_and_urls_at_bars():
    assert data_utils.split_paths("a:b:c") == ["a", "b", "c"]
    assert data_utils.split_paths("s3://a|s3://b") == ["s3://a", "s3://b"]


def test_the_global_generator_is_seeded_and_restored():
    np.random.seed(5)
    expected = np.random.rand(2)
    np.random.seed(5)
    first = np.random.rand()
    with data_utils.numpy_seed(1):
        drawn = np.random.permutation(5)
    assert drawn.tolist() == np.random.RandomState(1).permutation(5).tolist()
    assert [first, np.random.rand()] == expected.tolist()
    with data_utils.numpy_seed(1, 2):
        drawn = np.random.rand()
    assert drawn == np.random.RandomState(int(hash((1, 2)) % 1e6)).rand()
    np.random.seed(5)
    with data_utils.numpy_seed(None):
        assert np.random.rand() == expected[0]


def test_the_seed_is_restored_after_an_error():
    np.random.seed(5)
    with pytest.raises(KeyError), data_utils.numpy_seed(1):
        raise KeyError
    assert np.random.rand() == np.random.RandomState(5).rand()


def test_a_split_and_its_continuations(tmp_path, caplog):
    for name, source in (("train", "valid"), ("train1", "test"), ("train3", "valid")):
        for suffix in (".bin", ".idx"):
            shutil.copy(MAIN / (source + suffix), tmp_path / (name + suffix))
    caplog.set_level(logging.INFO)
    one = data_utils.load_indexed_dataset(str(tmp_path / "train"))
    both = data_utils.load_indexed_dataset(str(tmp_path / "train"), combine=True)
    valid = data_utils.load_indexed_dataset(str(MAIN / "valid"))
    test = data_utils.load_indexed_dataset(str(MAIN / "test"))
    assert len(one) == len(valid)
    assert len(both) == len(valid) + len(test)
    assert both.sizes.tolist() == valid.sizes.tolist() + test.sizes.tolist()
    assert both[len(valid)].tolist() == test[0].tolist()
    assert both.read(len(both) - 1).tolist() == test[len(test) - 1].tolist()
    assert f"loaded {len(valid):,} examples from: {tmp_path / 'train'}" in caplog.messages
    assert both.path_of(0) == f"{tmp_path / 'train'}.bin"
    assert both.path_of(len(valid)) == f"{tmp_path / 'train1'}.bin"
    with pytest.raises(IndexError):
        both[len(both)]


def test_a_missing_split_is_none():
    assert data_utils.load_indexed_dataset(str(MAIN / "nothing")) is None


def test_text_is_read_with_a_dictionary(tmp_path):
    dictionary = Dictionary.load(str(MAIN / "dict.txt"))
    word = dictionary[10]
    (tmp_path / "train").write_text(f"{word} {word}\n")
    lines = data_utils.load_indexed_dataset(str(tmp_path / "train"), dictionary, "raw")
    assert lines[0].tolist() == [10, 10, 2]


def test_joined_datasets_prefetch_their_own_items():
    class Part:
        supports_prefetch = True

        def __init__(self, size):
            self.sizes = np.ones(size, dtype=int)
            self.prefetched = None

        def __len__(self):
            return len(self.sizes)

        def prefetch(self, indices):
            self.prefetched = list(indices)

    parts = [Part(2), Part(3)]
    joined = ConcatDataset(parts)
    assert joined.supports_prefetch
    joined.prefetch([0, 2, 4])
    assert [part.prefetched for part in parts] == [[0], [0, 2]]
    with pytest.raises(ValueError, match="at least one"):
        ConcatDataset([])


def test_splits_of_a_folder(tmp_path):
    assert data_utils.available_splits(MAIN) == ["test", "train", "valid"]
    (tmp_path / "train").write_text("text")
    (tmp_path / "lost.idx").write_text("")
    assert data_utils.available_splits(tmp_path) == ["train"]
    assert data_utils.available_splits(tmp_path / "nowhere") == []


def tokens(*ids):
    return torch.tensor(ids)


def test_padding():
    values = [tokens(4, 5, 2), tokens(6, 2)]
    assert collate_tokens(values, 1).tolist() == [[4, 5, 2], [6, 2, 1]]
    assert collate_tokens(values, 1, left_pad=True).tolist() == [[4, 5, 2], [1, 6, 2]]
    moved = collate_tokens(values, 1, eos_idx=2, move_eos_to_beginning=True)
    assert moved.tolist() == [[2, 4, 5], [2, 6, 1]]
    moved = collate_tokens([tokens(4, 9)], 1, move_eos_to_beginning=True)
    assert moved.tolist() == [[9, 4]]
    assert collate_tokens(values, 1, pad_to_length=4).tolist() == [[4, 5, 2, 1], [6, 2, 1, 1]]
    assert collate_tokens(values, 1, pad_to_length=2).shape == (2, 3)
    assert collate_tokens(values, 1, pad_to_multiple=8).shape == (2, 8)
    assert collate_tokens(values, 1, pad_to_bsz=3).tolist() == [[4, 5, 2], [6, 2, 1], [1, 1, 1]]
    assert collate_tokens(values, 1, pad_to_bsz=1).shape == (2, 3)
