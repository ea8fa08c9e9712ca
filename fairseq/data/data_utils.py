"""Loading binarized data, and small helpers of datasets and tasks."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fairseq.data.batching import batch_by_size
from fairseq.data.collation import collate_tokens

__all__ = [
    "available_splits",
    "batch_by_size",
    "collate_tokens",
    "load_indexed_dataset",
    "numpy_seed",
    "split_paths",
]

logger = logging.getLogger(__name__)


def split_paths(paths: str) -> list[str]:
    """Splits a list of data folders: at `os.pathsep`, or at `|` if it holds URLs."""
    return paths.split(os.pathsep) if "://" not in paths else paths.split("|")


def available_splits(folder: str | Path) -> list[str]:
    """Returns the names of the datasets in a folder, whatever their format."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    names = {p.stem for p in folder.glob("*.idx") if p.with_suffix(".bin").is_file()}
    names.update(p.name for p in folder.iterdir() if p.is_file() and not p.suffix)
    return sorted(names)


def load_indexed_dataset(
    path: str,
    dictionary: Any = None,
    dataset_impl: str | None = None,
    combine: bool = False,
    default: str = "cached",
) -> Any:
    """Loads a dataset of lines.

    Args:
        path: the data, without `.bin` and `.idx`.
        dictionary: needed for text in the format `raw`.
        dataset_impl: the format; None finds it out.
        combine: whether `path1`, `path2`, ... follow, up to the first that is missing.
        default: the format tried where none is found out.

    Returns:
        The dataset, or None if there is none at this path.
    """
    from fairseq.data import indexed_dataset
    from fairseq.data.concat_dataset import ConcatDataset

    parts: list[Any] = []
    while True:
        part_path = f"{path}{len(parts) or ''}"
        impl = dataset_impl or indexed_dataset.infer_dataset_impl(part_path) or default
        part = indexed_dataset.make_dataset(
            part_path, impl=impl, fix_lua_indexing=True, dictionary=dictionary
        )
        if part is None:
            break
        logger.info(f"loaded {len(part):,} examples from: {part_path}")
        parts.append(part)
        if not combine:
            break
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else ConcatDataset(parts)


@contextlib.contextmanager
def numpy_seed(seed: int | None, *addl_seeds: int) -> Iterator[None]:
    """Seeds numpy's global generator for a while, and restores it afterwards.

    Args:
        seed: the seed; None leaves the generator as it is.
        addl_seeds: numbers mixed into the seed.
    """
    if seed is None:
        yield
        return
    if addl_seeds:
        seed = int(hash((seed, *addl_seeds)) % 1e6)
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
