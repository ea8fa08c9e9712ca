"""Datasets of token ids on disk: finding, reading and writing them in any format.

A dataset is addressed by what precedes `.idx` and `.bin`; a raw one is a text file of that name.
"""

from __future__ import annotations

import os
from pathlib import Path

from fairseq.data import legacy_indexed_dataset, mmap_indexed_dataset
from fairseq.data.binary_files import (
    best_fitting_int_dtype,
    data_file_path,
    index_file_path,
)
from fairseq.data.dictionary import Dictionary
from fairseq.data.legacy_indexed_dataset import (
    IndexedCachedDataset,
    IndexedDataset,
    IndexedDatasetBuilder,
)
from fairseq.data.mmap_indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder
from fairseq.data.raw_text_dataset import IndexedRawTextDataset

__all__ = [
    "IndexedCachedDataset",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "IndexedRawTextDataset",
    "MMapIndexedDataset",
    "MMapIndexedDatasetBuilder",
    "best_fitting_int_dtype",
    "data_file_path",
    "dataset_exists",
    "get_available_dataset_impl",
    "index_file_path",
    "infer_dataset_impl",
    "make_builder",
    "make_dataset",
]

_IMPL_OF_MAGIC = {mmap_indexed_dataset.MAGIC[:8]: "mmap", legacy_indexed_dataset.MAGIC: "cached"}


def get_available_dataset_impl() -> list[str]:
    """Returns the names of the formats."""
    return ["raw", "lazy", "cached", "mmap"]


def dataset_exists(path: str | Path, impl: str) -> bool:
    """Tells whether a dataset is there: a regular file for raw, both files for the others."""
    _check_impl(impl)
    return (IndexedRawTextDataset if impl == "raw" else IndexedDataset).exists(path)


def infer_dataset_impl(path: str | Path) -> str | None:
    """Returns the format of a dataset: raw, mmap, or cached for the older one; None if none is.

    Raises:
        FileNotFoundError: one of `.idx` and `.bin` is there and the other is not.
        ValueError: the index is of no known format.
    """
    if IndexedRawTextDataset.exists(path):
        return "raw"
    if not _both_files_exist(path):
        return None
    with open(index_file_path(path), "rb") as file:
        magic = file.read(8)
    if magic not in _IMPL_OF_MAGIC:
        known = " or ".join(map(repr, _IMPL_OF_MAGIC))
        raise ValueError(
            f"{index_file_path(path)}: is no index: it starts with {magic!r} instead of {known}; "
            "it is empty, damaged or of another program: rebuild the dataset"
        )
    return _IMPL_OF_MAGIC[magic]


def make_dataset(
    path: str | Path,
    impl: str,
    fix_lua_indexing: bool = False,
    dictionary: Dictionary | None = None,
) -> IndexedRawTextDataset | IndexedDataset | MMapIndexedDataset | None:
    """Opens a dataset.

    Args:
        path: what precedes `.idx` and `.bin`.
        impl: the format.
        fix_lua_indexing: subtract the one that the older format adds to ids.
        dictionary: for raw text, which needs one.

    Returns:
        The dataset; None if there is none.

    Raises:
        FileNotFoundError: one of `.idx` and `.bin` is there and the other is not.
        ValueError: the format is unknown, or the files are not what it says.
    """
    _check_impl(impl)
    if impl == "raw":
        if not IndexedRawTextDataset.exists(path):
            return None
        if dictionary is None:
            raise ValueError(f"{path}: --dataset-impl raw needs a dictionary to encode the text")
        return IndexedRawTextDataset(path, dictionary)
    if not _both_files_exist(path):
        return None
    if impl == "mmap":
        return MMapIndexedDataset(path)
    reader = IndexedDataset if impl == "lazy" else IndexedCachedDataset
    return reader(path, fix_lua_indexing=fix_lua_indexing)


def make_builder(
    out_file: str | Path, impl: str, vocab_size: int | None = None
) -> IndexedDatasetBuilder | MMapIndexedDatasetBuilder:
    """Opens a dataset for writing.

    Args:
        out_file: path of the `.bin` file.
        impl: the format, not raw.
        vocab_size: number of words in the dictionary, which decides the element type of mmap.

    Raises:
        ValueError: the format is unknown, or raw, which is plain text.
    """
    _check_impl(impl)
    if impl == "raw":
        raise ValueError(f"{out_file}: --dataset-impl raw is plain text, it has no .bin file")
    if impl == "mmap":
        return MMapIndexedDatasetBuilder(out_file, dtype=best_fitting_int_dtype(vocab_size))
    return IndexedDatasetBuilder(out_file)


def _check_impl(impl: str) -> None:
    known = get_available_dataset_impl()
    if impl not in known:
        raise ValueError(f"--dataset-impl {impl} is not supported; choose {', '.join(known)}")


def _both_files_exist(path: str | Path) -> bool:
    names = (index_file_path(path), data_file_path(path))
    there = [os.path.isfile(name) for name in names]
    if any(there) and not all(there):
        found, missing = names if there[0] else names[::-1]
        raise FileNotFoundError(
            f"{missing} is missing, though there is {found}; a dataset needs both: copy it too, "
            "or rebuild the dataset"
        )
    return all(there)
