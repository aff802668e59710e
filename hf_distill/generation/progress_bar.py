"""How far the answers are: a bar in a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0


class ProgressBar:
    """Counts prompts up to `total`; a context manager.

    Args:
        total: prompts to come.
        shown: whether this process says anything.
    """

    def __init__(self, total: int, *, shown: bool) -> None:
        self._total, self._done = total, 0
        console = Console(stderr=True)
        columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, disable=not (shown and console.is_terminal))
        self._task = self._bar.add_task("prompts", total=total)
        self._lines = shown and not console.is_terminal
        self._last = time.monotonic()

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def advance(self, prompts: int) -> None:
        """Notes that so many more are answered."""
        self._done += prompts
        self._bar.advance(self._task, prompts)
        if self._lines and time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            print(f"{self._done} of {self._total} prompts answered", file=sys.stderr, flush=True)
            self._last = time.monotonic()
