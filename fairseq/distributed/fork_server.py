"""The server that forks processes after importing what they need.

A ctrl-C on a terminal reaches every process of a command. It is the parent's to react to it: the
server, which is busy with imports for its first seconds, takes no notice.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker

__all__ = ["let_interrupt_in", "start_server"]


def start_server(preloaded: Sequence[str]) -> None:
    """Starts the server, unless it runs, and returns while it still imports modules.

    SIGINT stays blocked in it and in what it forks (see `let_interrupt_in`); one that comes here
    meanwhile is handled at the end.
    """
    multiprocessing.set_forkserver_preload(list(preloaded))
    resource_tracker.ensure_running()  # now, since its start lets SIGINT in
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_interrupt_in() -> None:
    """Lets SIGINT in again, in a process that the server has forked."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
