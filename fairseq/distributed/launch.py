"""How the processes of a run come to be and find each other.

In this order: `--distributed-init-method`; the variables that torchrun sets; Slurm, with
`--distributed-port`; else one process for each of `--distributed-world-size` devices of this
machine, started here.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from fairseq.distributed.fork_server import let_interrupt_in, start_server
from fairseq.distributed.groups import is_initialized, is_master
from fairseq.distributed.signals import OrderlyStop
from fairseq.distributed.workers import WorkerFailure, watch
from fairseq.utils import end_with_parent, import_user_module

__all__ = ["call_main", "distributed_init", "infer_init_method"]

logger = logging.getLogger(__name__)

_TORCHRUN_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")


def infer_init_method(cfg_distributed: Any, force_distributed: bool = False) -> None:
    """Decides where the processes meet, and fills rank and world size where that says them.

    Args:
        cfg_distributed: changed in place; `distributed_init_method` stays None for a process on
            its own.
        force_distributed: make a group even for one process.

    Raises:
        ValueError: the Slurm variables do not fit each other, or several processes that somebody
            else starts are not told where to meet.
    """
    cfg = cfg_distributed
    if cfg.distributed_init_method is not None:
        return
    if all(name in os.environ for name in _TORCHRUN_VARIABLES):
        _from_torchrun(cfg)
    elif cfg.distributed_port > 0 and _slurm_nodes() is not None:
        _from_slurm(cfg)
    elif cfg.distributed_world_size > 1 and cfg.distributed_no_spawn:
        raise ValueError(
            f"--distributed-no-spawn: the {cfg.distributed_world_size} processes cannot find each "
            "other; give --distributed-init-method tcp://host:port and --distributed-rank to each, "
            "or start them with torchrun"
        )
    elif cfg.distributed_world_size > 1 or force_distributed:
        cfg.distributed_init_method = f"tcp://localhost:{_free_port()}"


def _from_torchrun(cfg: Any) -> None:
    cfg.distributed_init_method = "env://"
    cfg.distributed_world_size = int(os.environ["WORLD_SIZE"])
    cfg.distributed_rank = int(os.environ["RANK"])
    cfg.distributed_no_spawn = True
    if cfg.device_id == 0:
        cfg.device_id = int(os.environ.get("LOCAL_RANK", 0))


def _slurm_nodes() -> str | None:
    return os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")


def _from_slurm(cfg: Any) -> None:
    """Takes ranks from Slurm: a task for each device, or a task for each machine that spawns."""
    hosts = subprocess.check_output(["scontrol", "show", "hostnames", str(_slurm_nodes())])
    first_host = hosts.decode().split()[0]
    cfg.distributed_init_method = f"tcp://{first_host}:{cfg.distributed_port}"
    num_nodes = int(os.environ["SLURM_NNODES"])
    tasks = int(os.environ.get("SLURM_NTASKS", num_nodes))
    tasks_per_node = int(os.environ.get("SLURM_NTASKS_PER_NODE", tasks // num_nodes))
    if tasks_per_node == 1:
        if cfg.distributed_world_size % num_nodes:
            raise ValueError(
                f"--distributed-world-size {cfg.distributed_world_size} cannot be shared evenly "
                f"by {num_nodes} Slurm nodes with one task each"
            )
        node = int(os.environ["SLURM_NODEID"])
        cfg.distributed_rank = node * (cfg.distributed_world_size // num_nodes)
        return
    if cfg.distributed_world_size != tasks:
        raise ValueError(
            f"Slurm runs {tasks} tasks ({tasks_per_node} on each of {num_nodes} nodes), so "
            f"--distributed-world-size must be {tasks}, not {cfg.distributed_world_size}"
        )
    cfg.distributed_no_spawn = True
    cfg.distributed_rank = int(os.environ["SLURM_PROCID"])
    cfg.device_id = int(os.environ["SLURM_LOCALID"])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def _uses_cuda(cfg: Any) -> bool:
    return torch.cuda.is_available() and not cfg.common.cpu


def call_main(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> Any:
    """Runs `main(cfg, **kwargs)` in as many processes as the configuration asks for.

    Args:
        cfg: whole configuration; its section `distributed_training` is filled in.
        main: importable function (other processes import it by its name).
        **kwargs: handed on to `main`; must be picklable where processes are started.

    Returns:
        What `main` returns in this process, None where processes were started.

    Raises:
        ValueError: more processes are asked for than this machine has GPUs.
        RuntimeError: a started process failed or was killed; the message is that process's.
        KeyboardInterrupt: SIGINT ended the run.
        SystemExit: SIGTERM ended the run.
    """
    distributed = cfg.distributed_training
    infer_init_method(distributed)
    if distributed.distributed_init_method is None:
        return main(cfg, **kwargs)
    if distributed.distributed_no_spawn:
        return _distributed_main(cfg, main, kwargs)
    return _spawn(cfg, main, kwargs, _num_processes(cfg))


def _num_processes(cfg: Any) -> int:
    """Returns how many processes to start on this machine."""
    distributed = cfg.distributed_training
    world_size = int(distributed.distributed_world_size)
    if distributed.distributed_num_procs > 0:
        return min(int(distributed.distributed_num_procs), world_size)
    is_local = distributed.distributed_init_method.startswith("tcp://localhost:")
    if not _uses_cuda(cfg):
        return world_size if is_local else min(int(distributed.nprocs_per_node), world_size)
    devices = torch.cuda.device_count()
    if is_local and world_size > devices:
        raise ValueError(
            f"--distributed-world-size is {world_size}, but this machine has {devices} visible "
            "GPUs; lower it, add --cpu, or start the processes with torchrun"
        )
    return min(devices, world_size)


def _spawn(cfg: Any, main: Callable[..., Any], kwargs: dict[str, Any], num: int) -> None:
    method = _way_to_start(main)
    errors = multiprocessing.get_context(method).SimpleQueue()
    # Plug-ins must be imported before the objects that refer to their classes are unpickled.
    payload = pickle.dumps((cfg, main, kwargs))
    surroundings = (cfg.common.user_dir, multiprocessing.get_start_method(), _log_style())
    context = start_processes(
        _worker,
        (*surroundings, payload, errors),
        nprocs=num,
        join=False,
        start_method=method,
    )
    try:
        watch(context.processes)
    except WorkerFailure as failure:
        raise RuntimeError(_reason(failure, errors)) from None


def _way_to_start(main: Callable[..., Any]) -> str:
    """Returns how to start processes that may use a GPU: forking this one would not do.

    A server that has imported what `main` needs is forked, which saves each process the import.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    start_server([main.__module__])
    return "forkserver"


def _reason(failure: WorkerFailure, errors: Any) -> str:
    """Returns what the first of the started processes failed with."""
    if failure.exit_code < 0:
        # It comes before the others' complaints that it does not answer.
        number = -failure.exit_code
        hint = "; was there enough memory?" if number == signal.SIGKILL else ""
        return f"worker {failure.rank} was ended by {signal.Signals(number).name}{hint}"
    return str(failure) if errors.empty() else str(errors.get())


def _log_style() -> dict[str, Any]:
    """Returns how this process logs, for the processes it starts."""
    root = logging.getLogger()
    formatter = root.handlers[0].formatter if root.handlers else None
    if formatter is None:
        return {}
    return {"format": formatter._fmt, "datefmt": formatter.datefmt, "level": root.level}


def _worker(
    local_rank: int,
    user_dir: str | None,
    start_method: str,
    log_style: dict[str, Any],
    payload: bytes,
    errors: Any,
) -> None:
    end_with_parent()
    # Else its data loaders would be started the same way, which takes seconds in each epoch.
    multiprocessing.set_start_method(start_method, force=True)
    if log_style:
        logging.basicConfig(stream=sys.stdout, **log_style)
    rank = local_rank
    try:
        let_interrupt_in()
        import_user_module(Namespace(user_dir=user_dir))
        cfg, main, kwargs = pickle.loads(payload)
        distributed = cfg.distributed_training
        distributed.device_id = local_rank
        distributed.distributed_rank += local_rank
        rank = distributed.distributed_rank
        _distributed_main(cfg, main, kwargs)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        errors.put(f"worker {rank}: {_describe(error)}")
        raise SystemExit(1) from None


def _describe(error: Exception) -> str:
    """Returns an error's message; with its traceback, unless it was raised for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, OSError) or (frames and (frames[-1].line or "").startswith("raise ")):
        return f"{error}"
    return "".join(traceback.format_exception(error))


def _distributed_main(cfg: Any, main: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    distributed_init(cfg)
    stopped: OrderlyStop | None = None
    try:
        result = main(cfg, **kwargs)
    except OrderlyStop as stop:
        # Without its traceback, which holds on to the model.
        result, stopped = None, stop.with_traceback(None)
    # What holds on to the group goes first, or it is destroyed while a thread of it still runs.
    gc.collect()
    # Not after a failure: with NCCL this would wait for the other processes.
    dist.destroy_process_group()
    if stopped is not None:
        raise stopped
    return result


def distributed_init(cfg: Any) -> int:
    """Joins the group of all processes; returns this process's rank.

    A rank other than 0 logs warnings and errors only.

    Raises:
        ValueError: there is no GPU of the number that this process was given.
        RuntimeError: the processes do not find each other.
    """
    distributed = cfg.distributed_training
    on_cuda = _uses_cuda(cfg)
    if on_cuda:
        _choose_device(distributed.device_id)
    if not is_initialized():
        logger.info(
            f"distributed init (rank {distributed.distributed_rank}): "
            f"{distributed.distributed_init_method}"
        )
        backend = _backend(distributed, on_cuda)
        uses_nccl = backend == "nccl"
        try:
            dist.init_process_group(
                backend=backend,
                init_method=distributed.distributed_init_method,
                world_size=distributed.distributed_world_size,
                rank=distributed.distributed_rank,
                device_id=torch.device("cuda", distributed.device_id) if uses_nccl else None,
            )
        except (ValueError, RuntimeError) as error:
            raise RuntimeError(
                f"the processes cannot meet at {distributed.distributed_init_method} "
                f"(--distributed-init-method, --distributed-rank {distributed.distributed_rank} of "
                f"--distributed-world-size {distributed.distributed_world_size}, "
                f"--distributed-backend {backend}): {' '.join(str(error).split())}"
            ) from error
        logger.info(
            f"initialized host {socket.gethostname()} as rank {distributed.distributed_rank}"
        )
    distributed.distributed_rank = dist.get_rank()
    if not is_master(distributed):
        logging.getLogger().setLevel(logging.WARNING)
    return int(distributed.distributed_rank)


def _choose_device(device_id: int) -> None:
    if device_id >= torch.cuda.device_count():
        raise ValueError(
            f"this process is to use GPU {device_id}, but {torch.cuda.device_count()} are visible "
            "(--device-id, --local_rank or LOCAL_RANK, counted from 0)"
        )
    torch.cuda.set_device(device_id)


def _backend(distributed: Any, on_cuda: bool) -> str:
    backend = str(distributed.distributed_backend)
    if backend == "nccl" and not on_cuda:
        if is_master(distributed):
            logger.info("without CUDA the processes talk over gloo instead of nccl")
        return "gloo"
    return backend
