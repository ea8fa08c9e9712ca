"""Names a checkpoint gets, and which files go."""

from __future__ import annotations

import os

import pytest

from fairseq.checkpoint.retention import (
    checkpoint_names,
    checkpoint_paths,
    outdated_checkpoints,
)
from fairseq.dataclass.configs import CheckpointConfig

END = {"epoch": 3, "updates": 60, "end_of_epoch": True}
MIDDLE = {"epoch": 3, "updates": 60, "end_of_epoch": False}


@pytest.mark.parametrize(
    ("settings", "when", "scores", "expected"),
    [
        ({}, END, (5.0, 5.0), "checkpoint3 checkpoint_best checkpoint_last"),
        ({}, END, (5.0, 4.9), "checkpoint3 checkpoint_last"),
        ({}, END, (None, 4.9), "checkpoint3 checkpoint_last"),
        ({"save_interval": 2}, END, (None, None), "checkpoint_last"),
        ({"no_epoch_checkpoints": True}, END, (5.0, 5.0), "checkpoint_best checkpoint_last"),
        ({"no_last_checkpoints": True}, END, (None, None), "checkpoint3"),
        ({}, MIDDLE, (5.0, 5.0), "checkpoint_best checkpoint_last"),
        ({"save_interval_updates": 20}, MIDDLE, (None, None), "checkpoint_3_60 checkpoint_last"),
        ({"save_interval_updates": 50}, MIDDLE, (None, None), "checkpoint_last"),
        ({"save_interval_updates": 20}, END, (None, None), "checkpoint3 checkpoint_last"),
        (
            {"keep_best_checkpoints": 2},
            END,
            (5.125, 5.125),
            "checkpoint3 checkpoint_best checkpoint.best_loss_5.12 checkpoint_last",
        ),
        ({"keep_best_checkpoints": 2}, END, (5.5, 5.1), "checkpoint3 checkpoint_last"),
        (
            {"maximize_best_checkpoint_metric": True, "best_checkpoint_metric": "acc"},
            END,
            (0.7, 0.7),
            "checkpoint3 checkpoint_best checkpoint_last",
        ),
        (
            {"maximize_best_checkpoint_metric": True},
            END,
            (0.6, 0.7),
            "checkpoint3 checkpoint_last",
        ),
    ],
)
def test_names(settings, when, scores, expected):
    val_loss, best = scores
    names = checkpoint_names(CheckpointConfig(**settings), **when, val_loss=val_loss, best=best)
    assert [name.removesuffix(".pt") for name in names] == expected.split()


def test_the_suffix_is_in_all_names_but_that_by_score():
    cfg = CheckpointConfig(keep_best_checkpoints=1)
    names = checkpoint_names(cfg, **END, val_loss=5.0, best=5.0, suffix="-x")
    assert names == [
        "checkpoint3-x.pt",
        "checkpoint_best-x.pt",
        "checkpoint.best_loss_5.00.pt",
        "checkpoint_last-x.pt",
    ]


def _touch(folder, *names):
    for name in names:
        (folder / f"{name}.pt").touch()


def _outdated(tmp_path, *, end_of_epoch=True, suffix="", **settings):
    cfg = CheckpointConfig(save_dir=str(tmp_path), **settings)
    files = outdated_checkpoints(cfg, end_of_epoch=end_of_epoch, suffix=suffix)
    return sorted(os.path.basename(file).removesuffix(".pt") for file in files)


EVERYTHING = (
    [f"checkpoint{epoch}" for epoch in (1, 2, 9, 10)]
    + [f"checkpoint_{epoch}_{updates}" for epoch, updates in ((1, 50), (1, 100), (2, 150))]
    + [f"checkpoint.best_loss_{value}" for value in ("4.90", "5.10", "11.00")]
    + ["checkpoint_best", "checkpoint_last", "checkpoint3-x", "other"]
)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"keep_last_epochs": 2}, ["checkpoint1", "checkpoint2"]),
        ({"keep_best_checkpoints": 2}, ["checkpoint.best_loss_11.00"]),
        (
            {"keep_best_checkpoints": 2, "maximize_best_checkpoint_metric": True},
            ["checkpoint.best_loss_4.90"],
        ),
        ({"keep_interval_updates": 1}, []),
        (
            {"keep_interval_updates": 1, "end_of_epoch": False},
            ["checkpoint_1_100", "checkpoint_1_50"],
        ),
        (
            {
                "keep_interval_updates": 1,
                "keep_interval_updates_pattern": 100,
                "end_of_epoch": False,
            },
            ["checkpoint_1_50"],
        ),
        ({"keep_last_epochs": 1, "suffix": "-x"}, []),
    ],
)
def test_what_goes(tmp_path, settings, expected):
    _touch(tmp_path, *EVERYTHING)
    assert _outdated(tmp_path, **settings) == expected


def test_paths_are_sorted_by_number_falling(tmp_path):
    _touch(tmp_path, *EVERYTHING)
    names = [os.path.basename(path) for path in checkpoint_paths(tmp_path)]
    assert names == ["checkpoint10.pt", "checkpoint9.pt", "checkpoint2.pt", "checkpoint1.pt"]
    pairs = checkpoint_paths(tmp_path, r"checkpoint_\d+_(\d+)\.pt", keep_match=True)
    assert [number for _, number in pairs] == [150, 100, 50]
