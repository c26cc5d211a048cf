"""The command line: parse, call, print. Nothing heavy is imported before a command needs it."""

from explain2me.cli.entry import main

__all__ = ["main"]
