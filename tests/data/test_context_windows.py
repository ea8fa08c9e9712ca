"""Sliding windows, against the running context of the original, row after row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq.data.context_windows import LMContextWindowDataset
from fairseq.data.dictionary import dummy_dictionary
from fairseq.data.iterators import EpochBatchIterator
from fairseq.data.monolingual_dataset import MonolingualDataset
from fairseq.data.token_block_dataset import TokenBlockDataset
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

PAD, EOS = 1, 2
DICTIONARY = dummy_dictionary(200)


class Lines:
    def __init__(self, lines):
        self.lines = lines
        self.sizes = np.array([len(line) for line in lines])
        self.prefetched = None

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, index):
        return torch.tensor(self.lines[index])


class PrefetchedLines(Lines):
    supports_prefetch = True

    def __getitem__(self, index):
        assert index in self.prefetched, "read without prefetch"
        return super().__getitem__(index)

    def prefetch(self, indices):
        self.prefetched = set(indices)


def rows_of(lines, block_size, mode="none", **options):
    lines = lines if isinstance(lines, Lines) else Lines(lines)
    blocks = TokenBlockDataset(lines, lines.sizes, block_size, PAD, EOS, mode, include_targets=True)
    return MonolingualDataset(blocks, blocks.sizes, DICTIONARY, targets=["future"], **options)


def windows_of(rows, block_size, context):
    return LMContextWindowDataset(rows, block_size, context, PAD)


def running_context(rows, block_size, context, batches):
    """The rule of the original: rows one after the other, `previous` carried on.

    Lengths are those of the rows, so that a padding symbol in the text counts.
    """
    previous = []
    collated = []
    for batch in batches:
        items = [rows[i] for i in batch]
        width = max(len(item["source"]) for item in items)
        sources, targets, starts, lengths = [], [], [], []
        for item in items:
            source, target = item["source"].tolist(), item["target"].tolist()
            excess = len(previous) + len(source) - (block_size + context)
            if excess > 0:
                previous = previous[excess:]
            filled = previous + source
            sources.append(filled + [PAD] * (width + context - len(filled)))
            targets.append([PAD] * len(previous) + target + [PAD] * (width + context - len(filled)))
            starts.append(len(previous))
            lengths.append(len(filled))
            previous = filled[-context:]
        num_tokens = sum(len(item["source"]) for item in items)
        collated.append((sources, targets, starts, lengths, num_tokens))
    return collated


def collate(windows, batches):
    collated = []
    for indices in batches:
        batch = windows.collater([windows[i] for i in indices])
        collated.append(
            (
                batch["net_input"]["src_tokens"].tolist(),
                batch["target"].tolist(),
                batch["start_indices"],
                batch["net_input"]["src_lengths"].tolist(),
                batch["ntokens"],
            )
        )
    return collated


STREAM = [[4, 5, 6, 7, 8, 2], [9, 10]]


def test_example_of_one_row_a_batch():
    windows = windows_of(rows_of(STREAM, 1), 1, 3)
    batches = [windows.collater([windows[i]]) for i in range(5)]
    assert [b["net_input"]["src_tokens"].tolist() for b in batches] == [
        [[2, 1, 1, 1]],
        [[2, 4, 1, 1]],
        [[2, 4, 5, 1]],
        [[2, 4, 5, 6]],
        [[4, 5, 6, 7]],
    ]
    assert [b["start_indices"] for b in batches] == [[0], [1], [2], [3], [3]]
    assert batches[4]["target"].tolist() == [[1, 1, 1, 8]]
    assert batches[1]["target"].tolist() == [[1, 5, 1, 1]]


def test_example_of_two_rows_a_batch():
    windows = windows_of(rows_of(STREAM, 2), 2, 3)
    batch = windows.collater([windows[0], windows[1]])
    assert batch["net_input"]["src_tokens"].tolist() == [[2, 4, 1, 1, 1], [2, 4, 5, 6, 1]]
    assert batch["target"].tolist() == [[4, 5, 1, 1, 1], [1, 1, 6, 7, 1]]
    assert batch["start_indices"] == [0, 2]
    assert batch["net_input"]["src_lengths"].tolist() == [2, 4]
    assert (batch["ntokens"], batch["nsentences"]) == (4, 2)
    batch = windows.collater([windows[2], windows[3]])
    assert batch["start_indices"] == [3, 3]
    assert windows.collater([]) == {}


text = st.lists(
    st.lists(st.sampled_from([1, 4, 5, 6, 7, 8, 9]), max_size=8).map(lambda line: [*line, 2]),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    lines=text,
    block_size=st.integers(1, 6),
    context=st.integers(1, 9),
    mode=st.sampled_from(["none", "complete", "complete_doc", "eos"]),
    rows_per_batch=st.integers(1, 4),
    add_bos_token=st.booleans(),
)
def test_windows_equal_the_running_context(
    lines, block_size, context, mode, rows_per_batch, add_bos_token
):
    rows = rows_of(lines, block_size, mode, add_bos_token=add_bos_token)
    block_size += add_bos_token
    windows = windows_of(rows, block_size, context)
    order = np.arange(len(rows))
    assert windows.ordered_indices().tolist() == order.tolist()
    batches = [order[i : i + rows_per_batch] for i in range(0, len(order), rows_per_batch)]
    expected = running_context(rows, block_size, context, batches)
    assert collate(windows, batches) == expected
    assert windows.sizes.tolist() == [n for batch in expected for n in batch[3]]
    width = [len(batch[0][0]) for batch in expected]
    budget = [int(windows.num_tokens_vec(batch).max()) for batch in batches]
    assert budget == width
    # In any order the same windows.
    assert collate(windows, batches[::-1]) == expected[::-1]


def test_rows_of_another_kind_of_dataset():
    """As a plug-in may bring: rows that are no blocks, and have no target."""
    rows = [torch.tensor([4, 5, 6, 7]), torch.tensor([8, 9, 10, 11]), torch.tensor([12, 13])]
    dataset = MonolingualDataset(rows, [4, 4, 2], DICTIONARY)
    task = LanguageModelingTask(LanguageModelingConfig(tokens_per_sample=4), DICTIONARY)
    batches = task.eval_lm_dataloader(dataset, batch_size=1, context_window=2, num_workers=0)
    found = [(b["net_input"]["src_tokens"][0].tolist(), b["target"][0].tolist()) for b in batches]
    assert found == [
        ([4, 5, 6, 7, 1, 1], [4, 5, 6, 7, 1, 1]),
        ([6, 7, 8, 9, 10, 11], [1, 1, 8, 9, 10, 11]),
        ([10, 11, 12, 13], [1, 1, 12, 13]),
    ]


@pytest.mark.parametrize(("num_shards", "num_workers"), [(1, 2), (2, 1), (3, 0)])
def test_workers_and_shards_do_not_change_windows(num_shards, num_workers):
    rng = np.random.RandomState(0)
    lines = [[*rng.randint(3, 100, rng.randint(0, 9)).tolist(), 2] for _ in range(40)]
    rows = rows_of(lines, 5)
    windows = windows_of(rows, 5, 7)
    batches = windows.batch_by_size(windows.ordered_indices(), max_tokens=40)
    expected = dict(
        zip(
            [tuple(batch) for batch in batches],
            running_context(rows, 5, 7, batches),
            strict=True,
        )
    )
    seen = []
    for shard in range(num_shards):
        epochs = EpochBatchIterator(
            windows,
            windows.collater,
            batches,
            num_shards=num_shards,
            shard_id=shard,
            num_workers=num_workers,
        )
        for batch in epochs.next_epoch_itr(shuffle=False):
            if not batch:
                continue
            indices = tuple(batch["id"].tolist())
            sources, targets, starts, *_ = expected[indices]
            assert batch["net_input"]["src_tokens"].tolist() == sources
            assert batch["target"].tolist() == targets
            assert batch["start_indices"] == starts
            seen.append(indices)
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("mode", ["none", "complete", "eos"])
def test_prefetch_names_the_lines_of_the_context_too(mode):
    rng = np.random.RandomState(1)
    lines = [[*rng.randint(3, 100, rng.randint(0, 9)).tolist(), 2] for _ in range(30)]
    plain = windows_of(rows_of(lines, 4, mode), 4, 6)
    rows = rows_of(PrefetchedLines(lines), 4, mode)
    windows = windows_of(rows, 4, 6)
    assert windows.supports_prefetch
    for index in range(len(windows)):
        windows.prefetch([index])
        for key in ("source", "target", "context"):
            assert windows[index][key].tolist() == plain[index][key].tolist()
    windows.prefetch(range(len(windows)))
    assert rows.dataset.dataset.prefetched == set(range(len(lines)))


def test_what_makes_no_windows():
    rows = rows_of(STREAM, 2)
    with pytest.raises(ValueError, match="--context-window is 0"):
        windows_of(rows, 2, 0)
    rows.targets = ["self", "future"]
    with pytest.raises(ValueError, match="one target, not self, future"):
        windows_of(rows, 2, 3)
