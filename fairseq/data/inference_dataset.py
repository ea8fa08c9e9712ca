"""Lines of text as a language model scores or continues them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fairseq.data.collation import collate_tokens
from fairseq.data.fairseq_dataset import FairseqDataset

__all__ = ["LMInferenceDataset"]


class LMInferenceDataset(FairseqDataset):
    """One line an item: the source starts with a symbol, the target ends with padding.

    `</s>` is taken off both ends of a line before that.

    Args:
        lines: vectors of token ids.
        lengths: tokens in each line.
        pad: id of padding.
        eos: id of the end of a line.
        first: id put in front of each source: that of `</s>` or of `<s>`.
    """

    def __init__(
        self,
        lines: Sequence[torch.Tensor],
        lengths: Sequence[int],
        *,
        pad: int,
        eos: int,
        first: int,
    ) -> None:
        self.lines = lines
        self.pad = pad
        self.eos = eos
        self.first = first
        self._sizes = np.asarray(lengths, dtype=np.int64)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens in each line, as given."""
        return self._sizes

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        line = self.lines[index].long()
        text = (line != self.eos).nonzero().flatten()
        tokens = line[int(text[0]) : int(text[-1]) + 1] if len(text) else line[:0]
        return {
            "id": index,
            "source": torch.cat([tokens.new_tensor([self.first]), tokens]),
            "target": torch.cat([tokens, tokens.new_tensor([self.pad])]),
        }

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        return self._sizes[indices]

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns `id` (B,), `net_input` with `src_tokens` (B, T) and `src_lengths` (B,), and
        `target` (B, T)."""
        if not samples:
            return {}
        sources = [sample["source"] for sample in samples]
        return {
            "id": torch.tensor([int(sample["id"]) for sample in samples]),
            "net_input": {
                "src_tokens": collate_tokens(sources, self.pad),
                "src_lengths": torch.tensor([len(source) for source in sources]),
            },
            "target": collate_tokens([sample["target"] for sample in samples], self.pad),
        }
