"""What holds for all tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

Process = subprocess.Popen[str]


def pytest_configure() -> None:
    # A shell that starts the tests in the background has them ignore ctrl-C, and so would the
    # commands that they start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def start_process() -> Iterator[Callable[..., Process]]:
    """Starts programs whose output is read as text; none of them outlives the test.

    Each leads a group of its own, which takes what it starts in turn.
    """
    with contextlib.ExitStack() as started:

        def start(command: list[Any], **options: Any) -> Process:
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            options = {"text": True, "start_new_session": True} | pipes | options
            process = subprocess.Popen(command, **options)
            started.enter_context(process)  # closes its pipes and waits for it
            started.callback(end_group, process)
            return process

        yield start


def end_group(process: Process) -> None:
    """Kills a process and those of its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
