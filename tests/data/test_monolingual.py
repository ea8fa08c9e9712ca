"""What a language model reads and predicts, item by item and in batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fairseq.data.data_utils import numpy_seed
from fairseq.data.dictionary import TruncatedDictionary, dummy_dictionary
from fairseq.data.monolingual_dataset import MonolingualDataset
from fairseq.data.token_block_dataset import TokenBlockDataset

BOS, PAD, EOS, UNK = 0, 1, 2, 3


class Lines:
    supports_prefetch = True

    def __init__(self, lines):
        self.lines = lines
        self.sizes = np.array([len(line) for line in lines])
        self.prefetched = None

    def __getitem__(self, index):
        return torch.tensor(self.lines[index])

    def prefetch(self, indices):
        self.prefetched = list(indices)


@pytest.fixture
def dictionary():
    return dummy_dictionary(26)


def rows_of(dictionary, lines, block_size, mode="none", **options):
    lines = Lines(lines)
    blocks = TokenBlockDataset(lines, lines.sizes, block_size, PAD, EOS, mode, include_targets=True)
    options.setdefault("targets", ["future"])
    return MonolingualDataset(blocks, blocks.sizes, dictionary, **options)


TEXT = [[4, 5, 6, 2], [7, 8, 2], [9, 2]]


def item_lists(item):
    target = item["target"]
    if isinstance(target, list):
        target = [t.tolist() for t in target]
    return item["source"].tolist(), target if isinstance(target, list) else target.tolist()


def test_the_source_is_the_text_one_token_earlier(dictionary):
    rows = rows_of(dictionary, TEXT, 4)
    assert [row["id"] for row in rows] == [0, 1, 2]
    assert [item_lists(row) for row in rows] == [
        ([2, 4, 5, 6], [4, 5, 6, 2]),
        ([2, 7, 8, 2], [7, 8, 2, 9]),
        ([9], [2]),
    ]


def test_targets_beyond_the_output_dictionary_become_unknown(dictionary):
    short = TruncatedDictionary(dictionary, 6)
    row = rows_of(dictionary, TEXT, 9, tgt_vocab=short)[0]
    source, target = item_lists(row)
    assert source == [2, 4, 5, 6, 2, 7, 8, 2, 9]
    assert target == [4, 5, UNK, 2, UNK, UNK, 2, UNK, 2]
    row = rows_of(dictionary, TEXT, 9, tgt_vocab=short, targets=["self"])[0]
    assert item_lists(row)[0] == source


def test_a_bos_token_starts_source_and_target_and_counts(dictionary):
    rows = rows_of(dictionary, TEXT, 4, add_bos_token=True)
    assert item_lists(rows[1]) == ([BOS, 2, 7, 8, 2], [BOS, 7, 8, 2, 9])
    assert rows.sizes.tolist() == [5, 5, 2]
    assert rows.num_tokens(2) == 2
    assert rows.num_tokens_vec(np.array([2, 0])).tolist() == [2, 5]
    assert rows.collater([rows[0]])["ntokens"] == 5


@pytest.mark.parametrize("appends", [False, True])
def test_several_targets(dictionary, appends):
    rows = rows_of(
        dictionary,
        [[4, 5, 6, 7], [8, 2]],
        None,
        "eos",
        targets=["self", "future", "past"],
        add_eos_for_other_targets=appends,
    )
    if appends:
        expected = ([2, 4, 5, 6, 2], [[2, 4, 5, 6, 2], [4, 5, 6, 7, 1], [1, 2, 4, 5, 6]])
    else:
        expected = ([2, 4, 5, 6], [[2, 4, 5, 6], [4, 5, 6, 7], [1, 2, 4, 5]])
    assert item_lists(rows[0]) == expected
    batch = rows.collater([rows[0], rows[1]])
    assert [t.shape for t in batch["target"]] == [batch["net_input"]["src_tokens"].shape] * 3


def test_an_unknown_target_is_refused(dictionary):
    with pytest.raises(ValueError, match=r"\['next'\].*self, future and past"):
        rows_of(dictionary, TEXT, 4, targets=["next"])


def test_without_targets_the_source_is_the_target(dictionary):
    lines = Lines(TEXT)
    rows = MonolingualDataset(lines.lines and [lines[i] for i in range(3)], lines.sizes, dictionary)
    assert rows[0]["target"] is None
    batch = rows.collater([rows[0], rows[1]])
    assert batch["target"] is batch["net_input"]["src_tokens"]
    assert batch["target"].tolist() == [[4, 5, 6, 2], [7, 8, 2, 1]]


def test_a_batch(dictionary):
    rows = rows_of(dictionary, TEXT, 4)
    batch = rows.collater([rows[2], rows[0]])
    assert set(batch) == {"id", "nsentences", "ntokens", "net_input", "target"}
    assert set(batch["net_input"]) == {"src_tokens", "src_lengths"}
    assert batch["id"].tolist() == [2, 0]
    assert (batch["nsentences"], batch["ntokens"]) == (2, 5)
    assert batch["net_input"]["src_tokens"].tolist() == [[9, 1, 1, 1], [2, 4, 5, 6]]
    assert batch["net_input"]["src_lengths"].tolist() == [1, 4]
    assert batch["target"].tolist() == [[2, 1, 1, 1], [4, 5, 6, 2]]
    assert rows.collater([]) == {}


def test_a_batch_of_fixed_shape_counts_its_true_rows(dictionary):
    rows = rows_of(dictionary, TEXT, 4, fixed_pad_length=6, pad_to_bsz=3)
    batch = rows.collater([rows[0]])
    assert batch["target"].tolist() == [[4, 5, 6, 2, 1, 1], [1] * 6, [1] * 6]
    assert batch["net_input"]["src_tokens"].shape == (3, 6)
    assert batch["id"].tolist() == [0]
    assert (batch["nsentences"], batch["ntokens"]) == (1, 4)
    assert batch["net_input"]["src_lengths"].tolist() == [4]


def test_the_order_of_the_original(dictionary):
    # Nine blocks of 4 and one of 2, in the order recorded from the original with seed 1.
    rows = rows_of(dictionary, [[5] * 38], 4, shuffle=True)
    with numpy_seed(1):
        order = rows.ordered_indices()
    assert order.tolist() == [9, 4, 6, 0, 5, 3, 2, 7, 8, 1]
    unshuffled = rows_of(dictionary, [[5] * 38], 4)
    assert unshuffled.ordered_indices().tolist() == [9, 0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_too_long_rows_are_named(dictionary):
    rows = rows_of(dictionary, TEXT, None, "eos")
    kept, ignored = rows.filter_indices_by_size(np.array([2, 0, 1]), 3)
    assert (kept.tolist(), ignored) == ([2, 1], [0])
    kept, ignored = rows.filter_indices_by_size(np.array([2, 0, 1]), (2,))
    assert (kept.tolist(), ignored) == ([2], [0, 1])
    kept, ignored = rows.filter_indices_by_size(np.array([2, 0, 1]), None)
    assert (kept.tolist(), ignored) == ([2, 0, 1], [])


def test_prefetch_reaches_the_lines(dictionary):
    rows = rows_of(dictionary, TEXT, 4)
    assert rows.supports_prefetch
    rows.prefetch([1])
    assert rows.dataset.dataset.prefetched == [1, 2]
