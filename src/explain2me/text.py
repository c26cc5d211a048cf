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
    """The first ``most`` characters as one line, with control characters made visible."""
    return printable(text[:most])


def is_utf8(name: str) -> bool:
    r"""Whether a file name can be written into files of text; the bytes of others stand in Python's strings as surrogates.

    >>> is_utf8("caf\N{LATIN SMALL LETTER E WITH ACUTE}.pt"), is_utf8("caf\udce9.pt")
    (True, False)
    """
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shorten(text: Any) -> str:
    """A name or value of any length as part of a message."""
    shown = str(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def number_text(value: object) -> str | None:
    """A number or boolean as a label: whole numbers by their digits, also those stored as floats; None for all else.

    pandas makes floats of whole numbers where a column has gaps.

    >>> number_text(1), number_text(1.0), number_text(True), number_text(0.5), number_text(float("nan"))
    ('1', '1', 'True', None, None)
    """
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value) if isinstance(value, int) else None


FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def no_formula(cell: str) -> str:
    """The cell, after an apostrophe where a spreadsheet would run it as a formula.

    >>> no_formula("=1+1"), no_formula("gan")
    ("'=1+1", 'gan')
    """
    return f"'{cell}" if cell.startswith(FORMULA_STARTS) else cell
