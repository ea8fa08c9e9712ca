"""Processes that hold the parts of a model, for a script that is a single process.

The script's process sends each call to all workers and waits for all of them; rank 0's result is
the result. Tensors travel through shared memory, so a model's weights lie there once, however many
workers take their parts of it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from fairseq.utils import local_part

__all__ = ["WorkerPool", "WorkerSettings", "free_port", "memory_of"]

_SECONDS_FOR_THE_OTHERS = 20.0


@dataclass(frozen=True)
class WorkerSettings:
    """How workers find each other and what they do to the model first.

    Attributes:
        world_size: number of workers.
        backend: of torch.distributed.
        address: host at which they meet.
        port: likewise.
        policy: how the model is cut; None looks one up.
        seed: of the random numbers of all workers.
        num_threads: of torch, for each worker.
    """

    world_size: int
    backend: str
    address: str
    port: int
    policy: Any
    seed: int
    num_threads: int


class WorkerPool:
    """Starts workers, forwards calls to them, and ends them.

    Args:
        model: copied into shared memory; each worker takes its part.
        settings: of the workers.
        start_method: forkserver, spawn or fork.
        daemon: whether workers end with this process even if it is killed.

    Raises:
        RuntimeError: a worker failed while it started.
    """

    def __init__(
        self, model: nn.Module, settings: WorkerSettings, *, start_method: str, daemon: bool
    ) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._pipes: list[Any] = []
        self._processes: list[Any] = []
        context: Any = mp.get_context(start_method)
        if start_method == "forkserver":
            multiprocessing.set_forkserver_preload([__name__, type(model).__module__])
        for rank in range(settings.world_size):
            ours, theirs = context.Pipe()
            forked = ours if start_method == "fork" else None
            arguments = (rank, settings, theirs, forked)
            process = context.Process(target=_work, args=arguments, daemon=daemon)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self.call("start", model)

    @property
    def is_running(self) -> bool:
        """Whether the workers answer calls."""
        return bool(self._processes)

    def call(self, method: str, *args: Any, everyone: bool = False, **kwargs: Any) -> Any:
        """Runs a method on all workers; one call at a time, whichever threads make them.

        Args:
            method: `start`, `stop`, or a method of `_Worker`.
            *args: sent to all workers.
            everyone: return all results, by rank, instead of the first.
            **kwargs: sent to all workers.

        Raises:
            RuntimeError: a worker failed, with its error, or ended.
        """
        with self._lock:
            if not self._processes:
                raise RuntimeError("the workers have ended; call parallelize again")
            try:
                for pipe in self._pipes:
                    pipe.send((method, args, kwargs, everyone))
                replies = self._replies()
            except BaseException:
                self._kill()
                raise
            failed = {rank: text for rank, (ok, text) in replies.items() if not ok}
            if failed:
                rank, text = next(iter(failed.items()))
                if len(failed) < len(self._pipes):  # the others are somewhere in the same call
                    self._kill()
                raise RuntimeError(f"worker {rank}: {text}")
            results = [replies[rank][1] for rank in range(len(self._pipes))]
            return results if everyone else results[0]

    def _replies(self) -> dict[int, tuple[bool, Any]]:
        """Returns (success, result or error) by rank; after an error, of those that answer."""
        replies: dict[int, tuple[bool, Any]] = {}
        ranks = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        ends = {process.sentinel: rank for rank, process in enumerate(self._processes)}
        while len(replies) < len(self._pipes):
            open_pipes = [pipe for pipe, rank in ranks.items() if rank not in replies]
            has_failed = any(not ok for ok, _ in replies.values())
            patience = _SECONDS_FOR_THE_OTHERS if has_failed else None
            ready: list[Any] = wait([*open_pipes, *ends], patience)
            if not ready:
                break
            for pipe in set(ready) & set(open_pipes):
                with contextlib.suppress(EOFError, ConnectionResetError):
                    replies[ranks[pipe]] = pipe.recv()
            for sentinel in set(ready) & set(ends):
                rank = ends.pop(sentinel)
                if rank not in replies:
                    replies[rank] = (False, self._how_it_ended(rank))
                    return {rank: replies[rank]}
        return dict(sorted(replies.items()))

    def _how_it_ended(self, rank: int) -> str:
        process = self._processes[rank]
        process.join()
        code = process.exitcode or 0
        if code < 0:
            return f"it was ended by {signal.Signals(-code).name}; was there enough memory?"
        return f"it ended with exit status {code}"

    def stop(self) -> None:
        """Ends the workers; does nothing if they have ended."""
        with contextlib.suppress(RuntimeError, OSError):
            if self._processes:
                self.call("stop")
        with self._lock:
            self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.join(0.5)
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def free_port() -> int:
    """Returns a port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def _work(rank: int, settings: WorkerSettings, pipe: Any, parents: Any) -> None:
    """Answers calls until it is told to stop."""
    if parents is not None:
        parents.close()
    torch.set_num_threads(settings.num_threads)
    worker = _Worker(rank, settings)
    while True:
        try:
            method, args, kwargs, everyone = pipe.recv()
        except (EOFError, ConnectionResetError, KeyboardInterrupt):
            break  # the script has ended
        try:
            reply = (True, _to_send(getattr(worker, method)(*args, **kwargs)))
            if rank > 0 and not everyone:
                reply = (True, None)
        except Exception:
            reply = (False, traceback.format_exc())
        pipe.send(reply)
        if method == "stop":
            break
    sys.stdout.flush()
    # Without finalizing the interpreter: a thread of gloo may still let go of a tensor.
    os._exit(0)


def _to_send(result: Any) -> Any:
    """Returns a result on the CPU, without the caches that belong to this worker's heads."""
    if isinstance(result, torch.Tensor):
        return result.detach().cpu()
    if isinstance(result, dict):
        values = {k: None if k == "past_key_values" else _to_send(v) for k, v in result.items()}
        return type(result)(**values) if type(result) is not dict else values
    if isinstance(result, (list, tuple)) and type(result) in (list, tuple):
        return type(result)(_to_send(each) for each in result)
    return result


class _Worker:
    """One part of the model and what can be asked of it."""

    def __init__(self, rank: int, settings: WorkerSettings) -> None:
        self.rank = rank
        self.settings = settings
        self.model: Any = None

    def start(self, model: nn.Module) -> None:
        """Joins the others, and takes its part of the model."""
        from fairseq.model_parallel.tensor_parallel import apply_tensor_parallel

        on_cuda = self.settings.backend == "nccl"
        device = torch.device("cuda", self.rank) if on_cuda else torch.device("cpu")
        if on_cuda:
            torch.cuda.set_device(device)
        address = f"tcp://{self.settings.address}:{self.settings.port}"
        world_size = self.settings.world_size
        dist.init_process_group(
            self.settings.backend, init_method=address, rank=self.rank, world_size=world_size
        )
        mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("tp",))
        torch.manual_seed(self.settings.seed)
        self.model = model.to(device)
        apply_tensor_parallel(self.model, mesh, self.settings.policy)
        # What is not cut lies in memory that all workers share still: that of the whole model.
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            if tensor.is_shared():
                tensor.data = tensor.data.clone()

    def invoke(self, name: str, args: Any, kwargs: Any) -> Any:
        """Calls the model, or a method of it, without gradients."""
        function = self.model if name == "forward" else getattr(self.model, name)
        with torch.no_grad():
            return function(*args, **kwargs)

    def whole_state(self) -> dict[str, torch.Tensor]:
        """Returns the whole state dict on rank 0."""
        from fairseq.model_parallel.tensor_parallel import whole_state_dict

        return whole_state_dict(self.model, keep=self.rank == 0)

    def memory(self) -> dict[str, dict[str, int]]:
        """Returns bytes of this worker, see `memory_of`."""
        return memory_of(self.model, self.rank)

    def stop(self) -> None:
        """Leaves the others."""
        dist.destroy_process_group()


def memory_of(model: nn.Module, rank: int) -> dict[str, dict[str, int]]:
    """Returns bytes that a part of a model takes, by the name of its device.

    Args:
        model: with parameters that may be cut.
        rank: of this process.

    Returns:
        {device: {"allocated": bytes of the weights, on a GPU of all tensors, "reserved": bytes that
        CUDA has reserved, on a CPU those of this process that are in memory}}.
    """
    if next(model.parameters()).device.type == "cuda":
        figures = {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
        }
        return {f"cuda:{rank}": figures}
    parts = [local_part(tensor) for tensor in [*model.parameters(), *model.buffers()]]
    allocated = sum(part.numel() * part.element_size() for part in parts)
    return {f"cpu:{rank}": {"allocated": allocated, "reserved": _resident_bytes()}}


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
