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
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import nn

from fairseq.model_parallel.worker import Worker, WorkerSettings
from fairseq.utils import apply_to_sample

__all__ = ["WorkerPool", "free_port"]

_SECONDS_FOR_THE_OTHERS = 20.0


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
            method: `start`, `stop`, or a method of `Worker`.
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
    worker = Worker(rank, settings)
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
    return apply_to_sample(lambda tensor: tensor.detach().cpu(), result)
