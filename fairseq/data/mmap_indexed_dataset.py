"""The default format (`--dataset-impl mmap`): an index of sizes and byte offsets, mapped ids.

`.idx`: magic, u64 version, u8 element type, u64 N, i32 sizes[N], i64 byte offsets[N].
`.bin`: the ids, one item after the other. All little endian, nothing aligned.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fairseq.data.binary_files import (
    CODE_OF_DTYPE,
    IndexReader,
    TokenWriter,
    data_file_path,
    dtype_of_code,
    index_file_path,
    map_elements,
)

if TYPE_CHECKING:
    import torch

__all__ = ["MMapIndexedDataset", "MMapIndexedDatasetBuilder"]

MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_BLOCK = 1 << 20


class MMapIndexedDataset:
    """Items of a dataset in the mmap format.

    Args:
        path: what precedes `.idx` and `.bin`.

    Attributes:
        sizes: ids per item, int32 (N,).
        dtype: element type of the file.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: they are truncated, foreign, or do not belong together.
    """

    supports_prefetch = False

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        self._open()

    def _open(self) -> None:
        index_path = index_file_path(self._path)
        index = IndexReader(index_path, MAGIC, "mmap")
        index.expect_version("<u8", _VERSION)
        self.dtype = dtype_of_code(index.number("u1"), index_path)
        num_items = index.number("<u8")
        self.sizes = index.array("<i4", num_items)
        self._offsets = index.array("<i8", num_items)
        index.expect_end()
        count = _check_offsets(self.sizes, self._offsets, self.dtype.itemsize, index_path)
        self._ids = map_elements(data_file_path(self._path), self.dtype, count, index_path)

    def __getstate__(self) -> str:
        return self._path

    def __setstate__(self, path: str) -> None:
        self._path = path
        self._open()

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, index: int) -> np.ndarray:
        """Returns the ids of an item as they lie in the file, read-only, without copying."""
        start = int(self._offsets[index]) // self.dtype.itemsize
        return self._ids[start : start + int(self.sizes[index])]

    def __getitem__(self, index: int) -> torch.Tensor:
        """Returns the ids of an item, a LongTensor of its own."""
        import torch

        return torch.from_numpy(self.read(index).astype(np.int64))

    def num_tokens(self, index: int) -> int:
        """Returns the number of ids of an item."""
        return int(self.sizes[index])

    def size(self, index: int) -> int:
        """Returns the number of ids of an item."""
        return int(self.sizes[index])

    def prefetch(self, indices: Iterable[int]) -> None:
        """Does nothing: the operating system reads ahead."""

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Tells whether both files are there."""
        return all(Path(name(path)).is_file() for name in (index_file_path, data_file_path))


def _check_offsets(sizes: np.ndarray, offsets: np.ndarray, itemsize: int, path: str) -> int:
    """Checks that items lie one after the other; returns the number of elements."""
    position = 0
    for start in range(0, len(sizes), _BLOCK):
        block = sizes[start : start + _BLOCK].astype(np.int64)
        ends = position + np.cumsum(block)
        expected = (ends - block) * itemsize
        wrong = (block < 0) | (offsets[start : start + _BLOCK] != expected)
        if wrong.any():
            item = int(wrong.argmax())
            raise ValueError(
                f"{path}: item {start + item} has size {block[item]} and byte offset "
                f"{offsets[start + item]}, but {expected[item]} is where the items before it end; "
                "the index is damaged (early versions wrote negative offsets beyond 2 GiB with "
                "--workers): rebuild the dataset"
            )
        position = int(ends[-1])
    return position


class MMapIndexedDatasetBuilder(TokenWriter):
    """Writes a dataset in the mmap format.

    Args:
        out_file: path of the `.bin` file.
        dtype: element type; `best_fitting_int_dtype` chooses one.
    """

    def __init__(self, out_file: str | Path, dtype: Any = np.int64) -> None:
        super().__init__(out_file, dtype)

    def merge_file_(self, another_file: str | Path) -> None:
        other = MMapIndexedDataset(another_file)
        self._append(another_file, other.dtype, other.sizes)

    def finalize(self, index_file: str | Path) -> None:
        sizes = self._close()
        with open(index_file, "wb") as file:
            file.write(MAGIC)
            file.write(struct.pack("<QBQ", _VERSION, CODE_OF_DTYPE[self.dtype], len(sizes)))
            file.write(sizes.astype("<i4", copy=False).tobytes())
            position = 0
            for start in range(0, len(sizes), _BLOCK):
                block = sizes[start : start + _BLOCK].astype(np.int64)
                ends = position + np.cumsum(block)
                file.write(((ends - block) * self.dtype.itemsize).astype("<i8").tobytes())
                position = int(ends[-1])
