"""Iterators over the batches of an epoch: counting, grouping, sharding, epochs themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from fairseq.data.buffered_iterator import BufferedIterator

__all__ = [
    "BufferedIterator",
    "CountingIterator",
    "EpochBatchIterator",
    "GroupedIterator",
    "ShardedIterator",
]

MAX_BUFFER_SIZE = 20
"""Most batches read ahead, whatever `--data-buffer-size` says."""


class CountingIterator:
    """Knows how many elements it has handed out and how many there are.

    Args:
        iterable: what is iterated over.
        start: elements handed out already, by an earlier run.
        total: elements in all, `start` included; by default `start + len(iterable)`.

    Attributes:
        n: elements handed out, `start` included.
        total: elements in all.
    """

    def __init__(
        self, iterable: Iterable[Any], start: int | None = None, total: int | None = None
    ) -> None:
        self.iterable = iterable
        self._itr: Iterator[Any] | None = None
        self.n: int = getattr(iterable, "n", 0) if start is None else start
        self._may_leave_rest = total is not None
        self.total = total if total is not None else self.n + _length(iterable)

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> CountingIterator:
        return self

    def __next__(self) -> Any:
        if self._itr is None:
            self._itr = iter(self.iterable)
        if not self.has_next():
            self._check_exhausted(self._itr)
            raise StopIteration
        try:
            element = next(self._itr)
        except StopIteration:
            raise IndexError(
                f"Iterator expected to have length {self.total}, but exhausted at position {self.n}"
            ) from None
        self.n += 1
        return element

    def _check_exhausted(self, itr: Iterator[Any]) -> None:
        if self._may_leave_rest:
            return
        for _ in itr:
            raise RuntimeError(
                "Mismatch between actual and expected iterable length. This happens when a run is "
                "resumed with a different number of GPUs (start with --reset-dataloader), or when "
                "a split has fewer batches than there are GPUs"
            )

    def has_next(self) -> bool:
        """Tells whether there are elements left."""
        return self.n < self.total

    def skip(self, num_to_skip: int) -> CountingIterator:
        """Reads and drops elements."""
        for _ in range(num_to_skip):
            next(self)
        return self

    def take(self, n: int) -> CountingIterator:
        """Ends after `n` elements in all, those handed out already included."""
        self.total = min(self.total, n)
        self._may_leave_rest = True
        if hasattr(self.iterable, "take"):
            self.iterable.take(max(n - self.n, 0))
        return self


def _length(iterable: Iterable[Any]) -> int:
    if not isinstance(iterable, Sized):
        raise TypeError(f"{type(iterable).__name__} has no length; give `total`")
    return len(iterable)


class GroupedIterator(CountingIterator):
    """Lists of consecutive elements; the last list may be shorter.

    Args:
        iterable: what is iterated over; its `n`, if it has one, says where it goes on.
        chunk_size: elements in a list (`--update-freq`).
        skip_remainder_batch: whether the shorter last list is left out.
    """

    def __init__(
        self, iterable: Iterable[Any], chunk_size: int, skip_remainder_batch: bool = False
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"--update-freq is {chunk_size}; it must be at least 1")
        num_groups = _length(iterable) / chunk_size
        super().__init__(
            _groups(iterable, chunk_size),
            start=math.ceil(getattr(iterable, "n", 0) / chunk_size),
            total=math.floor(num_groups) if skip_remainder_batch else math.ceil(num_groups),
        )
        self.chunk_size = chunk_size


def _groups(iterable: Iterable[Any], chunk_size: int) -> Iterator[list[Any]]:
    itr = iter(iterable)
    while group := list(itertools.islice(itr, chunk_size)):
        yield group


class ShardedIterator(CountingIterator):
    """Every `num_shards`-th element, from the `shard_id`-th on.

    Args:
        iterable: what is iterated over.
        num_shards: number of shards.
        shard_id: this shard, from 0.
        fill_value: takes the place of elements that a shard lacks, so that all are equally long.
        skip_remainder_batch: whether all shards end with the shortest one instead.

    Raises:
        ValueError: there is no such shard.
    """

    def __init__(
        self,
        iterable: Iterable[Any],
        num_shards: int,
        shard_id: int,
        fill_value: Any = None,
        skip_remainder_batch: bool = False,
    ) -> None:
        if not 0 <= shard_id < num_shards:
            raise ValueError(
                f"shard_id must be between 0 and num_shards ({num_shards}), but is {shard_id}; "
                "--shard-id counts from 0 and stays below --num-shards"
            )
        size = _length(iterable)
        total = size // num_shards if skip_remainder_batch else math.ceil(size / num_shards)
        own = itertools.islice(iterable, shard_id, None, num_shards)
        super().__init__(
            itertools.islice(itertools.chain(own, itertools.repeat(fill_value)), total),
            start=math.ceil(getattr(iterable, "n", 0) / num_shards),
            total=total,
        )


class EpochBatchIterator:
    """The batches of every epoch, in the order the seed gives, from any position on.

    Epochs count from 1. Epoch e with shuffling takes the list of batches shuffled by numpy's legacy
    generator seeded with `seed + e`; shard r of W gets the batches r, r + W, r + 2W, ..., and where
    it lacks one an empty batch.

    Args:
        dataset: what the batches are read from.
        collate_fn: list of items -> batch.
        batch_sampler: the batches as lists of indices; or a function epoch -> such a list.
        seed: seed of the order of batches.
        num_shards: number of shards (data-parallel workers).
        shard_id: this shard, from 0.
        num_workers: processes that read batches; 0 reads in this process.
        epoch: the first epoch.
        buffer_size: batches read ahead in a thread, at most 20 are; 0 for no thread.
        timeout: seconds to wait for a worker process; 0 for ever.
        disable_shuffling: never shuffle.
        skip_remainder_batch: leave out the batches that not every shard has one of, instead of
            filling up with empty ones.
        grouped_shuffling: shuffle groups of `num_shards` batches, so that shards get batches that
            were neighbours (of similar length) at the same time. A smaller last group stays last.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[list[Any]], Any],
        batch_sampler: Sequence[Sequence[int]] | Callable[[int], Sequence[Sequence[int]]],
        seed: int = 1,
        num_shards: int = 1,
        shard_id: int = 0,
        num_workers: int = 0,
        epoch: int = 1,
        buffer_size: int = 0,
        timeout: int = 0,
        disable_shuffling: bool = False,
        *,
        skip_remainder_batch: bool = False,
        grouped_shuffling: bool = False,
    ) -> None:
        if not 0 <= shard_id < num_shards:
            raise ValueError(
                f"shard_id must be between 0 and num_shards ({num_shards}), but is {shard_id}; "
                "--shard-id counts from 0 and stays below --num-shards"
            )
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.batch_sampler = batch_sampler
        self.seed = seed
        self.num_shards = num_shards
        self.shard_id = shard_id
        self.num_workers = num_workers
        self.buffer_size = min(buffer_size, MAX_BUFFER_SIZE)
        self.timeout = timeout
        self.disable_shuffling = disable_shuffling
        self.skip_remainder_batch = skip_remainder_batch
        self.grouped_shuffling = grouped_shuffling
        self.epoch = max(epoch, 1)
        self.shuffle = not disable_shuffling
        self._frozen: tuple[int | None, list[Any]] | None = None
        self._current: CountingIterator | None = None
        self._resume: _Position | None = None

    @property
    def frozen_batches(self) -> list[Any]:
        """The batches of the epoch, before shuffling and sharding."""
        epoch = self.epoch if callable(self.batch_sampler) else None
        if self._frozen is None or self._frozen[0] != epoch:
            sampler = self.batch_sampler
            batches = sampler(self.epoch) if callable(sampler) else sampler
            self._frozen = (epoch, list(batches))
        return self._frozen[1]

    @property
    def first_batch(self) -> Any:
        """The first batch before shuffling, collated.

        Raises:
            ValueError: there are no batches.
        """
        if not self.frozen_batches:
            raise ValueError(
                "The dataset is empty. This could indicate that all elements in the dataset have "
                "been skipped as too long: see the warning about invalid sizes, and compare "
                "--tokens-per-sample with --max-tokens and --max-target-positions"
            )
        if not getattr(self.dataset, "supports_fetch_outside_dataloader", True):
            return "DUMMY"
        indices = self.frozen_batches[0]
        if getattr(self.dataset, "supports_prefetch", False):
            self.dataset.prefetch(indices)
        return self.collate_fn([self.dataset[i] for i in indices])

    def __len__(self) -> int:
        """Returns the batches of an epoch on one shard."""
        num_batches = len(self.frozen_batches)
        if self.skip_remainder_batch:
            return num_batches // self.num_shards
        return math.ceil(num_batches / self.num_shards)

    @property
    def n(self) -> int:
        """Batches of the epoch that were handed out."""
        return self.iterations_in_epoch

    @property
    def iterations_in_epoch(self) -> int:
        """Batches of the epoch that were handed out on this shard."""
        if self._resume is not None:
            return self._resume.offset
        return self._current.n if self._current is not None else 0

    @property
    def next_epoch_idx(self) -> int:
        """The epoch that `next_epoch_itr` is going to start or go on with."""
        if self._resume is None and self._current is not None and self.end_of_epoch():
            return self.epoch + 1
        return self.epoch

    def next_epoch_itr(
        self, shuffle: bool = True, fix_batches_to_gpus: bool = False
    ) -> CountingIterator:
        """Starts the next epoch, or goes on with one that a state dict was taken in.

        Args:
            shuffle: whether batches are shuffled; a resumed epoch keeps what it started with.
            fix_batches_to_gpus: for datasets that prefetch, whether each shard keeps its batches
                over epochs and shuffles them for itself.

        Returns:
            An iterator over this shard's batches, counting from where it starts.
        """
        self.epoch = self.next_epoch_idx
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)
        position, self._resume = self._resume or _Position(0, shuffle), None
        self.shuffle = position.shuffle and not self.disable_shuffling
        # Lets go of an epoch left unfinished before its successor starts reading.
        self._current = None
        batches = self._batches_of_epoch(fix_batches_to_gpus)
        self._current = self._read(batches, position.offset)
        return self._current

    def end_of_epoch(self) -> bool:
        """Tells whether the current epoch has no batches left."""
        return self._current is not None and not self._current.has_next()

    def state_dict(self) -> dict[str, Any]:
        """Returns the position: epoch, batches handed out on this shard, and whether shuffled."""
        at_end = self._resume is None and self.end_of_epoch()
        return {
            "version": 2,
            "epoch": self.epoch + 1 if at_end else self.epoch,
            "iterations_in_epoch": 0 if at_end else self.iterations_in_epoch,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to a position; the next epoch iterator starts there.

        Raises:
            RuntimeError: the position lies behind the end of the epoch.
        """
        self.epoch = state_dict["epoch"]
        self._current = self._resume = None
        offset = state_dict.get("iterations_in_epoch", 0)
        self.shuffle = state_dict.get("shuffle", True)
        if offset == 0:
            return
        if offset < len(self):
            self._resume = _Position(offset, self.shuffle)
        elif state_dict.get("version", 1) == 1:
            self.epoch += 1
        else:
            raise RuntimeError(
                f"Cannot resume training due to dataloader mismatch: the checkpoint was saved "
                f"after batch {offset} of epoch {self.epoch}, but this epoch has {len(self)} "
                "batches. Data, batch size or number of GPUs differ; `--reset-dataloader` starts "
                "with the first epoch again"
            )

    def _batches_of_epoch(self, fix_batches_to_gpus: bool) -> list[Any]:
        """Returns this shard's batches in their order of the epoch."""
        prefetches = getattr(self.dataset, "supports_prefetch", False)
        shuffle_own = prefetches and fix_batches_to_gpus
        batches = list(self.frozen_batches)
        if self.shuffle and not shuffle_own:
            batches = self._shuffled(batches, self.seed + self.epoch, self._group_size)
        sharded = ShardedIterator(
            batches, self.num_shards, self.shard_id, [], self.skip_remainder_batch
        )
        batches = list(sharded)
        if prefetches:
            self.dataset.prefetch([i for batch in batches for i in batch])
        if self.shuffle and shuffle_own:
            batches = self._shuffled(batches, self.seed + self.epoch + self.shard_id, 1)
        return batches

    @property
    def _group_size(self) -> int:
        return self.num_shards if self.grouped_shuffling else 1

    @staticmethod
    def _shuffled(batches: list[Any], seed: int, group_size: int) -> list[Any]:
        num_grouped = len(batches) // group_size * group_size
        groups = [batches[i : i + group_size] for i in range(0, num_grouped, group_size)]
        np.random.RandomState(seed).shuffle(groups)
        return [*itertools.chain.from_iterable(groups), *batches[num_grouped:]]

    def _read(self, batches: list[Any], offset: int) -> CountingIterator:
        loader: Any = DataLoader(
            self.dataset,
            collate_fn=self.collate_fn,
            batch_sampler=batches[offset:],
            num_workers=self.num_workers,
            timeout=self.timeout,
            # Its own, or starting an epoch would draw from the generator of dropout.
            generator=torch.Generator().manual_seed(self.seed + self.epoch),
        )
        if self.buffer_size > 0:
            loader = BufferedIterator(self.buffer_size, loader)
        return CountingIterator(loader, start=offset)


class _Position:
    def __init__(self, offset: int, shuffle: bool) -> None:
        self.offset = offset
        self.shuffle = shuffle
