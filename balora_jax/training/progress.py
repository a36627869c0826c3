"""What a person sees while a run goes on: a bar on a terminal, plain lines otherwise."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class TrainingProgress:
    """Progress of one population; use it as a context.

    Args of the constructor: the console, a title, the number of steps, the steps already done, and how often a plain
    line appears where there is no terminal (seconds).
    """

    def __init__(self, console: Console, title: str, steps: int, done: int, *, line_seconds: float = 10.0):
        self._console, self._title, self._steps, self._first = console, title, steps, done
        self._line_seconds = line_seconds
        self._start = self._last_line = time.monotonic()
        self._tokens, self._bar = 0, None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                TimeElapsedColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=steps, completed=done, status="compiling")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens: int) -> None:
        """Shows a step.

        Args:
            step: steps done.
            loss: a loss to show.
            tokens: tokens of the steps since the last update, of all members.
        """
        if self._tokens == 0:  # the first steps hold the compilation
            self._start, self._first = time.monotonic(), step
        self._tokens += tokens
        seconds = time.monotonic() - self._start
        if step > self._first:
            rate = (self._tokens - tokens) / seconds
            left = seconds / (step - self._first) * (self._steps - step)
            status = f"loss {loss:.4f}  {rate:,.0f} tokens/s  {left:.0f} s left"
        else:
            status = f"loss {loss:.4f}"
        if self._bar:
            self._bar.update(self._task, completed=step, status=status)
        elif time.monotonic() - self._last_line >= self._line_seconds or step == self._steps:
            self._last_line = time.monotonic()
            self._console.print(f"{self._title}: step {step}/{self._steps}  {status}", markup=False, highlight=False)

    def note(self, text: str) -> None:
        """Prints a line beside the bar."""
        self._console.print(f"{self._title}: {text}", markup=False, highlight=False)
