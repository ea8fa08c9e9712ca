"""Finding the files of a language pair, and opening them as pairs of lines.

A split of the pair a-b is two datasets, `<split>.a-b.a` and `<split>.a-b.b`, or those of b-a.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from fairseq.data import indexed_dataset
from fairseq.data.concat_dataset import ConcatDataset
from fairseq.data.data_utils import load_indexed_dataset
from fairseq.data.shorten_dataset import TruncateDataset

__all__ = ["TruncatedLines", "infer_language_pair", "load_language_pair"]

logger = logging.getLogger(__name__)


def infer_language_pair(folder: str | Path) -> tuple[str, str] | None:
    """Returns the languages of the first file, by name, that tells them; None if none does."""
    for path in sorted(Path(folder).glob("*.*-*.*")):
        languages = path.name.split(".")[1].split("-")
        if len(languages) == 2 and all(languages):
            return languages[0], languages[1]
    return None


class TruncatedLines(TruncateDataset):
    """Lines cut to a number of tokens that still end in `</s>`.

    Args:
        dataset: lines that end in `</s>`.
        truncation_length: most tokens of a line, `</s>` included.
        eos: id of `</s>`.
    """

    def __init__(self, dataset: Any, truncation_length: int, eos: int) -> None:
        super().__init__(dataset, truncation_length)
        self.eos = eos

    def __getitem__(self, index: int) -> torch.Tensor:
        line = super().__getitem__(index)
        if len(line) and int(line[-1]) != self.eos:
            line = torch.cat([line[:-1], line.new_tensor([self.eos])])
        return line


def load_language_pair(
    folder: str,
    split: str,
    source: tuple[str, Any],
    target: tuple[str, Any],
    *,
    combine: bool = False,
    dataset_impl: str | None = None,
    upsample_primary: int = -1,
    needs_target: bool = True,
) -> tuple[Any, Any]:
    """Opens a split.

    Args:
        folder: of the binarized data.
        split: its name.
        source: language and dictionary of what is read.
        target: language and dictionary of what is predicted.
        combine: whether `split1`, `split2`, ... follow, up to the first that is missing.
        dataset_impl: format of the data; None finds it out.
        upsample_primary: how often the first part is there, where others follow it.
        needs_target: whether lines without targets are an error.

    Returns:
        (source lines, target lines or None).

    Raises:
        FileNotFoundError: there is no such split.
    """
    parts: list[tuple[Any, Any]] = []
    while True:
        name = f"{split}{len(parts) or ''}"
        prefix = _find(folder, name, source[0], target[0])
        if prefix is None:
            break
        sides = [
            load_indexed_dataset(f"{prefix}.{language}", dictionary, dataset_impl)
            for language, dictionary in (source, target)
        ]
        if sides[1] is None and needs_target:
            raise FileNotFoundError(f"Dataset not found: {name}: there is no {prefix}.{target[0]}")
        parts.append((sides[0], sides[1]))
        if not combine:
            break
    if not parts:
        raise FileNotFoundError(_not_found(folder, split, source[0], target[0]))
    if len(parts) > 1 and upsample_primary > 1:
        parts = [parts[0]] * (upsample_primary - 1) + parts
    sources, targets = zip(*parts, strict=True)
    has_targets = all(each is not None for each in targets)
    logger.info(f"{folder} {split} {source[0]}-{target[0]} {sum(map(len, sources))} examples")
    return _joined(sources), _joined(targets) if has_targets else None


def _find(folder: str, name: str, source: str, target: str) -> str | None:
    """Returns what precedes the language in the names of a split's files, None if none is there."""
    for pair in (f"{source}-{target}", f"{target}-{source}"):
        prefix = str(Path(folder) / f"{name}.{pair}")
        if indexed_dataset.infer_dataset_impl(f"{prefix}.{source}") is not None:
            return prefix
    return None


def _joined(datasets: tuple[Any, ...]) -> Any:
    return datasets[0] if len(datasets) == 1 else ConcatDataset(datasets)


def _not_found(folder: str, split: str, source: str, target: str) -> str:
    message = f"Dataset not found: {split} ({folder}, {source}-{target})"
    if not Path(folder).is_dir():
        return f"{message}; there is no folder {folder}"
    pairs = {tuple(path.name.split(".")[:2]) for path in Path(folder).glob("*.*-*.*")}
    there = sorted(" ".join(pair) for pair in pairs if len(pair) == 2)
    return f"{message}; this folder has {', '.join(there) or 'no pairs'}"
