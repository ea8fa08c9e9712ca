"""How a command ends: exit codes and messages.

0 on success, 2 for a wrong command line, 130 after ctrl-C, 143 after SIGTERM, 1 for everything
else. What a user can cause (a missing file, a value that does not fit) ends in one line; what only
a defect can cause keeps its traceback.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from fairseq.logging.handlers import LogStream

__all__ = ["run_command", "set_up_logging", "start"]

_OURS = Path(__file__).resolve().parent.parent
_RAISED_FOR_USERS = (ValueError, TypeError, FloatingPointError, ImportError, RuntimeError)


def set_up_logging(stream: TextIO | None = None) -> None:
    """Sends the log to a stream, standard output if none is given; LOGLEVEL sets the level."""
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=os.environ.get("LOGLEVEL", "INFO").upper(),
        handlers=[LogStream(stream or sys.stdout)],
    )


def _is_for_the_user(error: BaseException) -> bool:
    """Tells whether an error's own text is all that a user needs.

    Errors of the operating system are; others are if code of this project raised them on purpose,
    that is, if the innermost frame is ours and stands at a `raise`.
    """
    if isinstance(error, OSError):
        return True
    if not isinstance(error, _RAISED_FOR_USERS):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    innermost = frames[-1]
    is_ours = any(
        _OURS / package in Path(innermost.filename).resolve().parents
        for package in ("fairseq", "fairseq_cli", "scripts", "examples")
    )
    return is_ours and (innermost.line or "").lstrip().startswith("raise")


def run_command(main: Callable[[], object]) -> None:
    """Runs a command's main function and ends the process with the right code and message.

    `LOGLEVEL=DEBUG` in the environment shows the traceback of every error.
    """
    _replace_closed_stderr()
    try:
        with _leaving_on_terminate():
            main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(130)
    except BrokenPipeError:
        # The reader of our output is gone (`| head`); nothing is left to be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(1)
    except Exception as error:
        if not _is_for_the_user(error) or os.environ.get("LOGLEVEL", "").upper() == "DEBUG":
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        _leave(1)


def _replace_closed_stderr() -> None:
    """Lets what is said go nowhere if the caller has closed stderr (`2>&-`).

    Else the next file to be opened, perhaps a checkpoint, would have its number, and what libraries
    and started processes write to stderr would end up in it.
    """
    if sys.stderr is not None:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere == 2:
        os.set_inheritable(nowhere, True)
    sys.stderr = open(nowhere, "w", encoding="utf-8")  # noqa: SIM115  (as long as the process)


def start(module: str) -> None:
    """Runs `fairseq_cli.<module>`; the imports, which take seconds, may be interrupted too."""
    run_command(lambda: _import(f"fairseq_cli.{module}").cli_main())


def _import(module: str) -> Any:
    """Imports a module without garbage collection: torch makes a lot, and all of it stays."""
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _leaving_on_terminate() -> Iterator[None]:
    """Lets SIGTERM end this process as an exception does, so that everything is cleaned up."""
    is_set = signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    if is_set or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, _on_terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _on_terminate(number: int, frame: Any) -> None:
    # Loaders that are terminated too are no failure now; torch would raise one for each.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    print("terminated", file=sys.stderr)
    sys.exit(128 + number)


def _is_ours() -> bool:
    return signal.getsignal(signal.SIGTERM) is _on_terminate


def _hold_terminate() -> None:
    """Keeps SIGTERM waiting during a fork: the child would forget one that comes too early."""
    if _is_ours():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release_terminate() -> None:
    """Lets a SIGTERM that came meanwhile in a moment later: what is raised here gets lost."""
    if not _is_ours():
        return
    if signal.SIGTERM in signal.sigpending():
        signal.sigwait({signal.SIGTERM})
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _forget_handler() -> None:
    """Lets SIGTERM end a forked process at once, whatever it waits for."""
    if _is_ours():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_hold_terminate,
        after_in_parent=_release_terminate,
        after_in_child=_forget_handler,
    )


def _leave(code: int) -> None:
    logging.shutdown()
    if sys.stdout is not None:  # it is None where the caller has closed it
        sys.stdout.flush()
    sys.exit(code)
