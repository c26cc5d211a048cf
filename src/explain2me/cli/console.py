"""A console, progress bars, and times in words, for all commands."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from explain2me.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, Task


def duration_text(seconds: float) -> str:
    """A duration as ``1 h 02 min``, ``3 min 20 s`` or ``4.5 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min {int(seconds) % 60:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def make_console() -> "Console":
    """The terminal; in a log, lines of 200 columns."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def progress_bars(console: "Console") -> "Progress":
    """Bars with the time left; nothing in a log."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TimeElapsedColumn
    from rich.text import Text

    class TimeLeftColumn(ProgressColumn):
        """The time left that the task tells, if it does: models differ in speed."""

        def render(self, task: "Task") -> Text:
            seconds = task.fields.get("seconds_left", task.time_remaining)
            return Text("" if seconds is None or task.finished else f"{duration_text(seconds)} left")

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeLeftColumn())
    return Progress("{task.description}", *columns, console=console, disable=not console.is_terminal)


@contextlib.contextmanager
def progress_bar(console: "Console", description: str) -> Iterator[Callable[[int, int], None]]:
    """One bar; yields a function to call with the number done and the number in all."""
    with progress_bars(console) as bars:
        task = bars.add_task(description, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def print_line(console: "Console", text: str) -> None:
    """Print a line with names from files: neither markup nor control characters act, and a log does not wrap it."""
    console.print(printable(text), markup=False, soft_wrap=True)


def print_start(console: "Console", task: str, folder: Path) -> None:
    """Print in a log, which has no bars, which task starts and in which folder."""
    if not console.is_terminal:
        print_line(console, f"{task}, in {folder}")
