"""Reading batches ahead of those who use them."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["BufferedIterator"]

MAX_STOP_SECONDS = 30.0
"""How long a reader that is no longer needed may take for the batch it is at."""


class BufferedIterator:
    """Reads ahead in a thread.

    The thread starts with the first element asked for, and ends when all are read, when this
    object is closed or collected, or when the interpreter exits. What goes wrong in it is raised
    here.

    Args:
        size: elements kept ready, at least 1.
        iterable: what is iterated over; it has a length.
    """

    def __init__(self, size: int, iterable: Any) -> None:
        if size < 1:
            raise ValueError(f"--data-buffer-size is {size}; a buffer holds at least 1")
        self._iterable = iterable
        self._queue: queue.Queue[_Delivery] = queue.Queue(size)
        self._close: Callable[[], object] | None = None
        self._num_delivered = 0
        self._total = len(iterable)

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> BufferedIterator:
        return self

    def __next__(self) -> Any:
        if self._num_delivered >= self._total:
            self.close()
            raise StopIteration
        if self._close is None:
            self._start()
        delivery = self._queue.get()
        if delivery.error is not None:
            self._num_delivered = self._total
            raise delivery.error
        self._num_delivered += 1
        return delivery.element

    def _start(self) -> None:
        stop = threading.Event()
        # Worker processes, if any, are started here and not in the thread: forking is for the
        # thread that holds the locks.
        source = iter(self._iterable)
        thread = threading.Thread(
            target=_fill, args=(source, self._queue, stop, self._total), daemon=True
        )
        self._close = weakref.finalize(self, _stop_filling, thread, self._queue, stop)
        thread.start()

    def take(self, n: int) -> BufferedIterator:
        """Ends after `n` elements in all. To be called before the first is read."""
        self._total = min(self._total, n)
        if hasattr(self._iterable, "take"):
            self._iterable.take(n)
        return self

    def close(self) -> None:
        """Stops the thread and drops what it has read."""
        self._num_delivered = self._total
        if self._close is not None:
            self._close()


class _Delivery:
    __slots__ = ("element", "error")

    def __init__(self, element: Any = None, error: BaseException | None = None) -> None:
        self.element = element
        self.error = error


def _fill(
    source: Iterator[Any], buffer: queue.Queue[_Delivery], stop: threading.Event, total: int
) -> None:
    """Runs in the thread; holds no reference to the iterator, so that can be collected."""
    try:
        for _ in range(total):
            delivery = _Delivery(next(source))
            if stop.is_set():
                return
            buffer.put(delivery)
            del delivery
    except StopIteration:
        buffer.put(_Delivery(error=StopIteration()))
    except Exception as error:
        buffer.put(_Delivery(error=error))


def _stop_filling(
    thread: threading.Thread, buffer: queue.Queue[_Delivery], stop: threading.Event
) -> None:
    stop.set()
    if thread is threading.current_thread():  # collected by chance in the thread itself
        return
    deadline = time.monotonic() + MAX_STOP_SECONDS
    while thread.is_alive() and time.monotonic() < deadline:
        # Makes room for a `put` that waits; the thread sees the event after it.
        with contextlib.suppress(queue.Empty):
            buffer.get_nowait()
        thread.join(timeout=0.01)
