"""Starting processes once for many cases, and handing their findings to the tests.

A case is a function `(mesh or world size) -> findings` in a module that the processes import. Every
process runs all cases in the same order; each one's findings go to a file.
"""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = datetime.timedelta(seconds=60)


def launch(world_size: int, cases: dict[str, Callable[[], Any]], folder: Path) -> None:
    """Runs the cases in `world_size` processes that talk over gloo.

    Args:
        world_size: number of processes.
        cases: picklable functions by name.
        folder: for the findings, `<name>.<rank>.pt`.
    """
    # One that earlier processes left would be taken for that of these.
    (folder / f"store.{world_size}").unlink(missing_ok=True)
    arguments = (world_size, cases, str(folder))
    mp.start_processes(_work, arguments, nprocs=world_size, start_method="forkserver")


def _work(rank: int, world_size: int, cases: dict[str, Any], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store.{world_size}"
    dist.init_process_group("gloo", store, TIMEOUT, rank=rank, world_size=world_size)
    for name, case in cases.items():
        try:
            found = case()
        except BaseException:  # errors of torch's checkpoints are no Exception
            found = {"error": traceback.format_exc()}
        torch.save(found, Path(folder) / f"{name}.{world_size}.{rank}.pt")
    dist.barrier()
    # Without finalizing the interpreter: a thread of gloo may still let go of a tensor.
    os._exit(0)


def findings(folder: Path, name: str, world_size: int) -> list[dict[str, Any]]:
    """Returns what each process found in a case; fails with the error of one that failed."""
    files = [folder / f"{name}.{world_size}.{rank}.pt" for rank in range(world_size)]
    found = [torch.load(file, weights_only=False) for file in files]
    errors = [each["error"] for each in found if "error" in each]
    assert not errors, errors[0]
    return found
