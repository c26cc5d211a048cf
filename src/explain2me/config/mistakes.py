"""Put a mistake in a config into one line for people."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from explain2me.config.fields import Section
from explain2me.config.schema import Config
from explain2me.text import nearest, shorten

MOST_MISTAKES = 8
"""Number of mistakes in one message."""

TYPE_NAME = re.compile(r"^constrained-|\w\[.*\]$")
"""Parts of a place that are names of types and no keys, such as ``dict[str,constrained-int]``."""


def explain(error: ValidationError) -> str:
    """The first mistakes of a config as one line."""
    mistakes = [mistake for mistake in error.errors() if mistake["loc"][-1:] != ("literal['auto']",)]
    inner = [mistake for mistake in mistakes if mistake["type"] != "too_short"]  # follows from a wrong item
    of_values = {_path(mistake) for mistake in inner if not mistake["type"].endswith("_type")}
    # of a field with several types, the mistakes of those that the value is not
    inner = [each for each in inner if not each["type"].endswith("_type") or _path(each) not in of_values]
    lines = list(dict.fromkeys(_explain_mistake(mistake) for mistake in inner or mistakes))
    more = f"; and {len(lines) - MOST_MISTAKES} more" if len(lines) > MOST_MISTAKES else ""
    return "; ".join(lines[:MOST_MISTAKES]) + more


def _explain_mistake(mistake: ErrorDetails) -> str:
    """One mistake as a sentence with the nearest right key or value."""
    path = _path(mistake)
    where = ".".join(shorten(part) for part in path)
    kind = mistake["type"]
    if kind == "extra_forbidden":
        return f"unknown key {where!r}: {nearest(str(path[-1]), _known_keys(path[:-1]))}"
    if kind == "missing":
        return f"{where} is missing; add it"
    shown = shorten(repr(mistake.get("input")))
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", str(mistake["ctx"]["expected"]))
        return f"{where}: unknown value {shown}; {nearest(str(mistake['input']), known)}"
    message = str(mistake["msg"]).removeprefix("Value error, ")
    message = message if len(message) <= 400 else f"{message[:397]}..."
    if kind == "tuple_type":
        message = (
            'Must be a list, such as [1, 2] or ["a", "b"] (behind --set all of it in quotation marks of the shell)'
        )
    if not where:
        return message
    return (
        f"{where}: {message}" if kind == "value_error" else f"{where}: {message[0].lower()}{message[1:]}, got {shown}"
    )


def _path(mistake: ErrorDetails) -> tuple[str | int, ...]:
    """The keys that lead to a mistake, without the types of a field that has several."""
    return tuple(part for part in mistake["loc"] if not TYPE_NAME.search(str(part)))


def _known_keys(path: Sequence[str | int]) -> list[str]:
    """The keys of the table at a path of the config, such as ``("detectors", 0)``."""
    section: type[Section] = Config
    for part in path:
        field = section.model_fields.get(str(part))
        section = next(_sections(field.annotation), section) if field else section
    return sorted(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[Section]]:
    """The tables that the type of a field names, such as ``tuple[DetectorConfig, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)
