"""The raw format (`--dataset-impl raw`): the text itself, encoded when it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fairseq.data.dictionary import Dictionary
from fairseq.data.text_file import check_text_file, read_lines

if TYPE_CHECKING:
    import torch

__all__ = ["IndexedRawTextDataset"]


class IndexedRawTextDataset:
    """The lines of a text file as items.

    Args:
        path: UTF-8 text, one item per line.
        dictionary: gives words their ids; words it lacks become unknown.
        append_eos: end each item with the id of the end of a sentence.
        reverse_order: last word first.

    Attributes:
        lines: the text, without line ends.
        sizes: ids per item, int32 (N,).

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is empty or not UTF-8.
    """

    supports_prefetch = False

    def __init__(
        self,
        path: str | Path,
        dictionary: Dictionary,
        append_eos: bool = True,
        reverse_order: bool = False,
    ) -> None:
        check_text_file(path)
        self.append_eos = append_eos
        self.reverse_order = reverse_order
        self.lines = list(read_lines(path))
        items = [
            dictionary.encode_ids(line, append_eos=append_eos, reverse_order=reverse_order)
            for line in self.lines
        ]
        self.sizes = np.array([len(item) for item in items], dtype=np.int32)
        self._ids = np.concatenate(items)
        self._ends = np.cumsum(self.sizes, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, index: int) -> np.ndarray:
        """Returns the ids of an item, int32."""
        end = int(self._ends[index])
        return self._ids[end - int(self.sizes[index]) : end]

    def __getitem__(self, index: int) -> torch.Tensor:
        """Returns the ids of an item, a LongTensor of its own."""
        import torch

        return torch.from_numpy(self.read(index).astype(np.int64))

    def get_original_text(self, index: int) -> str:
        """Returns a line of the text."""
        return self.lines[index]

    def num_tokens(self, index: int) -> int:
        """Returns the number of ids of an item."""
        return int(self.sizes[index])

    def size(self, index: int) -> int:
        """Returns the number of ids of an item."""
        return int(self.sizes[index])

    def prefetch(self, indices: Iterable[int]) -> None:
        """Does nothing: everything is in memory."""

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Tells whether there is such a file; a folder is none."""
        return Path(path).is_file()
