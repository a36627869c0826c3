"""Stopping a run between two steps, when a person (SIGINT) or a scheduler (SIGTERM) asks for it."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A run that was stopped; the message says from where the same command goes on.

    Attributes:
        signal: the signal that stopped it.
    """

    def __init__(self, message: str = "", signal: int = signal.SIGINT):
        super().__init__(message)
        self.signal = signal


class Interruptions:
    """Notes the first signal instead of obeying it; use it as a context. The second acts as without.

    Attributes:
        received: the signal, or None.
    """

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        self._may_raise = False

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers, and get no signals
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before not in (signal.SIG_IGN, None):  # ignored, as by nohup, or not Python's
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextlib.contextmanager
    def at_once(self, allowed: bool = True) -> Iterator[None]:
        """Lets a signal break off the block, which must leave nothing half done; the block is then left quietly.

        Args:
            allowed: whether it may; otherwise the signal is noted.
        """
        try:
            self._may_raise = allowed
            yield
            self._may_raise = False
        except Interrupted:
            self._may_raise = False

    def _note(self, number: int, _) -> None:
        self.received = number
        self.__exit__()
        os.write(2, b"balora-jax: stopping and saving; once more stops at once\n")
        if self._may_raise:
            raise Interrupted(signal=number)
