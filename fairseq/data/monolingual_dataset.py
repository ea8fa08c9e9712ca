"""What a language model reads and predicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fairseq.data.collation import collate_language_model
from fairseq.data.fairseq_dataset import FairseqDataset
from fairseq.data.token_block_dataset import TokenBlockDataset

__all__ = ["MonolingualDataset"]


class MonolingualDataset(FairseqDataset):
    """Items `{"id", "source", "target"}` made of blocks.

    With `add_bos_token` every source and target starts with `<s>`, and the sizes count it: a
    batch is no larger than `--max-tokens` says, and a row no longer than `--max-target-positions`
    allows. (In the original the sizes did not count it, and its ALiBi models failed.) To keep
    rows at `--tokens-per-sample`, the task cuts blocks one token shorter.

    Args:
        dataset: blocks; triples (source, future target, past target) if there are targets.
        sizes: tokens in each block.
        src_vocab: the dictionary of the source.
        tgt_vocab: the dictionary of the target; if it is smaller, ids beyond it become `<unk>`.
        add_eos_for_other_targets: with a self or past target, whether a source that does not end
            in `</s>` gets one.
        shuffle: whether blocks of equal length are batched in random order.
        targets: any of self, future, past; None for items without target.
        add_bos_token: whether rows start with `<s>`.
        fixed_pad_length: batches have at least so many columns.
        pad_to_bsz: batches have at least so many rows.

    Raises:
        ValueError: an unknown target.
    """

    def __init__(
        self,
        dataset: Any,
        sizes: Any,
        src_vocab: Any,
        tgt_vocab: Any = None,
        add_eos_for_other_targets: bool = False,
        shuffle: bool = False,
        targets: Sequence[str] | None = None,
        add_bos_token: bool = False,
        fixed_pad_length: int | None = None,
        pad_to_bsz: int | None = None,
    ) -> None:
        unknown = set(targets or ()) - {"self", "future", "past"}
        if unknown:
            raise ValueError(
                f"unknown targets {sorted(unknown)}; allowed are self, future and past"
            )
        self.dataset = dataset
        self.vocab = src_vocab
        self.tgt_vocab = tgt_vocab if tgt_vocab is not None else src_vocab
        self.add_eos_for_other_targets = add_eos_for_other_targets
        self.shuffle = shuffle
        self.targets = list(targets) if targets is not None else None
        self.add_bos_token = add_bos_token
        self.fixed_pad_length = fixed_pad_length
        self.pad_to_bsz = pad_to_bsz
        self._sizes = np.asarray(sizes, dtype=np.int64) + int(add_bos_token)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens in each row, with `<s>`, int64."""
        return self._sizes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.targets is None:
            return {"id": index, "source": self._with_bos(self.dataset[index]), "target": None}
        source, target = self._source_and_target(*self.dataset[index])
        return {"id": index, "source": source, "target": target}

    def _source_and_target(
        self, source: torch.Tensor, future: torch.Tensor, past: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | list[torch.Tensor]]:
        assert self.targets is not None
        if self._may_append_eos and int(source[-1]) != self.vocab.eos():
            pad = source.new_tensor([self.vocab.pad()])
            past = torch.cat([pad, past[1:], source[-1:]])
            future = torch.cat([future, pad])
            source = torch.cat([source, source.new_tensor([self.vocab.eos()])])
        choices = {"self": source, "future": future, "past": past}
        targets = [self._with_bos(self._known_targets(choices[name])) for name in self.targets]
        return self._with_bos(source), targets[0] if len(targets) == 1 else targets

    @property
    def _may_append_eos(self) -> bool:
        return self.add_eos_for_other_targets and bool({"self", "past"} & set(self.targets or ()))

    def _known_targets(self, target: torch.Tensor) -> torch.Tensor:
        if len(self.tgt_vocab) == len(self.vocab):
            return target
        return target.masked_fill(target >= len(self.tgt_vocab), self.tgt_vocab.unk())

    def _with_bos(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.add_bos_token:
            return ids
        return torch.cat([ids.new_tensor([self.vocab.bos()]), ids])

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self._sizes[indices]

    def ordered_indices(self) -> np.ndarray:
        """Returns the rows by length, equal ones in random order (numpy's global generator)."""
        num_rows = len(self)
        ties = np.random.permutation(num_rows) if self.shuffle else np.arange(num_rows)
        return np.lexsort([ties, self._sizes])

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns the padded batch; see `fairseq.data.collation.collate_language_model`."""
        return collate_language_model(
            samples,
            self.vocab.pad(),
            fixed_pad_length=self.fixed_pad_length,
            pad_to_bsz=self.pad_to_bsz,
        )

    @property
    def supports_prefetch(self) -> bool:
        return bool(getattr(self.dataset, "supports_prefetch", False))

    def prefetch(self, indices: Iterable[int]) -> None:
        self.dataset.prefetch(indices)

    @cached_property
    def row_ends(self) -> np.ndarray:
        """Where each row ends when all rows are put one after the other, int64."""
        return np.cumsum(self._sizes)

    def sources_before(self, index: int, count: int) -> torch.Tensor:
        """Returns the last `count` source tokens of the rows before a row, in natural order.

        Fewer where the rows before it have fewer.
        """
        index = int(index)
        if not isinstance(self.dataset, TokenBlockDataset) or self._may_append_eos:
            return self._collect_sources_before(index, count)
        stop = int(self.row_ends[index] - self._sizes[index])
        positions = np.arange(max(stop - count, 0), stop)
        rows = np.searchsorted(self.row_ends, positions, side="right")
        offsets = positions - (self.row_ends[rows] - self._sizes[rows])
        if not self.add_bos_token:
            return torch.from_numpy(self.dataset.sources_at(rows, offsets))
        sources = np.full(len(positions), self.vocab.bos(), dtype=np.int64)
        is_text = offsets > 0
        sources[is_text] = self.dataset.sources_at(rows[is_text], offsets[is_text] - 1)
        return torch.from_numpy(sources)

    def _collect_sources_before(self, index: int, count: int) -> torch.Tensor:
        pieces = [torch.empty(0, dtype=torch.int64)]
        while index > 0 and count > 0:
            index -= 1
            source = self[index]["source"]
            pieces.append(source[max(len(source) - count, 0) :])
            count -= len(pieces[-1])
        return torch.cat(pieces[::-1])
