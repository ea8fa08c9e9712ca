"""The base of every dataset that the epoch iterator can batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.utils.data

from fairseq.data.batching import batch_by_size

__all__ = ["FairseqDataset"]


class FairseqDataset(torch.utils.data.Dataset[Any]):
    """A dataset that knows the lengths of its items and how to make a batch of them.

    Subclasses provide `__getitem__`, `__len__`, `collater`, and either `sizes` (an array of
    lengths in tokens) or `num_tokens` and `size`.
    """

    sizes: Any

    def __getitem__(self, index: int) -> Any:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def collater(self, samples: list[Any]) -> dict[str, Any]:
        """Returns the batch made of a list of items; `{}` for an empty list."""
        raise NotImplementedError

    def num_tokens(self, index: int) -> int:
        """Returns the tokens an item counts for against `--max-tokens`."""
        return int(self.sizes[index])

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        """Returns `num_tokens` of several items as an int64 array."""
        return np.fromiter((self.num_tokens(i) for i in indices), np.int64, len(indices))

    def size(self, index: int) -> int | Sequence[int]:
        """Returns the length of an item, compared with the longest a model takes."""
        return int(self.sizes[index])

    def ordered_indices(self) -> np.ndarray:
        """Returns the order in which items are put into batches."""
        return np.arange(len(self), dtype=np.int64)

    @property
    def supports_prefetch(self) -> bool:
        """Whether `prefetch` must be called before items are read."""
        return False

    def prefetch(self, indices: Any) -> None:
        """Loads the items that an epoch is going to read."""
        raise NotImplementedError

    @property
    def supports_fetch_outside_dataloader(self) -> bool:
        """Whether items may be read in the main process too."""
        return True

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        """Whether the batches made for one epoch hold for all."""
        return True

    def set_epoch(self, epoch: int) -> None:
        """Is told the number of the epoch, from 1, before batches are made and read."""

    def filter_indices_by_size(
        self, indices: np.ndarray, max_sizes: int | float | Sequence[int] | None
    ) -> tuple[np.ndarray, list[int]]:
        """Splits indices into those short enough and those too long.

        Args:
            indices: items, in any order; the order is kept.
            max_sizes: longest allowed, or one limit for each element of `size`.

        Returns:
            The indices kept and the list of those left out.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if max_sizes is None:
            return indices, []
        limits = np.atleast_1d(np.asarray(max_sizes))
        sizes = getattr(self, "sizes", None)
        if isinstance(sizes, np.ndarray) and sizes.ndim == 1 and limits.size == 1:
            fits = sizes[indices] <= limits[0]
        else:
            fits = np.fromiter(
                (np.all(self.size(i) <= limits) for i in indices), bool, len(indices)
            )
        return indices[fits], indices[~fits].tolist()

    def batch_by_size(
        self,
        indices: np.ndarray,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        required_batch_size_multiple: int = 1,
        *,
        allow_oversized: bool = False,
    ) -> list[np.ndarray]:
        """Cuts an order of items into batches; see `fairseq.data.batching.batch_by_size`."""
        return batch_by_size(
            indices,
            num_tokens_vec=self.num_tokens_vec(indices),
            max_tokens=max_tokens,
            max_sentences=max_sentences,
            required_batch_size_multiple=required_batch_size_multiple,
            allow_oversized=allow_oversized,
        )
