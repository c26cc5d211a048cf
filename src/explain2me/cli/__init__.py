"""The command line: parse, call, print. Nothing heavy is imported before a command needs it."""

import os
import signal
import sys
from typing import NoReturn

__all__ = ["main"]


def main() -> None:
    """Run a command; see :func:`explain2me.cli.entry.main`. Ctrl-C during the imports gives one line as well."""
    waits = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not in a job that ignores it
    if waits:
        signal.signal(signal.SIGINT, _end)
    from explain2me.cli.entry import main as run_command

    if waits:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run_command()


def _end(*_: object) -> NoReturn:
    """End at once: an exception in the middle of an import may come out as any other."""
    print("\nexplain2me: stopped before it began", file=sys.stderr, flush=True)
    os._exit(130)
