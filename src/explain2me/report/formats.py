"""Numbers as text, in one format for the terminal, the page, CSV, LaTeX and sentences."""

import math
from collections.abc import Sequence
from typing import TypeGuard

UNKNOWN = "-"
"""Stands for a value that is missing or NaN."""


def is_known(value: float | None) -> TypeGuard[float]:
    """Whether there is a value: neither None nor NaN."""
    return value is not None and not math.isnan(value)


def number(value: float | None, *, signed: bool = False) -> str:
    """Three decimals.

    >>> number(0.5), number(0.5, signed=True), number(None)
    ('0.500', '+0.500', '-')
    """
    return f"{value:{'+' if signed else ''}.3f}" if is_known(value) else UNKNOWN


def count(value: float | None) -> str:
    """A whole number.

    >>> count(26.0), count(float("nan"))
    ('26', '-')
    """
    return str(int(value)) if is_known(value) else UNKNOWN


def count_range(counts: Sequence[int]) -> str:
    """One count, or the smallest and the largest where they differ.

    >>> count_range([53, 3, 7]), count_range([7, 7])
    ('3 to 53', '7')
    """
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def share(value: float | None) -> str:
    """Per cent with one decimal.

    >>> share(1.0)
    '100.0 %'
    """
    return f"{100 * value:.1f} %" if is_known(value) else UNKNOWN


def interval(low: float | None, high: float | None, *, signed: bool = False) -> str:
    """Both limits.

    >>> interval(-0.1, 0.2), interval(-0.1, 0.2, signed=True), interval(None, 0.2)
    ('[-0.100, 0.200]', '[-0.100, +0.200]', '-')
    """
    both = is_known(low) and is_known(high)
    return f"[{number(low, signed=signed)}, {number(high, signed=signed)}]" if both else UNKNOWN


def mean_std(mean: float | None, std: float | None) -> str:
    """Mean and standard deviation; the mean alone where there is one value.

    >>> mean_std(0.812, 0.034), mean_std(0.5, None), mean_std(None, None)
    ('0.812 ± 0.034', '0.500', '-')
    """
    return f"{number(mean)} ± {number(std)}" if is_known(mean) and is_known(std) else number(mean)


def value_interval(value: float | None, low: float | None, high: float | None, *, signed: bool = False) -> str:
    """A value, followed by its interval where that is known.

    >>> value_interval(0.5, 0.4, 0.6), value_interval(0.5, None, None)
    ('0.500 [0.400, 0.600]', '0.500')
    """
    limits = interval(low, high, signed=signed)
    return number(value, signed=signed) + (f" {limits}" if limits != UNKNOWN else "")


def p_value(value: float | None) -> str:
    """Three decimals, or that it is smaller.

    >>> p_value(0.0004), p_value(0.04)
    ('<0.001', '0.040')
    """
    return "<0.001" if is_known(value) and value < 0.001 else number(value)
