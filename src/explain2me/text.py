"""Words for people: names offered in errors, and text from files made safe to print."""

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(word: str, known: Iterable[str], *, count: int = 3) -> str:
    """A half-sentence that offers the known words nearest to ``word``, or lists a few of them.

    >>> nearest("resnet5", ["resnet50", "vgg16"])
    "did you mean 'resnet50'?"
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, n=count, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    shown = ", ".join(map(repr, names[:10])) + (", ..." if len(names) > 10 else "")
    return f"known: {shown}"


def printable(text: str) -> str:
    r"""Control characters of hostile names made visible: none may reach the terminal.

    >>> print(printable("\x1b[2J\x9bgan"))
    \x1b[2J\x9bgan
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def printable_line(text: str, most: int = 300) -> str:
    """One short line without control characters: what comes from a file is hostile."""
    return "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in text[:most])


def shorten(text: Any) -> str:
    """A name or value of any length as part of a message."""
    shown = str(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
