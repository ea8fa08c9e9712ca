"""Watching over the processes of a run: until all have ended, one has failed, or a signal comes."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from typing import Any

from fairseq.distributed.signals import STOP_SIGNALS, StopSignal

__all__ = ["WorkerFailure", "watch"]

_GRACE_S = 30.0


class WorkerFailure(Exception):
    """A worker ended with an error.

    Args:
        rank: among the processes that were watched.
        exit_code: negative is the signal that ended it.
    """

    def __init__(self, rank: int, exit_code: int) -> None:
        super().__init__(f"worker {rank} ended with exit code {exit_code}")
        self.rank = rank
        self.exit_code = exit_code


def watch(processes: Sequence[Any]) -> None:
    """Waits for started processes; none of them outlives this call.

    The first SIGINT or SIGTERM to this process is passed on as SIGTERM, so that they can end in
    order; a second one kills them.

    Raises:
        WorkerFailure: one of them failed, without having been asked to end.
        KeyboardInterrupt: SIGINT came here, or to one of them that ended by it.
        SystemExit: the same for SIGTERM, with 143.
    """
    with _passing_on(processes) as stop:
        try:
            failure = _first_failure(processes)
        finally:
            _end(processes)
    number = stop.number
    if number is None and failure is not None:
        number = _stop_signal_of(processes)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if number is not None:
        print("terminated", file=sys.stderr)
        raise SystemExit(128 + number)
    if failure is not None:
        raise failure


@contextlib.contextmanager
def _passing_on(processes: Sequence[Any]) -> Iterator[StopSignal]:
    """Passes signals on for the time of the context."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def pass_on(number: int, _frame: Any) -> None:
        is_first = stop.number is None
        is_repeated = stop.is_repeated(number)
        for process in processes:
            if is_repeated:
                process.kill()
            elif is_first:
                process.terminate()

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_failure(processes: Sequence[Any]) -> WorkerFailure | None:
    """Waits until all have ended or one has failed; returns its failure."""
    ranks = {process.sentinel: rank for rank, process in enumerate(processes)}
    while ranks:
        for sentinel in connection.wait(list(ranks)):
            rank = ranks.pop(sentinel)
            processes[rank].join()
            if processes[rank].exitcode:
                return _cause(processes, rank)
    return None


def _cause(processes: Sequence[Any], rank: int) -> WorkerFailure:
    """Returns the failure that others may have followed: a killed one comes before complaints."""
    codes = {i: process.exitcode for i, process in enumerate(processes) if process.exitcode}
    killed = [i for i, code in codes.items() if code < 0]
    rank = killed[0] if killed else rank
    return WorkerFailure(rank, codes[rank])


def _stop_signal_of(processes: Sequence[Any]) -> int | None:
    """Returns the signal by which all ended in order, None if they did not."""
    codes = {process.exitcode for process in processes}
    numbers = [number for number in STOP_SIGNALS if 128 + number in codes]
    return numbers[0] if codes <= {128 + number for number in STOP_SIGNALS} else None


def _end(processes: Sequence[Any]) -> None:
    """Ends what is left; what does not answer, as one that waits for a dead one, is killed."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    for process in processes:
        process.join(_GRACE_S)
        process.kill()
        process.join()
