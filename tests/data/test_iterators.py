"""Counting, grouping, sharding, reading ahead, and epochs."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch

from fairseq.data.fairseq_dataset import FairseqDataset
from fairseq.data.iterators import (
    BufferedIterator,
    CountingIterator,
    EpochBatchIterator,
    GroupedIterator,
    ShardedIterator,
)


class Numbers(FairseqDataset):
    """Item i is the number i; remembers what it was told."""

    def __init__(self, size=10, prefetches=False):
        self.size_ = size
        self.prefetches = prefetches
        self.prefetched = []
        self.epochs = []

    def __len__(self):
        return self.size_

    def __getitem__(self, index):
        if index < 0:
            raise LookupError("an item that cannot be read")
        return int(index)

    def collater(self, samples):
        return {"ids": samples} if samples else {}

    @property
    def supports_prefetch(self):
        return self.prefetches

    def prefetch(self, indices):
        self.prefetched.append(list(indices))

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


def epochs_of(batches, dataset=None, **options):
    dataset = dataset or Numbers()
    return EpochBatchIterator(dataset, dataset.collater, batches, **options)


def ids(iterator):
    return [batch.get("ids", []) for batch in iterator]


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


# counting


def test_counting():
    itr = CountingIterator(range(10))
    assert (itr.n, len(itr), itr.has_next()) == (0, 10, True)
    assert [next(itr), next(itr)] == [0, 1]
    assert itr.n == 2
    itr.skip(3)
    assert (itr.n, next(itr)) == (5, 5)
    assert list(itr.skip(2)) == [8, 9]
    assert not itr.has_next()
    with pytest.raises(StopIteration):
        next(itr)


def test_counting_goes_on_from_a_start():
    itr = CountingIterator(range(4, 10), start=4)
    assert (itr.n, len(itr)) == (4, 10)
    assert list(itr) == list(range(4, 10))
    assert CountingIterator(itr).n == 10


def test_taking_ends_earlier():
    itr = CountingIterator(range(10))
    itr.take(5)
    assert len(itr) == 5
    assert list(itr) == [0, 1, 2, 3, 4]
    assert not itr.has_next()
    itr = CountingIterator(range(4, 10), start=4).take(6)
    assert list(itr) == [4, 5]


def test_a_total_that_is_not_reached_is_an_error_and_the_rest_is_left():
    assert list(CountingIterator(range(10), total=8)) == list(range(8))
    with pytest.raises(IndexError, match="length 12, but exhausted at position 10"):
        list(CountingIterator(range(10), total=12))


def test_more_elements_than_the_length_says_is_an_error():
    class Liar:
        def __len__(self):
            return 2

        def __iter__(self):
            return iter(range(3))

    with pytest.raises(RuntimeError, match="different number of GPUs"):
        list(CountingIterator(Liar()))
    with pytest.raises(TypeError, match="total"):
        CountingIterator(iter([1]))


# groups


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [[i] for i in range(10)]),
        (4, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        (5, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
    ],
)
def test_groups(size, expected):
    itr = GroupedIterator(range(10), size)
    assert len(itr) == len(expected)
    assert list(itr) == expected


def test_groups_go_on_where_the_elements_do():
    itr = GroupedIterator(CountingIterator(range(5, 10), start=5), 4)
    assert (itr.n, len(itr)) == (2, 3)
    next(itr)
    assert (itr.n, itr.has_next()) == (3, False)


def test_the_smaller_last_group_may_be_left_out():
    itr = GroupedIterator(range(10), 4, skip_remainder_batch=True)
    assert (len(itr), list(itr)) == (2, [[0, 1, 2, 3], [4, 5, 6, 7]])
    with pytest.raises(ValueError, match="--update-freq is 0"):
        GroupedIterator(range(3), 0)


# shards


@pytest.mark.parametrize(
    ("num_shards", "expected"),
    [
        (1, [list(range(10))]),
        (2, [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]),
        (3, [[0, 3, 6, 9], [1, 4, 7, None], [2, 5, 8, None]]),
    ],
)
def test_shards(num_shards, expected):
    shards = [ShardedIterator(range(10), num_shards, i) for i in range(num_shards)]
    assert [len(shard) for shard in shards] == [len(e) for e in expected]
    assert [list(shard) for shard in shards] == expected


def test_shards_may_leave_out_the_rest():
    assert list(ShardedIterator(range(10), 3, 0, skip_remainder_batch=True)) == [0, 3, 6]
    with pytest.raises(ValueError, match="shard_id must be between 0 and num_shards"):
        ShardedIterator(range(10), 2, 2)


# reading ahead


def test_reading_ahead_gives_the_same_in_the_same_order():
    buffered = BufferedIterator(3, range(50))
    assert len(buffered) == 50
    assert list(buffered) == list(range(50))
    with pytest.raises(StopIteration):
        next(buffered)


def test_reading_ahead_stops_at_the_size_of_the_buffer():
    reached = []

    class Source:
        def __len__(self):
            return 100

        def __iter__(self):
            for i in range(100):
                reached.append(i)
                yield i

    buffered = BufferedIterator(4, Source())
    assert next(buffered) == 0
    assert wait_until(lambda: len(reached) >= 6)
    time.sleep(0.05)
    assert len(reached) == 6  # one handed out, four ready, one that waits for room
    buffered.close()


def test_taking_from_a_buffer():
    buffered = BufferedIterator(2, range(4, 10))
    itr = CountingIterator(buffered, start=4)
    itr.take(5)
    assert (len(itr), len(buffered), next(itr)) == (5, 1, 4)
    assert not itr.has_next()
    with pytest.raises(StopIteration):
        next(buffered)


def test_what_goes_wrong_in_the_thread_is_raised_here():
    def source():
        yield 1
        raise OSError("disk gone")

    class Source:
        def __len__(self):
            return 5

        def __iter__(self):
            return source()

    buffered = BufferedIterator(2, Source())
    assert next(buffered) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(buffered)
    with pytest.raises(StopIteration):
        next(buffered)
    with pytest.raises(ValueError, match="--data-buffer-size is 0"):
        BufferedIterator(0, [1])


@pytest.mark.parametrize("drop", ["close", "collect"])
def test_no_thread_stays_when_an_epoch_is_left(drop):
    before = threading.active_count()
    buffered = BufferedIterator(2, range(1000))
    assert next(buffered) == 0
    assert threading.active_count() == before + 1
    if drop == "close":
        buffered.close()
    else:
        del buffered
        gc.collect()
    assert threading.active_count() == before


# epochs

BATCHES = [[9, 4, 6], [0, 5, 3], [2, 7, 8], [1]]
EPOCHS = [
    [[2, 7, 8], [1], [0, 5, 3], [9, 4, 6]],
    [[1], [0, 5, 3], [9, 4, 6], [2, 7, 8]],
    [[9, 4, 6], [0, 5, 3], [1], [2, 7, 8]],
]
"""Recorded from the original, seed 1."""


@pytest.mark.parametrize("options", [{}, {"buffer_size": 3}, {"num_workers": 2, "buffer_size": 2}])
def test_epochs_are_shuffled_as_in_the_original(options):
    epochs = epochs_of(BATCHES, **options)
    assert [ids(epochs.next_epoch_itr()) for _ in range(3)] == EPOCHS
    assert epochs.dataset.epochs == [1, 2, 3]
    assert epochs.frozen_batches == BATCHES


def test_shards_as_in_the_original():
    shards = [epochs_of(BATCHES, num_shards=3, shard_id=i) for i in range(3)]
    assert [ids(shard.next_epoch_itr()) for shard in shards] == [
        [[2, 7, 8], [9, 4, 6]],
        [[1], []],
        [[0, 5, 3], []],
    ]
    assert [len(shard) for shard in shards] == [2, 2, 2]


def test_unshuffled_and_first_epochs_of_a_curriculum():
    epochs = epochs_of(BATCHES)
    assert ids(epochs.next_epoch_itr(shuffle=False)) == BATCHES
    assert epochs.shuffle is False
    assert ids(epochs.next_epoch_itr()) == EPOCHS[1]
    never = epochs_of(BATCHES, disable_shuffling=True)
    assert ids(never.next_epoch_itr()) == BATCHES


@pytest.mark.parametrize("num_shards", [1, 2, 3, 5])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_batch_is_in_one_shard_once(num_shards, grouped):
    batches = [[i] for i in range(17)]
    seen = []
    for shard in range(num_shards):
        epochs = epochs_of(
            batches,
            Numbers(17),
            num_shards=num_shards,
            shard_id=shard,
            grouped_shuffling=grouped,
        )
        seen.extend(i for batch in ids(epochs.next_epoch_itr()) for i in batch)
    assert sorted(seen) == list(range(17))


def test_grouped_shuffling_keeps_neighbours_on_different_shards():
    batches = [[i] for i in range(11)]
    shards = [
        ids(
            epochs_of(
                batches, Numbers(11), num_shards=3, shard_id=i, grouped_shuffling=True
            ).next_epoch_itr()
        )
        for i in range(3)
    ]
    steps = list(zip(*shards, strict=True))
    assert sorted(steps[:3]) == [([0], [1], [2]), ([3], [4], [5]), ([6], [7], [8])]
    assert steps[3] == ([9], [10], [])


def test_the_batches_some_shards_lack_may_be_left_out():
    shards = [
        epochs_of(BATCHES, num_shards=3, shard_id=i, skip_remainder_batch=True) for i in range(3)
    ]
    assert [len(shard) for shard in shards] == [1, 1, 1]
    assert [ids(shard.next_epoch_itr()) for shard in shards] == [[b] for b in EPOCHS[0][:3]]


def test_batches_that_are_made_anew_each_epoch():
    epochs = epochs_of(lambda epoch: [[epoch], [epoch + 1]], disable_shuffling=True)
    assert ids(epochs.next_epoch_itr()) == [[1], [2]]
    assert ids(epochs.next_epoch_itr()) == [[2], [3]]
    epochs.load_state_dict({"version": 2, "epoch": 5, "iterations_in_epoch": 1, "shuffle": True})
    assert ids(epochs.next_epoch_itr()) == [[6]]


def test_datasets_that_prefetch():
    dataset = Numbers(prefetches=True)
    epochs = epochs_of(BATCHES, dataset, num_shards=2, shard_id=1)
    assert ids(epochs.next_epoch_itr()) == [[1], [9, 4, 6]]
    assert dataset.prefetched == [[1, 9, 4, 6]]


def test_batches_fixed_to_a_shard():
    own = BATCHES[1::2]
    expected = []
    for epoch in (1, 2, 3):
        order = list(own)
        np.random.RandomState(1 + epoch + 1).shuffle(order)
        expected.append(order)
    dataset = Numbers(prefetches=True)
    epochs = epochs_of(BATCHES, dataset, num_shards=2, shard_id=1)
    found = [ids(epochs.next_epoch_itr(fix_batches_to_gpus=True)) for _ in range(3)]
    assert found == expected
    resumed = epochs_of(BATCHES, Numbers(prefetches=True), num_shards=2, shard_id=1)
    resumed.load_state_dict({"version": 2, "epoch": 3, "iterations_in_epoch": 1, "shuffle": True})
    assert ids(resumed.next_epoch_itr(fix_batches_to_gpus=True)) == expected[2][1:]
    # Datasets that do not prefetch ignore it.
    plain = epochs_of(BATCHES)
    assert ids(plain.next_epoch_itr(fix_batches_to_gpus=True)) == EPOCHS[0]


def test_positions():
    epochs = epochs_of(BATCHES)
    assert (epochs.next_epoch_idx, epochs.iterations_in_epoch, len(epochs)) == (1, 0, 4)
    itr = epochs.next_epoch_itr()
    next(itr)
    assert (epochs.next_epoch_idx, epochs.iterations_in_epoch, epochs.n) == (1, 1, 1)
    assert not epochs.end_of_epoch()
    assert epochs.state_dict() == {
        "version": 2,
        "epoch": 1,
        "iterations_in_epoch": 1,
        "shuffle": True,
    }
    list(itr)
    assert epochs.end_of_epoch()
    assert epochs.next_epoch_idx == 2
    state = epochs.state_dict()
    assert (state["epoch"], state["iterations_in_epoch"]) == (2, 0)


@pytest.mark.parametrize("done", [0, 1, 3, 4, 6, 8])
@pytest.mark.parametrize("options", [{}, {"num_shards": 2, "shard_id": 1}, {"buffer_size": 2}])
def test_going_on_equals_not_stopping(done, options):
    def run(epochs, count):
        seen = []
        while len(seen) < count:
            for batch in epochs.next_epoch_itr():
                seen.append(batch.get("ids", []))
                if len(seen) == count:
                    break
        return seen

    whole = run(epochs_of(BATCHES, **options), 11)
    first = epochs_of(BATCHES, **options)
    before = run(first, done)
    state = first.state_dict()
    resumed = epochs_of(BATCHES, **options)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert before + run(resumed, 11 - done) == whole


def test_going_on_keeps_an_epoch_unshuffled_and_counts_on():
    epochs = epochs_of(BATCHES)
    epochs.load_state_dict({"version": 2, "epoch": 1, "iterations_in_epoch": 2, "shuffle": False})
    assert (epochs.next_epoch_idx, epochs.iterations_in_epoch) == (1, 2)
    itr = epochs.next_epoch_itr()
    assert (itr.n, len(itr)) == (2, 4)
    assert ids(itr) == BATCHES[2:]
    assert ids(epochs.next_epoch_itr()) == EPOCHS[1]


def test_a_position_behind_the_end():
    epochs = epochs_of(BATCHES)
    with pytest.raises(RuntimeError, match=r"batch 4 of epoch 2.*4 batches.*`--reset-dataloader`"):
        epochs.load_state_dict({"version": 2, "epoch": 2, "iterations_in_epoch": 4})
    epochs = epochs_of(BATCHES)
    epochs.load_state_dict({"epoch": 2, "iterations_in_epoch": 4})
    assert (epochs.epoch, epochs.iterations_in_epoch) == (3, 0)
    assert ids(epochs.next_epoch_itr()) == EPOCHS[2]


def test_the_first_batch():
    dataset = Numbers(prefetches=True)
    assert epochs_of(BATCHES, dataset).first_batch == {"ids": [9, 4, 6]}
    assert dataset.prefetched == [[9, 4, 6]]
    with pytest.raises(ValueError, match=r"^The dataset is empty\."):
        _ = epochs_of([]).first_batch


def test_the_buffer_has_at_most_twenty_batches():
    assert epochs_of(BATCHES, buffer_size=100).buffer_size == 20
    with pytest.raises(ValueError, match="shard_id"):
        epochs_of(BATCHES, num_shards=2, shard_id=2)


def test_starting_an_epoch_draws_nothing_from_the_generators_of_training():
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    list(epochs_of(BATCHES, num_workers=1).next_epoch_itr())
    assert (torch.rand(1).item(), np.random.rand()) == expected


@pytest.mark.parametrize("options", [{}, {"buffer_size": 2}])
def test_an_item_that_cannot_be_read(options):
    epochs = epochs_of([[1], [-1], [2]], **options)
    itr = epochs.next_epoch_itr(shuffle=False)
    assert next(itr) == {"ids": [1]}
    with pytest.raises(LookupError, match="cannot be read"):
        next(itr)


LEAVE_EARLY = """
import sys, time, torch
from fairseq.data.iterators import EpochBatchIterator

class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return int(index)

def main():
    epochs = EpochBatchIterator(
        Numbers(), list, [[i] for i in range(100_000)], num_workers=2, buffer_size=3
    )
    for i, batch in enumerate(epochs.next_epoch_itr()):
        if i == 5:
            print("reading", flush=True)
            if sys.argv[1] == "leave":
                return
            if sys.argv[1] == "raise":
                raise SystemExit(3)
            time.sleep(60)

main()
"""


def leave_early(start_process, tmp_path, how):
    script = tmp_path / "leave_early.py"
    script.write_text(LEAVE_EARLY)
    return start_process([sys.executable, script, how])


@pytest.mark.parametrize(("how", "exit_code"), [("leave", 0), ("raise", 3)])
def test_a_process_that_stops_within_an_epoch_ends_quietly(start_process, tmp_path, how, exit_code):
    process = leave_early(start_process, tmp_path, how)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (exit_code, "")


def test_ctrl_c_ends_with_one_traceback_and_no_processes_left(start_process, tmp_path):
    process = leave_early(start_process, tmp_path, "wait")
    assert process.stdout.readline() == "reading\n"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert err.count("Traceback") == 1
    assert err.endswith("KeyboardInterrupt\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
