"""Brings the dictionaries of older checkpoints to today's layout."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["upgrade_namespace", "upgrade_state"]


def upgrade_state(state: dict[str, Any]) -> dict[str, Any]:
    """Fills in and moves what older versions did not have or had elsewhere, in place.

    Returns:
        The same dictionary, with `optimizer_history`, `extra_state` and its `train_iterator`.
    """
    _collect_extra_state(state)
    _collect_optimizer_history(state)
    iterator = state["extra_state"].setdefault(
        "train_iterator",
        {
            "epoch": state["extra_state"].get("epoch", 1),
            "iterations_in_epoch": state["extra_state"].get("batch_offset", 0),
        },
    )
    if iterator is not None:
        iterator["epoch"] = max(iterator.get("epoch", 1), 1)
    if isinstance(state.get("args"), argparse.Namespace):
        upgrade_namespace(state["args"])
    _upgrade_config(state.get("cfg"))
    return state


def _collect_extra_state(state: dict[str, Any]) -> None:
    if state.get("extra_state") is None:
        moved = ("epoch", "batch_offset", "val_loss")
        state["extra_state"] = {key: state.pop(key) for key in moved if key in state}


def _collect_optimizer_history(state: dict[str, Any]) -> None:
    if not state.get("optimizer_history"):
        state["optimizer_history"] = [{"criterion_name": "CrossEntropyCriterion"}]
        if "best_loss" in state:
            state["optimizer_history"][-1]["best_loss"] = state.pop("best_loss")
        if "optimizer" in state:
            state["last_optimizer_state"] = state.pop("optimizer")
    last = state["optimizer_history"][-1]
    if "optimizer" in last:
        state["last_optimizer_state"] = last["optimizer"]
        for entry in state["optimizer_history"]:
            entry.pop("optimizer", None)
    last.setdefault("optimizer_name", "FairseqNAG")
    if "lr_scheduler_state" not in last:
        last["lr_scheduler_state"] = {"best": last.pop("best_loss", None)}
    last.setdefault("num_updates", 0)


def upgrade_namespace(args: argparse.Namespace) -> None:
    """Renames the options of older command lines, in place."""
    if hasattr(args, "max_positions") and not hasattr(args, "max_source_positions"):
        args.max_source_positions = args.max_target_positions = args.max_positions
    if not hasattr(args, "task"):
        args.task = "translation"
    if getattr(args, "raw_text", False):
        args.dataset_impl = "raw"
    elif getattr(args, "lazy_load", False):
        args.dataset_impl = "lazy"
    if getattr(args, "remove_bpe", None) is not None and not hasattr(args, "post_process"):
        args.post_process = args.remove_bpe
    # Until 2020 --min-lr was the rate at which training stops. A namespace that has both names is
    # newer, and there --min-lr is the floor of the cosine schedule and is kept.
    if hasattr(args, "min_lr") and not hasattr(args, "stop_min_lr"):
        args.stop_min_lr = args.min_lr
        del args.min_lr
    if isinstance(getattr(args, "lr", None), float):
        args.lr = [args.lr]
    if isinstance(getattr(args, "data", None), list) and args.data:
        args.data = args.data[0]


def _upgrade_config(cfg: Any) -> None:
    generation = cfg.get("generation") if isinstance(cfg, dict) else None
    if isinstance(generation, dict) and isinstance(generation.get("print_alignment"), bool):
        generation["print_alignment"] = "hard" if generation["print_alignment"] else None
