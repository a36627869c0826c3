"""Limits of time and memory for what others have written: regular expressions and templates of models and adapters."""

import contextlib
import re
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

_STATM = Path("/proc/self/statm")
_MATCHING_SECONDS = 2.0


@contextlib.contextmanager
def limited(*, seconds: float, memory: int | None = None) -> Iterator[None]:
    """Lets a block raise where it would go on and on.

    Time is that of the processor; it is limited in the main thread, where signals arrive. Memory is limited where the
    system tells what the process has (Linux), for all threads. On Windows nothing is limited.

    Args:
        seconds: for which it may compute.
        memory: bytes that it may add to those of the process; None for no limit.

    Raises:
        TimeoutError: it computed for longer.
        MemoryError: it needed more.
    """
    running = True

    def stop(*_) -> None:
        if running:
            raise TimeoutError(f"it takes more than {seconds:g} s")

    timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    bounded = resource is not None and memory is not None and _STATM.exists()
    before = resource.getrlimit(resource.RLIMIT_AS) if bounded else (0, 0)
    handler = signal.signal(signal.SIGVTALRM, stop) if timed else None
    try:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)  # again and again, lest it be lost in a callback
        if bounded:
            size = int(_STATM.read_text().split()[0]) * resource.getpagesize() + (memory or 0)
            least = min(limit for limit in (size, *before) if limit != resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_AS, (least, before[1]))
        yield
    except MemoryError:
        raise MemoryError(f"it takes more than {(memory or 0) / 2**20:g} MiB of memory") from None
    finally:
        running = False
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, handler)
        if bounded:
            resource.setrlimit(resource.RLIMIT_AS, before)


def compiled(expression: str) -> re.Pattern[str]:
    """Returns a regular expression; raises `ValueError` if it is none."""
    try:
        with matching(), warnings.catch_warnings(action="ignore"):
            return re.compile(expression)
    except (re.error, OverflowError, RecursionError, TimeoutError) as error:
        raise ValueError(f"{expression!r:.200} is no regular expression: {error}") from error


@contextlib.contextmanager
def matching() -> Iterator[None]:
    """Lets a block that matches regular expressions raise `TimeoutError` where one of them backtracks without end."""
    try:
        with limited(seconds=_MATCHING_SECONDS):
            yield
    except TimeoutError as error:
        raise TimeoutError(f"{error} to match; write a regular expression that backtracks less") from None
