"""A progress line: a bar on a terminal, a line every few seconds in a log."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import only_copy  # noqa: F401 (refuses a second copy of this folder)


class ProgressLine:
    """Shows a fraction and a text on stderr. Does nothing where not enabled."""

    LOG_EVERY_S = 5.0

    def __init__(self, *, enabled: bool) -> None:
        self._bar: Progress | None = None
        self._logs = enabled and not sys.stderr.isatty()
        self._last = time.monotonic()
        if enabled and not self._logs:
            columns = (TextColumn("profile"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task("", total=1.0)

    def __enter__(self) -> "ProgressLine":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, fraction: float, text: str) -> None:
        """Update to `fraction` of 1."""
        if self._bar:
            self._bar.update(self._task, completed=min(1.0, fraction), description=text)
        elif self._logs and time.monotonic() - self._last >= self.LOG_EVERY_S:
            self._last = time.monotonic()
            print(f"profile: {text}", file=sys.stderr, flush=True)
