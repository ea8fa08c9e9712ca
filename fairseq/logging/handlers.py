"""Where the log goes, and what happens when it cannot be written."""

from __future__ import annotations

import logging
import sys

__all__ = ["LogFile", "LogStream"]


class _SayingOnce(logging.Handler):
    """Tells of a log that cannot be written once, where Python would print a traceback per line.

    A reader that is gone (`| head`) is told to the command by `BrokenPipeError`; it ends there.
    """

    _has_said = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, BrokenPipeError):
            raise error
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_said:
            self._has_said = True
            print(f"the log cannot be written any more: {error}", file=sys.stderr)


class LogStream(_SayingOnce, logging.StreamHandler):  # type: ignore[type-arg]
    """Writes the log to a stream."""


class LogFile(_SayingOnce, logging.FileHandler):
    """Appends the log to a file."""
