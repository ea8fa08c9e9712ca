"""Which names a checkpoint is written under, and which older ones go."""

from __future__ import annotations

import re
from pathlib import Path

from fairseq.dataclass.configs import CheckpointConfig

__all__ = ["checkpoint_names", "checkpoint_paths", "outdated_checkpoints"]


def checkpoint_names(
    cfg: CheckpointConfig,
    *,
    epoch: int,
    updates: int,
    end_of_epoch: bool,
    val_loss: float | None,
    best: float | None,
    suffix: str = "",
) -> list[str]:
    """Returns the file names for one save; the first is written, the others are the same file.

    Args:
        cfg: what is to be kept.
        epoch: number of the epoch, from 1.
        updates: updates so far.
        end_of_epoch: whether all of the epoch's batches are done.
        val_loss: figure of the validation just before, None if there was none.
        best: best such figure so far, this one included.
        suffix: `--checkpoint-suffix`.
    """
    interval = cfg.save_interval_updates
    is_best = val_loss is not None and (best is None or _is_as_good(cfg, val_loss, best))
    conditions = {
        f"checkpoint{epoch}{suffix}.pt": (
            end_of_epoch and not cfg.no_epoch_checkpoints and epoch % cfg.save_interval == 0
        ),
        f"checkpoint_{epoch}_{updates}{suffix}.pt": (
            not end_of_epoch and interval > 0 and updates % interval == 0
        ),
        f"checkpoint_best{suffix}.pt": is_best,
        f"checkpoint.best_{cfg.best_checkpoint_metric}_{val_loss or 0.0:.2f}.pt": (
            is_best and cfg.keep_best_checkpoints > 0
        ),
        f"checkpoint_last{suffix}.pt": not cfg.no_last_checkpoints,
    }
    return [name for name, holds in conditions.items() if holds]


def _is_as_good(cfg: CheckpointConfig, value: float, best: float) -> bool:
    return value >= best if cfg.maximize_best_checkpoint_metric else value <= best


def checkpoint_paths(
    path: str | Path, pattern: str = r"checkpoint(\d+)\.pt", keep_match: bool = False
) -> list[str] | list[tuple[str, float]]:
    """Returns the files in a folder whose names match, sorted by the pattern's number, falling.

    Args:
        path: the folder.
        pattern: regular expression of the whole name; its first group is the number.
        keep_match: return pairs (path, number).
    """
    compiled = re.compile(pattern)
    found: list[tuple[float, str]] = []
    for position, name in enumerate(sorted(entry.name for entry in Path(path).iterdir())):
        match = compiled.fullmatch(name)
        if match is not None:
            number = float(match.group(1)) if match.groups() else float(position)
            found.append((number, str(Path(path) / name)))
    found.sort(reverse=True)
    if keep_match:
        return [(file, number) for number, file in found]
    return [file for _, file in found]


def outdated_checkpoints(
    cfg: CheckpointConfig, *, end_of_epoch: bool, suffix: str = ""
) -> list[str]:
    """Returns the files in the save folder that no keep rule covers any more.

    Checkpoints by update are only looked at after a save in the middle of an epoch.
    """
    ending = re.escape(suffix) + r"\.pt"
    outdated: list[str] = []
    if not end_of_epoch and cfg.keep_interval_updates > 0:
        every = cfg.keep_interval_updates_pattern
        by_update = _numbered(cfg, rf"checkpoint_\d+_(\d+){ending}")
        surplus = by_update[cfg.keep_interval_updates :]
        outdated += [file for file, updates in surplus if every <= 0 or updates % every]
    if cfg.keep_last_epochs > 0:
        by_epoch = _numbered(cfg, rf"checkpoint(\d+){ending}")
        outdated += [file for file, _ in by_epoch[cfg.keep_last_epochs :]]
    if cfg.keep_best_checkpoints > 0:
        metric = re.escape(cfg.best_checkpoint_metric)
        by_score = _numbered(cfg, rf"checkpoint\.best_{metric}_(-?\d+\.?\d*)\.pt")
        if not cfg.maximize_best_checkpoint_metric:
            by_score = by_score[::-1]
        outdated += [file for file, _ in by_score[cfg.keep_best_checkpoints :]]
    return outdated


def _numbered(cfg: CheckpointConfig, pattern: str) -> list[tuple[str, float]]:
    return checkpoint_paths(cfg.save_dir, pattern, keep_match=True)  # type: ignore[return-value]
