"""SIGINT and SIGTERM in training: the first asks for an orderly end, the second ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["StopRequest", "stop_on_signal"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_active: StopRequest | None = None


class StopRequest:
    """Whether a signal has asked the training to end after the update it is at."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Takes note of the first signal; ends the process by the second."""
        if self.number is not None:
            self.number = number
            self.leave()
        self.number = number
        name = signal.Signals(number).name
        # Not by the log, which may be in the middle of a line.
        text = f"{name}: saving after this update, then ending; again to end at once\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())

    def leave(self) -> None:
        """Ends the process as a signal does that nobody handles, but with everything cleaned up.

        Raises:
            KeyboardInterrupt: after SIGINT.
            SystemExit: after SIGTERM, with 143.
        """
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        print("terminated", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM)


@contextlib.contextmanager
def stop_on_signal(*, is_alone: bool) -> Iterator[StopRequest]:
    """Makes the signals requests for the time of the context.

    Args:
        is_alone: whether this is the only process that trains. Several would be asked at different
            updates, and wait for each other for ever; so signals end them at once.
    """
    global _active
    request = StopRequest()
    if not is_alone or threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.handle) for number in _SIGNALS}
    _active = request
    try:
        yield request
    finally:
        _active = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _forget_in_child() -> None:
    """Forked loaders of data end when they are told to, and not by a ctrl-C meant for us."""
    if _active is not None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
