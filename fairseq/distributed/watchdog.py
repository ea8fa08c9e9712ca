"""Ending a process that makes no progress (`--heartbeat-timeout`)."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading

__all__ = ["Heartbeat"]

logger = logging.getLogger(__name__)


class Heartbeat:
    """A thread that ends this process with exit 1 when `beat` is not called for too long.

    A worker that waits for another one in a collective operation does not return to Python, so
    nothing but ending it helps; the stacks of its threads go to stderr first.

    Args:
        timeout_s: seconds without a beat; the clock starts with the first beat.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._beat = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self) -> None:
        """Tells that there is progress."""
        self._beat.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        self._beat.set()

    def _watch(self) -> None:
        while not self._closed.is_set():
            if not self._beat.wait(self.timeout_s):
                self._end_process()
            self._beat.clear()

    def _end_process(self) -> None:
        logger.error(
            f"no progress for {self.timeout_s:g} seconds (--heartbeat-timeout): ending this process"
        )
        faulthandler.dump_traceback(file=sys.stderr)
        logging.shutdown()
        os._exit(1)
