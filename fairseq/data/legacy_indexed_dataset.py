"""The older format (`--dataset-impl lazy` and `cached`).

`.idx`: magic, then 64-bit numbers: version, element type, element size, N, S, N+1 offsets into the
sizes, N+1 offsets into the data (in elements), S sizes. `.bin`: int32, each id plus one, as Lua
counts. Both names stand for the same files; `cached` loads the items that will be needed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

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

__all__ = ["IndexedCachedDataset", "IndexedDataset", "IndexedDatasetBuilder"]

MAGIC = b"TNTIDX\x00\x00"
_VERSION = 1
_FLOAT_CODE = 6


class IndexedDataset:
    """Items of a dataset in the older format, read when they are asked for.

    Args:
        path: what precedes `.idx` and `.bin`.
        fix_lua_indexing: subtract the one that was added to each id on writing.

    Attributes:
        sizes: ids per item, int64 (N,).
        dtype: element type of the file.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: they are truncated, foreign, or do not belong together.
    """

    supports_prefetch = False

    def __init__(self, path: str | Path, fix_lua_indexing: bool = False) -> None:
        self._path = str(path)
        self.fix_lua_indexing = fix_lua_indexing
        self._open()

    def _open(self) -> None:
        index_path = index_file_path(self._path)
        index = IndexReader(index_path, MAGIC, "lazy/cached")
        index.expect_version("<u8", _VERSION)
        code, element_size = index.number("<u8"), index.number("<u8")
        self.dtype = _element_type(code, element_size, index_path)
        num_items, num_sizes = index.number("<u8"), index.number("<u8")
        dim_offsets = index.array("<i8", num_items + 1)
        self._offsets = index.array("<i8", num_items + 1)
        self.sizes = index.array("<i8", num_sizes)
        index.expect_end()
        _check_items(dim_offsets, self._offsets, self.sizes, index_path)
        count = int(self._offsets[-1])
        self._ids = map_elements(data_file_path(self._path), self.dtype, count, index_path)

    def __getstate__(self) -> tuple[str, bool]:
        return self._path, self.fix_lua_indexing

    def __setstate__(self, state: tuple[str, bool]) -> None:
        self._path, self.fix_lua_indexing = state
        self._open()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _stored(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of a dataset of {len(self)}")
        index %= len(self)
        return self._ids[self._offsets[index] : self._offsets[index + 1]]

    def read(self, index: int) -> np.ndarray:
        """Returns the ids of an item, int64."""
        return self._stored(index).astype(np.int64) - int(self.fix_lua_indexing)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Returns the ids of an item, a LongTensor of its own."""
        import torch

        return torch.from_numpy(self.read(index))

    def num_tokens(self, index: int) -> int:
        """Returns the number of ids of an item."""
        return int(self.sizes[index])

    def size(self, index: int) -> int:
        """Returns the number of ids of an item."""
        return int(self.sizes[index])

    def prefetch(self, indices: Iterable[int]) -> None:
        """Does nothing: items are read when they are asked for."""

    @staticmethod
    def exists(path: str | Path) -> bool:
        """Tells whether both files are there."""
        return all(Path(name(path)).is_file() for name in (index_file_path, data_file_path))


class IndexedCachedDataset(IndexedDataset):
    """The same, with the items that `prefetch` was told of in memory."""

    supports_prefetch = True

    def _open(self) -> None:
        super()._open()
        self._cache = np.zeros(0, self.dtype)
        self._cached_at: dict[int, int] = {}

    def prefetch(self, indices: Iterable[int]) -> None:
        """Loads items into memory, and forgets those loaded before unless all are there."""
        wanted = sorted(set(map(int, indices)))
        if all(index in self._cached_at for index in wanted):
            return
        ends = np.cumsum(self.sizes[wanted])
        self._cache = np.empty(int(ends[-1]), self.dtype)
        starts = (ends - self.sizes[wanted]).tolist()
        self._cached_at = {}
        for index, start in zip(wanted, starts, strict=True):
            self._cache[start : start + int(self.sizes[index])] = super()._stored(index)
            self._cached_at[index] = start

    def _stored(self, index: int) -> np.ndarray:
        start = self._cached_at.get(index)
        if start is None:
            return super()._stored(index)
        return self._cache[start : start + int(self.sizes[index])]


def _element_type(code: int, element_size: int, path: str) -> np.dtype:
    dtype = dtype_of_code(code, path)
    if code == _FLOAT_CODE and element_size == 4:
        return np.dtype("<f4")  # what Lua calls float
    if dtype.itemsize != element_size:
        raise ValueError(
            f"{path}: elements of {element_size} bytes, but {dtype} has {dtype.itemsize}; the "
            "file is damaged or of another program"
        )
    return dtype


def _check_items(dims: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, path: str) -> None:
    """Checks that items are vectors that lie one after the other."""
    if len(sizes) != len(dims) - 1 or not np.array_equal(dims, np.arange(len(dims))):
        raise ValueError(
            f"{path}: items are not vectors ({len(sizes)} sizes for {len(dims) - 1} items); "
            "it is no dataset of token ids, or damaged"
        )
    if offsets[0] != 0 or (sizes < 0).any() or not np.array_equal(np.diff(offsets), sizes):
        raise ValueError(
            f"{path}: sizes of items and their offsets contradict each other; the index is "
            "damaged: rebuild the dataset"
        )


class IndexedDatasetBuilder(TokenWriter):
    """Writes a dataset in the older format.

    Args:
        out_file: path of the `.bin` file.
        dtype: element type.
    """

    _SHIFT = 1

    def __init__(self, out_file: str | Path, dtype: type = np.int32) -> None:
        super().__init__(out_file, dtype)

    def merge_file_(self, another_file: str | Path) -> None:
        other = IndexedDataset(another_file)
        self._append(another_file, other.dtype, other.sizes)

    def finalize(self, index_file: str | Path) -> None:
        sizes = self._close().astype("<i8")
        num_items = len(sizes)
        header = (_VERSION, CODE_OF_DTYPE[self.dtype], self.dtype.itemsize, num_items, num_items)
        with open(index_file, "wb") as file:
            file.write(MAGIC + struct.pack("<5Q", *header))
            file.write(np.arange(num_items + 1, dtype="<i8").tobytes())
            file.write(np.concatenate([[0], np.cumsum(sizes)]).astype("<i8").tobytes())
            file.write(sizes.tobytes())
