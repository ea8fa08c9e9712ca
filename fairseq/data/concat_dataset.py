"""Several datasets one after the other."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from fairseq.data.fairseq_dataset import FairseqDataset
from fairseq.data.token_block_dataset import file_of

__all__ = ["ConcatDataset"]


class ConcatDataset(FairseqDataset):
    """The items of several datasets, one dataset after the other.

    Args:
        datasets: at least one dataset of lines.
    """

    def __init__(self, datasets: Iterable[Any]) -> None:
        self.datasets = list(datasets)
        if not self.datasets:
            raise ValueError("ConcatDataset needs at least one dataset")
        self.cumulative_sizes = list(itertools.accumulate(len(d) for d in self.datasets))

    def __len__(self) -> int:
        return self.cumulative_sizes[-1]

    def __getitem__(self, index: int) -> Any:
        dataset, i = self._locate(index)
        return dataset[i]

    def read(self, index: int) -> np.ndarray:
        """Returns an item as an array of token ids."""
        dataset, i = self._locate(index)
        return np.asarray(dataset.read(i))

    def _locate(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a dataset of {len(self)} items")
        which = bisect.bisect_right(self.cumulative_sizes, index)
        return self.datasets[which], index - (self.cumulative_sizes[which - 1] if which else 0)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens in each item."""
        return np.concatenate([np.asarray(d.sizes) for d in self.datasets])

    @property
    def supports_prefetch(self) -> bool:
        return all(getattr(d, "supports_prefetch", False) for d in self.datasets)

    def prefetch(self, indices: Iterable[int]) -> None:
        wanted: list[list[int]] = [[] for _ in self.datasets]
        for index in indices:
            which = bisect.bisect_right(self.cumulative_sizes, index)
            wanted[which].append(index - (self.cumulative_sizes[which - 1] if which else 0))
        for dataset, own in zip(self.datasets, wanted, strict=True):
            dataset.prefetch(own)

    def path_of(self, index: int) -> str:
        """Returns the file an item was read from, for messages."""
        return file_of(*self._locate(index))
