"""Sliding windows: every block with the tokens before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from fairseq.data.collation import collate_tokens
from fairseq.data.fairseq_dataset import FairseqDataset
from fairseq.data.monolingual_dataset import MonolingualDataset

__all__ = ["LMContextWindowDataset"]


class LMContextWindowDataset(FairseqDataset):
    """Gives every row the last source tokens of the rows before it as context.

    Only the row itself is to be scored: its targets stand behind as much padding as there is
    context, and `start_indices` says how much that is. Context and row together are at most
    `tokens_per_sample + context_window` tokens long. A window depends on its index alone, so any
    number of workers, any order and any sharding give the same windows. Padding symbols that
    stand in the text count as tokens.

    Args:
        dataset: the rows.
        tokens_per_sample: tokens in a full row.
        context_window: most tokens of context, at least 1.
        pad_idx: id of padding.

    Raises:
        ValueError: no context, or rows with several targets.
    """

    def __init__(
        self,
        dataset: MonolingualDataset,
        tokens_per_sample: int,
        context_window: int,
        pad_idx: int,
    ) -> None:
        if context_window < 1:
            raise ValueError(f"--context-window is {context_window}; it must be at least 1 here")
        if len(dataset.targets or ()) > 1:
            raise ValueError(
                f"--context-window scores one target, not {', '.join(dataset.targets or ())}"
            )
        self.dataset = dataset
        self.tokens_per_sample = tokens_per_sample
        self.context_window = context_window
        self.pad_idx = pad_idx

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Returns several rows; of successive ones, what one reads is the next one's context."""
        items = []
        before, following = torch.empty(0, dtype=torch.int64), -1
        for index in map(int, indices):
            item = self.dataset[index]
            source = item["source"]
            room = self.tokens_per_sample + self.context_window - len(source)
            count = min(max(room, 0), self.context_window)
            if index != following or len(before) < count:
                before = self.dataset.sources_before(index, count)
            items.append({**item, "context": before[max(len(before) - count, 0) :]})
            before = torch.cat([before, source])[-self.context_window :]
            following = index + 1
        return items

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the rows' batch with context.

        `src_tokens` and `target` are (B, T + context_window), `src_lengths` counts the context,
        `ntokens` does not, `start_indices` lists where each row's own tokens start.
        """
        batch = self.dataset.collater(samples)
        if not batch:
            return batch
        contexts = [sample["context"] for sample in samples]
        starts = [len(context) for context in contexts]
        width = batch["net_input"]["src_tokens"].size(1) + self.context_window
        rows = batch["net_input"]["src_tokens"].size(0)

        def behind_context(values: list[torch.Tensor], fill: bool) -> torch.Tensor:
            before = contexts if fill else [c.new_full((len(c),), self.pad_idx) for c in contexts]
            joined = [torch.cat(pair) for pair in zip(before, values, strict=True)]
            return collate_tokens(joined, self.pad_idx, pad_to_length=width, pad_to_bsz=rows)

        sources = [sample["source"] for sample in samples]
        targets = [s["source"] if s["target"] is None else s["target"] for s in samples]
        batch["net_input"]["src_tokens"] = behind_context(sources, fill=True)
        batch["net_input"]["src_lengths"] += torch.tensor(starts)
        batch["target"] = behind_context(targets, fill=False)
        batch["start_indices"] = starts
        return batch

    @property
    def sizes(self) -> np.ndarray:
        """Tokens in each window, int64."""
        sizes = self.dataset.sizes
        room = np.maximum(self.tokens_per_sample + self.context_window - sizes, 0)
        before = self.dataset.row_ends - sizes
        return sizes + np.minimum(np.minimum(room, self.context_window), before)

    def num_tokens(self, index: int) -> int:
        """Returns the columns a row takes in a batch: its own tokens and the whole context."""
        return int(self.dataset.sizes[index]) + self.context_window

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self.dataset.sizes[indices] + self.context_window

    @property
    def supports_prefetch(self) -> bool:
        return self.dataset.supports_prefetch

    def prefetch(self, indices: Iterable[int]) -> None:
        """Loads these rows and those their context comes from."""
        rows = np.unique(np.fromiter(indices, dtype=np.int64))
        starts = self.dataset.row_ends[rows] - self.dataset.sizes[rows]
        firsts = np.searchsorted(self.dataset.row_ends, starts - self.context_window, side="right")
        needed = [np.arange(a, b + 1) for a, b in zip(np.minimum(firsts, rows), rows, strict=True)]
        self.dataset.prefetch(np.unique(np.concatenate([*needed, rows])))
