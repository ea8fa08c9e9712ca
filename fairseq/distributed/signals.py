"""Signals that ask a run to end, which may reach its processes all at once and more than once."""

from __future__ import annotations

import signal
import time

__all__ = ["STOP_SIGNALS", "OrderlyStop", "StopSignal"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# timeout and scancel signal a process and its group, launchers pass on what others send too.
_ONE_REQUEST_S = 1.0


class StopSignal:
    """The signal that asked this process to end.

    Attributes:
        number: of the first signal, None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0

    def is_repeated(self, number: int) -> bool:
        """Takes note of a signal; returns whether it is a second request to end.

        What comes within a second of the first one belongs to it.
        """
        now = time.monotonic()
        if self.number is None:
            self.number, self._since = number, now
        return now - self._since >= _ONE_REQUEST_S


class OrderlyStop(SystemExit):
    """Ends every worker of a run at the same update, after they have saved together.

    Args:
        number: signal that asked for it; the exit code is 128 more.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
