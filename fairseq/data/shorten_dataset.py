"""Lines shortened before they are cut into blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from fairseq.data.fairseq_dataset import FairseqDataset
from fairseq.data.token_block_dataset import file_of

__all__ = ["RandomCropDataset", "TruncateDataset", "maybe_shorten_dataset"]


class TruncateDataset(FairseqDataset):
    """Keeps the first tokens of every line.

    Args:
        dataset: lines, as vectors of token ids, with `sizes`.
        truncation_length: most tokens a line keeps.
    """

    def __init__(self, dataset: Any, truncation_length: int) -> None:
        if truncation_length < 1:
            raise ValueError(f"lines cannot be shortened to {truncation_length} tokens")
        self.dataset = dataset
        self.truncation_length = truncation_length

    @property
    def sizes(self) -> np.ndarray:
        """Tokens in each shortened line."""
        return np.minimum(np.asarray(self.dataset.sizes), self.truncation_length)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        line: torch.Tensor = self.dataset[index]
        start = self._start(index, len(line))
        return line[start : start + self.truncation_length]

    def _start(self, index: int, num_tokens: int) -> int:
        return 0

    @property
    def supports_prefetch(self) -> bool:
        return bool(getattr(self.dataset, "supports_prefetch", False))

    def prefetch(self, indices: Iterable[int]) -> None:
        self.dataset.prefetch(indices)

    def path_of(self, index: int) -> str:
        """Returns the file a line was read from, for messages."""
        return file_of(self.dataset, index)


class RandomCropDataset(TruncateDataset):
    """Keeps a random stretch of every longer line.

    The stretch depends on the seed, the epoch and the number of the line alone. As in the
    original its start is drawn below, never at, the last possible one, and a block dataset over
    this one does not tell it the epoch: each line keeps its stretch for the whole training.

    Args:
        dataset: lines, as vectors of token ids, with `sizes`.
        truncation_length: most tokens a line keeps.
        seed: seed of the draws.
    """

    def __init__(self, dataset: Any, truncation_length: int, seed: int = 1) -> None:
        super().__init__(dataset, truncation_length)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _start(self, index: int, num_tokens: int) -> int:
        excess = num_tokens - self.truncation_length
        if excess <= 0:
            return 0
        seed = int(hash((self.seed, self.epoch, int(index))) % 1e6)
        return int(np.random.RandomState(seed).randint(0, excess))


def maybe_shorten_dataset(
    dataset: Any,
    split: str,
    shorten_data_split_list: str,
    shorten_method: str,
    tokens_per_sample: int,
    seed: int,
) -> Any:
    """Returns the lines of a split shortened as `--shorten-method` says.

    Args:
        dataset: lines, as vectors of token ids, with `sizes`.
        split: name of the split.
        shorten_data_split_list: splits to shorten, separated by commas; empty for all.
        shorten_method: none, truncate or random_crop.
        tokens_per_sample: most tokens a line keeps.
        seed: seed of random crops.

    Raises:
        ValueError: an unknown method.
    """
    if shorten_method not in ("none", "truncate", "random_crop"):
        raise ValueError(
            f"--shorten-method is {shorten_method!r}; it must be none, truncate or random_crop"
        )
    chosen = [name.strip() for name in shorten_data_split_list.split(",") if name.strip()]
    if shorten_method == "none" or (chosen and split not in chosen):
        return dataset
    if shorten_method == "truncate":
        return TruncateDataset(dataset, tokens_per_sample)
    return RandomCropDataset(dataset, tokens_per_sample, seed)
