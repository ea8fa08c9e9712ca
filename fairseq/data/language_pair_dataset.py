"""Pairs of a source and its target.

Shapes: `B` rows, `S` longest source, `T` longest target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from fairseq.data.collation import collate_tokens
from fairseq.data.fairseq_dataset import FairseqDataset

__all__ = ["LanguagePairDataset", "collate_pairs"]


class LanguagePairDataset(FairseqDataset):
    """Items `{"id", "source", "target"}`, target None where there is none.

    Args:
        src: source lines, each ending in `</s>`.
        src_sizes: their lengths in tokens.
        src_dict: their dictionary.
        tgt: target lines, each ending in `</s>`.
        tgt_sizes: their lengths in tokens.
        tgt_dict: their dictionary.
        left_pad_source: pad sources in front instead of behind.
        left_pad_target: pad targets in front instead of behind.
        shuffle: whether pairs of equal lengths are batched in random order.

    Attributes:
        sizes: tokens in each source and target, int64 (N, 2), or (N,) without targets.

    Raises:
        ValueError: sources and targets differ in number, or dictionaries in their special symbols.
    """

    def __init__(
        self,
        src: Any,
        src_sizes: Any,
        src_dict: Any,
        tgt: Any = None,
        tgt_sizes: Any = None,
        tgt_dict: Any = None,
        *,
        left_pad_source: bool = True,
        left_pad_target: bool = False,
        shuffle: bool = True,
    ) -> None:
        if tgt is not None and len(src) != len(tgt):
            raise ValueError(
                f"there are {len(src)} sources and {len(tgt)} targets; binarize texts that have "
                "the same number of lines"
            )
        if tgt_dict is not None:
            check_special_symbols(src_dict, tgt_dict)
        self.src = src
        self.src_dict = src_dict
        self.src_sizes = np.asarray(src_sizes, dtype=np.int64)
        self.tgt = tgt
        self.tgt_dict = tgt_dict
        self.tgt_sizes = None if tgt is None else np.asarray(tgt_sizes, dtype=np.int64)
        self.left_pad_source = left_pad_source
        self.left_pad_target = left_pad_target
        self.shuffle = shuffle
        if self.tgt_sizes is None:
            self.sizes = self.src_sizes
        else:
            self.sizes = np.stack([self.src_sizes, self.tgt_sizes], axis=1)

    def __len__(self) -> int:
        return len(self.src)

    def __getitem__(self, index: int) -> dict[str, Any]:
        target = None if self.tgt is None else self.tgt[index]
        return {"id": index, "source": self.src[index], "target": target}

    def num_tokens(self, index: int) -> int:
        """Returns the tokens of the longer of source and target."""
        return int(np.max(self.sizes[index]))

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        sizes: np.ndarray = self.sizes[indices]
        return sizes if sizes.ndim == 1 else sizes.max(axis=1)

    def size(self, index: int) -> tuple[int, int]:
        """Returns the tokens of source and target, 0 where there is no target."""
        target = 0 if self.tgt_sizes is None else int(self.tgt_sizes[index])
        return int(self.src_sizes[index]), target

    def ordered_indices(self) -> np.ndarray:
        """Returns the pairs by length of source, equal ones by length of target, and those that
        are equal in both in random order (numpy's global generator)."""
        num_pairs = len(self)
        first = np.random.permutation(num_pairs) if self.shuffle else np.arange(num_pairs)
        if self.tgt_sizes is not None:
            first = first[np.argsort(self.tgt_sizes[first], kind="stable")]
        return first[np.argsort(self.src_sizes[first], kind="stable")]

    def filter_indices_by_size(
        self, indices: np.ndarray, max_sizes: int | float | Sequence[int] | None
    ) -> tuple[np.ndarray, list[int]]:
        """Splits indices into those short enough and those too long.

        Args:
            indices: pairs, in any order; the order is kept.
            max_sizes: longest source and target, or one number for both; None is any length.

        Returns:
            The indices kept and the list of those left out.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if max_sizes is None:
            return indices, []
        limits = max_sizes if isinstance(max_sizes, Sequence) else (max_sizes, max_sizes)
        fits = np.ones(len(indices), dtype=bool)
        for sizes, limit in zip((self.src_sizes, self.tgt_sizes), limits, strict=True):
            if sizes is not None and limit is not None:
                fits &= sizes[indices] <= limit
        return indices[fits], indices[~fits].tolist()

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the padded batch; see `collate_pairs`."""
        return collate_pairs(
            samples,
            pad_idx=self.src_dict.pad(),
            eos_idx=self.src_dict.eos(),
            left_pad_source=self.left_pad_source,
            left_pad_target=self.left_pad_target,
        )

    @property
    def supports_prefetch(self) -> bool:
        sides = [self.src] if self.tgt is None else [self.src, self.tgt]
        return all(getattr(side, "supports_prefetch", False) for side in sides)

    def prefetch(self, indices: Iterable[int]) -> None:
        indices = list(indices)
        self.src.prefetch(indices)
        if self.tgt is not None:
            self.tgt.prefetch(indices)


def check_special_symbols(source: Any, target: Any) -> None:
    """Checks that padding, `</s>` and `<unk>` have the same ids in two dictionaries.

    Raises:
        ValueError: one has not.
    """
    for name in ("pad", "eos", "unk"):
        ids = [getattr(dictionary, name)() for dictionary in (source, target)]
        if ids[0] != ids[1]:
            raise ValueError(
                f"the dictionaries of source and target give {name} the ids {ids[0]} and {ids[1]}; "
                "make both with fairseq-preprocess"
            )


def collate_pairs(
    samples: Sequence[dict[str, Any]],
    *,
    pad_idx: int,
    eos_idx: int,
    left_pad_source: bool = True,
    left_pad_target: bool = False,
) -> dict[str, Any]:
    """Makes the batch of items `{"id", "source", "target"}`, longest source first.

    Args:
        samples: items, all with a target or all with None.
        pad_idx: what fills rows.
        eos_idx: what ends targets, and begins what the decoder reads.
        left_pad_source: pad sources in front.
        left_pad_target: pad targets in front.

    Returns:
        `{}` for no items, else `id` (B,), `nsentences` (B), `ntokens` (target tokens, those of the
        source without a target), `net_input` with `src_tokens` (B, S), `src_lengths` (B,) and,
        where there are targets, `prev_output_tokens` (B, T): the target with its end moved to the
        front; and `target` (B, T) or None.
    """
    if not samples:
        return {}
    samples = sorted(samples, key=lambda sample: -len(sample["source"]))
    sources = [sample["source"] for sample in samples]
    src_lengths = [len(source) for source in sources]
    batch: dict[str, Any] = {
        "id": torch.tensor([int(sample["id"]) for sample in samples]),
        "nsentences": len(samples),
        "ntokens": sum(src_lengths),
        "net_input": {
            "src_tokens": collate_tokens(sources, pad_idx, left_pad=left_pad_source),
            "src_lengths": torch.tensor(src_lengths),
        },
        "target": None,
    }
    if samples[0].get("target") is not None:
        targets = [sample["target"] for sample in samples]
        batch["ntokens"] = sum(len(target) for target in targets)
        batch["target"] = collate_tokens(targets, pad_idx, left_pad=left_pad_target)
        batch["net_input"]["prev_output_tokens"] = collate_tokens(
            targets, pad_idx, eos_idx, left_pad=left_pad_target, move_eos_to_beginning=True
        )
    return batch
