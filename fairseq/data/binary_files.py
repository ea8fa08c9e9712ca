"""What the binary formats share: file names, element types, checked reading, plain writing."""

from __future__ import annotations

import abc
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np

__all__ = [
    "CODE_OF_DTYPE",
    "DTYPE_OF_CODE",
    "IndexReader",
    "TokenWriter",
    "best_fitting_int_dtype",
    "data_file_path",
    "dtype_of_code",
    "index_file_path",
    "map_elements",
]

_NAMES = ("u1", "i1", "i2", "i4", "i8", "f8", "f8", "u2", "u4", "u8")
DTYPE_OF_CODE: dict[int, np.dtype] = {
    code: np.dtype("<" + name) for code, name in enumerate(_NAMES, start=1)
}
"""Element types by the code in an index file; 6 and 7 are both float64."""

CODE_OF_DTYPE: dict[np.dtype, int] = {
    dtype: code for code, dtype in reversed(DTYPE_OF_CODE.items())
}


def index_file_path(prefix_path: str | Path) -> str:
    """Returns the path of the index of a dataset."""
    return f"{prefix_path}.idx"


def data_file_path(prefix_path: str | Path) -> str:
    """Returns the path of the elements of a dataset."""
    return f"{prefix_path}.bin"


def best_fitting_int_dtype(max_int_to_represent: int | None) -> type[np.integer]:
    """Returns the element type for a vocabulary of that size; uint32 if it is unknown."""
    if max_int_to_represent is None:
        return np.uint32
    if max_int_to_represent < 65500:
        return np.uint16
    if max_int_to_represent < 4294967295:
        return np.uint32
    return np.int64


def dtype_of_code(code: int, path: str) -> np.dtype:
    """Returns the element type of a code read from the file `path`; ValueError if unknown."""
    if code not in DTYPE_OF_CODE:
        raise ValueError(
            f"{path}: element type code {code}, but codes are 1 to {len(DTYPE_OF_CODE)}; "
            "the file is damaged or of another format"
        )
    return DTYPE_OF_CODE[code]


class IndexReader:
    """Reads the parts of an index file in order and checks that they are all there.

    Args:
        path: the file.
        magic: the bytes it starts with.
        kind: name of the format, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file does not start with `magic`.
    """

    def __init__(self, path: str, magic: bytes, kind: str) -> None:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no index {path}; fairseq-preprocess writes one")
        self.path = path
        self._kind = kind
        self._size = os.path.getsize(path)
        self._data: np.ndarray = np.zeros(0, np.uint8)
        if self._size:
            self._data = np.asarray(np.memmap(path, mode="r", dtype=np.uint8))
        self._position = 0
        found = bytes(self._data[: len(magic)])
        if found != magic:
            raise ValueError(
                f"{path}: index does not match the {kind} format: it starts with {found!r} "
                f"instead of {magic!r}; it was written by another --dataset-impl, is foreign, or "
                "is damaged"
            )
        self._position = len(magic)

    def array(self, dtype: str, count: int) -> np.ndarray:
        """Returns the next `count` numbers, without copying them; ValueError if some miss."""
        end = self._position + np.dtype(dtype).itemsize * count
        if count < 0 or end > self._size:
            raise ValueError(
                f"{self.path}: {self._size} bytes, but its {self._kind} header asks for {end} or "
                "more; the file is truncated, or of a related format: rebuild the dataset"
            )
        start, self._position = self._position, end
        return self._data[start:end].view(dtype)

    def number(self, dtype: str) -> int:
        """Returns the next number."""
        return int(self.array(dtype, 1)[0])

    def expect_version(self, dtype: str, version: int) -> None:
        """Reads a version; ValueError if it is another than `version`."""
        found = self.number(dtype)
        if found != version:
            raise ValueError(
                f"{self.path}: version {found} of the {self._kind} format, but {version} is the "
                "one there is; the file is damaged or of another program"
            )

    def expect_end(self) -> None:
        """Raises ValueError if anything follows."""
        if self._position != self._size:
            raise ValueError(
                f"{self.path}: {self._size} bytes, but its {self._kind} header describes "
                f"{self._position}; the file is damaged or of a related format (Megatron's has "
                "a list of documents as well): rebuild the dataset"
            )


def map_elements(path: str, dtype: np.dtype, count: int, index_path: str) -> np.ndarray:
    """Maps a `.bin` file into memory.

    Args:
        path: the file.
        dtype: its element type.
        count: number of elements that the index describes.
        index_path: the index, for messages.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file has another length.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing, though there is {index_path}")
    size = os.path.getsize(path)
    if size != count * dtype.itemsize:
        raise ValueError(
            f"{path}: {size} bytes, but {index_path} describes {count * dtype.itemsize} "
            f"({count} elements of {dtype.itemsize}); one of them is truncated or not of this "
            "dataset: rebuild it"
        )
    if count == 0:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, mode="r", dtype=dtype, shape=(count,)))


class TokenWriter(abc.ABC):
    """Writes the elements of a `.bin` file, item by item or in bulk, and collects item sizes.

    Args:
        out_file: path of the `.bin` file.
        dtype: element type.
    """

    _SHIFT = 0
    """What is added to every id."""

    def __init__(self, out_file: str | Path, dtype: np.dtype | type) -> None:
        self.path = str(out_file)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODE_OF_DTYPE:
            allowed = ", ".join(str(known) for known in CODE_OF_DTYPE)
            raise ValueError(f"element type {self.dtype} has no code; allowed are {allowed}")
        self._num_tokens = 0
        self._sizes: list[np.ndarray] = []
        self._file: BinaryIO = open(self.path, "wb")  # noqa: SIM115  (closed by finalize)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file, finished or not."""
        self._file.close()

    @abc.abstractmethod
    def finalize(self, index_file: str | Path) -> None:
        """Closes the `.bin` file and writes the index."""

    @abc.abstractmethod
    def merge_file_(self, another_file: str | Path) -> None:
        """Appends a finished dataset of the same format.

        Args:
            another_file: what precedes its `.idx` and `.bin`.

        Raises:
            ValueError: its element type is another one.
        """

    def add_item(self, tensor: np.ndarray) -> None:
        """Writes one item: a vector of ids, as a torch tensor, an array or a list."""
        ids = np.asarray(tensor)
        self.write_tokens(ids)
        self.end_items(np.array([ids.size]))

    def write_tokens(self, ids: np.ndarray) -> None:
        """Writes ids, of whole items or of parts of one.

        Raises:
            ValueError: `ids` is no vector, or has an id that the element type cannot hold.
        """
        if ids.ndim != 1:
            raise ValueError(f"an item is a vector of ids, but this has shape {ids.shape}")
        if ids.size and self.dtype.kind in "iu":
            self._check_range(int(ids.min()) + self._SHIFT, int(ids.max()) + self._SHIFT)
        shifted = ids + self._SHIFT if self._SHIFT else ids
        self._file.write(shifted.astype(self.dtype, copy=False).tobytes())
        self._num_tokens += ids.size

    def _check_range(self, low: int, high: int) -> None:
        limits = np.iinfo(self.dtype)
        if low < limits.min or high > limits.max:
            raise ValueError(
                f"{self.path}: {low if low < limits.min else high} does not fit into {self.dtype}; "
                "make the dataset with the vocabulary size that its dictionary has"
            )

    def end_items(self, sizes: np.ndarray) -> None:
        """Ends items; their sizes cover, in order, the ids written since the last end.

        Raises:
            ValueError: an item has 2**31 or more ids.
        """
        if sizes.size and int(sizes.max()) >= 2**31:
            raise ValueError(f"{self.path}: an item has {sizes.max()} ids; most are 2**31 - 1")
        self._sizes.append(sizes.astype(np.int32))

    def _append(self, prefix: str | Path, dtype: np.dtype, sizes: np.ndarray) -> None:
        """Appends the elements of another dataset, given their type and the sizes of items."""
        if dtype != self.dtype:
            raise ValueError(
                f"{prefix} has elements of {dtype}, {self.path} of {self.dtype}; only datasets of "
                "one element type can be merged"
            )
        with open(data_file_path(prefix), "rb") as other:
            shutil.copyfileobj(other, self._file, length=1 << 24)
        self._num_tokens += int(sizes.sum(dtype=np.int64))
        self.end_items(sizes)

    def _close(self) -> np.ndarray:
        """Closes the file; returns the sizes of all items, int32."""
        self._file.close()
        sizes = np.concatenate(self._sizes) if self._sizes else np.zeros(0, np.int32)
        assert int(sizes.sum(dtype=np.int64)) == self._num_tokens, "items do not cover the ids"
        return sizes
