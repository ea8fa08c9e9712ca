"""SIGINT and SIGTERM in training: the first asks for an orderly end, a second one ends at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from fairseq.distributed.signals import STOP_SIGNALS, OrderlyStop, StopSignal

__all__ = ["StopRequest", "stop_on_signal"]

_active: StopRequest | None = None


class StopRequest:
    """Whether a signal has asked this process to end after the update it is at.

    Args:
        is_alone: whether this is the only process that trains. Several agree on the update
            (`Trainer.must_stop`) and leave together.
        is_master: whether this process speaks for all.
    """

    def __init__(self, *, is_alone: bool, is_master: bool = True) -> None:
        self.is_alone = is_alone
        self.is_master = is_master
        self.has_left = False
        self._signal = StopSignal()

    def __bool__(self) -> bool:
        return self._signal.number is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Takes note of the first signal; ends the process by the second."""
        if self.has_left:
            # A launcher ends the others when it sees the first one gone; all is saved.
            os._exit(128 + number)
        is_first = not self
        if self._signal.is_repeated(number):
            self._raise(number)
        if is_first and self.is_master:
            name = signal.Signals(number).name
            # Not by the log, which may be in the middle of a line.
            text = f"{name}: saving after this update, then ending; again to end at once\n"
            with contextlib.suppress(OSError):
                os.write(2, text.encode())

    def leave(self) -> None:
        """Ends the process as a signal does that nobody handles, but with everything cleaned up.

        Raises:
            KeyboardInterrupt: after SIGINT, in a process on its own.
            SystemExit: after SIGTERM, with 143; one of several processes: with 143 or 130, by the
                signal that it got itself.
        """
        number = self._signal.number or signal.SIGTERM
        if self.is_alone:
            self._raise(number)
        self.has_left = True
        if self.is_master and multiprocessing.parent_process() is None:
            print("interrupted" if number == signal.SIGINT else "terminated", file=sys.stderr)
        raise OrderlyStop(number)

    @staticmethod
    def _raise(number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        print("terminated", file=sys.stderr)
        raise SystemExit(128 + number)


@contextlib.contextmanager
def stop_on_signal(*, is_alone: bool, is_master: bool = True) -> Iterator[StopRequest]:
    """Makes the signals requests for the time of the context; see `StopRequest`."""
    global _active
    request = StopRequest(is_alone=is_alone, is_master=is_master)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.handle) for number in STOP_SIGNALS}
    _active = request
    try:
        yield request
    finally:
        _active = None
        if not request.has_left:
            for number, handler in before.items():
                signal.signal(number, handler)


def _obey_the_parent_alone() -> None:
    """Lets a forked loader of data go on when a signal reaches a whole group of processes.

    Without it the update could not be finished. It ends when the process that it works for says so
    or is gone (torch looks). torch sets a handler of its own later, so SIGTERM is blocked instead.
    """
    if _active is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, name="terminate", daemon=True).start()


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_obey_the_parent_alone)
