"""What a person sees while a run goes on: a bar on a terminal, plain lines otherwise."""

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_AVERAGED = 50
"""Steps over which the loss that is shown is averaged."""

Say = Callable[[str], None]


@contextlib.contextmanager
def phase(console: Console, what: str, *, brief_seconds: float = 1.0) -> Iterator[Say]:
    """Shows what is done, where nothing else would appear, and then how long it took: `what ... 12 s; result`.

    Args:
        console: where it is shown; on a terminal when it is done, otherwise while it goes on.
        what: it is.
        brief_seconds: nothing is shown of what takes no longer and has no result.

    Yields:
        A function that takes what comes of it, for the end of the line.
    """
    said: list[str] = []
    start, begun = time.monotonic(), threading.Event()

    def begin() -> None:
        begun.set()
        _print(console, f"{what} ...", end="")

    timer = threading.Timer(brief_seconds, begin)
    timer.daemon = True
    if not console.is_terminal:
        timer.start()
    try:
        yield said.append
    except BaseException:
        _stop(timer)
        if begun.is_set():
            _print(console, "")
        raise
    _stop(timer)
    seconds = time.monotonic() - start
    if said or seconds > brief_seconds:
        ending = "; ".join([f" {seconds:.1f} s", *said])
        _print(console, ending if begun.is_set() else f"{what} ...{ending}")


def _stop(timer: threading.Timer) -> None:
    """Waits for what a timer has begun, or lets it begin no more."""
    timer.cancel()
    if timer.is_alive():
        timer.join()


class TrainingProgress:
    """Progress of one population; use it as a context.

    Args of the constructor: the console, a title, the number of steps, the steps already done, and how often a plain
    line appears where there is no terminal (seconds).
    """

    def __init__(self, console: Console, title: str, steps: int, done: int, *, line_seconds: float = 10.0):
        self._console, self._title, self._steps, self._first = console, title, steps, done
        self._line_seconds, self._last_line = line_seconds, float("-inf")
        self._start = time.monotonic()
        self._tokens, self._bar = 0, None
        self._losses: deque[float] = deque(maxlen=_AVERAGED)
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                TimeElapsedColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=steps, completed=done, status="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    @contextlib.contextmanager
    def phase(self, what: str) -> Iterator[Say]:
        """As the function `phase`; the time it takes is not that of the steps."""
        if self._bar:
            self._bar.update(self._task, status=what)
        start = time.monotonic()
        with phase(self._console, f"{self._title}: {what}") as say:
            yield say
        self._start += time.monotonic() - start

    def update(self, step: int, loss: float, tokens: int) -> None:
        """Shows a step.

        Args:
            step: steps done.
            loss: of its batch.
            tokens: of its batch, of all members.
        """
        self._losses.append(loss)
        if self._tokens == 0:  # the first step takes longer
            self._start, self._first = time.monotonic(), step
        self._tokens += tokens
        seconds = time.monotonic() - self._start
        status = f"loss {loss:.4f}, mean of {len(self._losses)} steps {statistics.fmean(self._losses):.4f}"
        if step > self._first:
            rate = (self._tokens - tokens) / max(seconds, 1e-9)
            left = seconds / (step - self._first) * (self._steps - step)
            status += f"  {rate:,.0f} tokens/s  {left:.0f} s left"
        if self._bar:
            self._bar.update(self._task, completed=step, status=status)
        elif step == self._steps or (step > self._first and self._is_time()):
            self._last_line = time.monotonic()
            self.note(f"step {step}/{self._steps}  {status}")

    def _is_time(self) -> bool:
        return time.monotonic() - self._last_line >= self._line_seconds

    def note(self, text: str) -> None:
        """Prints a line beside the bar."""
        _print(self._console, f"{self._title}: {text}")


def counted(count: int, what: str) -> str:
    """Returns a number of things in words: `1 run`, `2 runs`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _print(console: Console, text: str, end: str = "\n") -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True, end=end)
