"""Types of single fields that several tables of a config share."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from explain2me.text import number_text, shorten

MOST_BYTES = 200
"""Of a name; a disk takes 255 of a file name, and files of a run have more than one name in theirs."""
NAME_PATTERN = re.compile(r"[^\x00-\x1f\x7f/\\]{1,100}")


def safe_name(name: str) -> str:
    """The name, or ValueError: a name becomes part of file names, so separators and control characters are refused."""
    if not NAME_PATTERN.fullmatch(name) or name.startswith(".") or "__" in name:
        raise ValueError(
            f"expected 1 to 100 printable characters without '/', '\\', '__' or a leading dot, got "
            f"{shorten(repr(name))}; rename it"
        )
    if (count := len(name.encode())) > MOST_BYTES:
        raise ValueError(
            f"expected at most {MOST_BYTES} bytes (UTF-8), got {count} in {shorten(repr(name))}; rename it"
        )
    return name


def repeated(names: Sequence[str]) -> list[str]:
    """The names that occur more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _without_repeats(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if twice := repeated(names or ()):
        raise ValueError(f"expected different names, got {shorten(repr(twice[0]))} twice; remove one")
    return names


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", value):
        raise ValueError(f"expected auto, cpu, cuda, cuda:N or mps, got {shorten(repr(value))}")
    return value


Name = Annotated[str, AfterValidator(safe_name)]
Label = Annotated[str, BeforeValidator(lambda value: number_text(value) or value)]
"""A class; ``1`` and ``true`` are the labels that such cells of a table become."""
Device = Annotated[str, AfterValidator(_check_device)]
Differing = AfterValidator(_without_repeats)
Level = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
BatchSize = Annotated[int, Field(ge=1, le=65536)] | Literal["auto"]
Side = Annotated[int, Field(ge=8, le=4096)]
Sample = Count | dict[str, Count] | None


class Section(BaseModel):
    """Base of every table of the config. Frozen; refuses unknown keys; converts no types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
