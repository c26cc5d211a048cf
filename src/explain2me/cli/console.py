"""A console, progress bars, and times in words, for all commands."""

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
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class TimeLeftColumn(ProgressColumn):
        """The time left that the task tells, if it does: models differ in speed."""

        def render(self, task: "Task") -> Text:
            seconds = task.fields.get("seconds_left", task.time_remaining)
            return Text("" if seconds is None or task.finished else f"{duration_text(seconds)} left")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeLeftColumn(),
    )
    return Progress(*columns, console=console, transient=False, disable=not console.is_terminal)


def print_start(console: "Console", task: str, folder: Path) -> None:
    """Print in a log, which has no bars, which task starts and in which folder."""
    if not console.is_terminal:
        console.print(printable(f"{task}, in {folder}"), markup=False, soft_wrap=True)
