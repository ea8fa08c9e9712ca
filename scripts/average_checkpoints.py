#!/usr/bin/env python3
"""Averages the parameters of several checkpoints of one run into one checkpoint."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fairseq.checkpoint.reading import read_checkpoint
from fairseq.checkpoint.retention import checkpoint_paths
from fairseq.checkpoint.writing import save_atomically

_HALF = (torch.float16, torch.bfloat16)


def average_checkpoints(inputs: Sequence[str]) -> dict[str, Any]:
    """Averages parameters; everything else is the first checkpoint's.

    Half precision becomes float32; whole numbers are divided without rest.

    Args:
        inputs: files, at least one.

    Returns:
        A checkpoint's dictionary.

    Raises:
        KeyError: two checkpoints do not have the same parameters in the same order.
    """
    first: dict[str, Any] = {}
    sums: dict[str, torch.Tensor] = {}
    for path in inputs:
        state = read_checkpoint(path, memory_map=True)
        model = state["model"]
        if not first:
            first = state
        elif list(model) != list(sums):
            different = sorted(set(model) ^ set(sums)) or "their order"
            raise KeyError(f"{path} has other parameters than {inputs[0]}: {different}")
        for name, tensor in model.items():
            tensor = tensor.float() if tensor.dtype in _HALF else tensor
            if name in sums:
                sums[name] += tensor
            else:
                sums[name] = tensor.clone()
    averages = {name: _divided(total, len(inputs)) for name, total in sums.items()}
    averaged = {**first, "model": averages}
    if "alibi" in first:
        # The first checkpoint's float32 masters would bring its own parameters back.
        averaged["alibi"] = {k: v for k, v in first["alibi"].items() if k != "fp32_masters"}
    return averaged


def _divided(total: torch.Tensor, count: int) -> torch.Tensor:
    if total.is_floating_point():
        return total / count
    return torch.div(total, count, rounding_mode="floor")


def newest_checkpoints(
    folder: str, count: int, *, by_update: bool, upper_bound: int | None = None
) -> list[str]:
    """Returns the newest checkpoints in a folder, by epoch or by update, newest first.

    Args:
        folder: the folder.
        count: how many.
        by_update: take `checkpoint_<epoch>_<update>.pt`, else `checkpoint<epoch>.pt`.
        upper_bound: the newest epoch or update that counts.

    Raises:
        ValueError: there are fewer.
    """
    pattern = r"checkpoint_\d+_(\d+)\.pt" if by_update else r"checkpoint(\d+)\.pt"
    found = [str(path) for path in checkpoint_paths(folder, pattern)]
    if upper_bound is not None:
        found = [p for p in found if _number_in(p, pattern) <= upper_bound]
    if len(found) < count:
        raise ValueError(f"Found {len(found)} checkpoint files but need at least {count}")
    return found[:count]


def _number_in(path: str, pattern: str) -> int:
    match = re.fullmatch(pattern, os.path.basename(path))
    assert match is not None
    return int(match.group(1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the script with command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--inputs", nargs="+", required=True, help="checkpoints, or the folder they lie in"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the checkpoint to write")
    newest = parser.add_mutually_exclusive_group()
    newest.add_argument(
        "--num-epoch-checkpoints", type=int, metavar="N", help="average the newest N by epoch"
    )
    newest.add_argument(
        "--num-update-checkpoints", type=int, metavar="N", help="average the newest N by update"
    )
    parser.add_argument(
        "--checkpoint-upper-bound", type=int, metavar="K", help="newest epoch or update that counts"
    )
    args = parser.parse_args(arguments)
    count = args.num_epoch_checkpoints or args.num_update_checkpoints
    if count is None and args.checkpoint_upper_bound is not None:
        parser.error(
            "--checkpoint-upper-bound needs --num-epoch-checkpoints or --num-update-checkpoints"
        )
    print(args)
    inputs = args.inputs
    if count is not None:
        if len(inputs) != 1 or not Path(inputs[0]).is_dir():
            parser.error("with a number of checkpoints, --inputs is the one folder they lie in")
        inputs = newest_checkpoints(
            inputs[0],
            count,
            by_update=args.num_epoch_checkpoints is None,
            upper_bound=args.checkpoint_upper_bound,
        )
        print("averaging checkpoints: ", inputs)
    save_atomically(average_checkpoints(inputs), args.output)
    print(f"Finished writing averaged checkpoint to {args.output}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, KeyError, OSError) as error:
        sys.exit(f"average_checkpoints: error: {error}")
