"""What Ctrl-C does to a program: it leaves at once with one line, unless something has to be put away first.

A signal's exception can be lost in a callback of the garbage collector, and meet code that cannot bear it while a
library is being loaded. So it is raised only where a file would be left behind.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

_guards = 0
_interrupted = False


def leave_at_once(line: str) -> None:
    """Lets Ctrl-C end the process from now on, with the exit code 130.

    Args:
        line: what it prints to the standard error.
    """

    def leave(*_) -> None:
        global _interrupted
        if _guards:
            _interrupted = True
            raise KeyboardInterrupt
        os.write(2, f"{line}\n".encode())
        os._exit(128 + signal.SIGINT)  # as shells have it

    signal.signal(signal.SIGINT, leave)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Lets Ctrl-C raise `KeyboardInterrupt` in this block, so that what it has begun can be undone."""
    global _guards
    _guards += 1
    try:
        yield
        if _interrupted:  # and the exception was lost
            raise KeyboardInterrupt
    finally:
        _guards -= 1
