"""What `explain2me show` prints of a run, as text."""

import io

from rich.console import Console

from explain2me.report.terminal import show_run
from explain2me.run.folder import Run


def shown(run: Run, width: int = 200) -> str:
    """All tables and findings, on a terminal of this width."""
    console = Console(width=width, file=io.StringIO(), highlight=False, color_system=None)
    show_run(run, console)
    return console.file.getvalue()
