"""Every command, and one line for every error that a user can cause."""

import contextlib
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from explain2me.cli.check import check
from explain2me.cli.folders import compact, verify
from explain2me.cli.results import measure, report, show, summarise
from explain2me.cli.run import explain, run
from explain2me.cli.train import demo, study, train
from explain2me.errors import Explain2MeError, Stopped
from explain2me.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(
    name="explain2me",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

STOPPED = 130
"""Exit code after Ctrl-C, as shells have it."""


def _print_version(asked: bool) -> None:
    if asked:
        from explain2me import __version__

        print(f"explain2me {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Measure where image classifiers look, over whole datasets, to choose which of them to trust."""


for command in (demo, check, run, explain, measure, summarise, report, train, study, show, verify, compact):
    app.command()(command)


def main() -> None:
    """Run a command: wrong input gives one line and exit code 2, our own bugs a traceback and 1."""
    with _stoppable() as signals:
        try:
            app(standalone_mode=True)
        except SystemExit as stop:
            if stop.code == STOPPED:
                _say_stopped("what is committed stays")
            raise
        except Exception as error:
            if signals:  # an import that is stopped may raise anything
                _say_stopped(str(error) if isinstance(error, Stopped) else "what is committed stays")
                sys.exit(STOPPED)
            message = _message(error)
            if message is None:
                raise
            print(f"explain2me: {message}", file=sys.stderr)
            sys.exit(2)


def _say_stopped(kept: str) -> None:
    print(f"\nexplain2me: stopped; {kept}, call the same command to continue", file=sys.stderr)


def _message(error: Exception) -> str | None:
    """One line about an error that a user can cause; None for our own bugs."""
    text = printable(" ".join(str(error).split()))
    if isinstance(error, Explain2MeError):
        return text
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{printable(str(error.strerror or error) + where)}; what is committed stays"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return (
            "out of memory; what is committed stays. End what else needs memory, or lower compute.workers (or "
            "compute.batch_size, in a new folder), and call the same command again"
        )
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        todo = "raise the limits `ulimit -u` and `-v` or lower compute.workers, and call the same command again"
        return f"no more threads can be started here; what is committed stays. End other processes, {todo}"
    if type(error).__module__.startswith("pyarrow"):
        return f"a file cannot be read as a table ({text}); `explain2me verify RUN` looks at every file of a run"
    return None


@contextlib.contextmanager
def _stoppable() -> "Iterator[list[int]]":
    """Let SIGTERM, which a scheduler sends before it kills, stop a command as Ctrl-C does; gives the signals that came."""
    came: list[int] = []

    def stop(number: int, _: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.getsignal(number)
            if before[number] is not signal.SIG_IGN:  # as in a job of nohup
                signal.signal(number, stop)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
