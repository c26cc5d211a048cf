"""Mistakes in a config as one line for people."""

import re
from collections.abc import Sequence
from typing import Any

from explain2me.config.fields import Section
from explain2me.config.schema import (
    ComputeConfig,
    Config,
    DataConfig,
    DetectorConfig,
    MeasuresConfig,
    NoiseConfig,
    ReportConfig,
    SalienceConfig,
    SummaryConfig,
)
from explain2me.config.training import AugmentationConfig, OptimizerConfig, StrategyConfig, TrainingConfig
from explain2me.text import nearest, shorten

MOST_MISTAKES = 8
"""Of a config that are told at once."""


def plain_mistake(mistake: dict[str, Any]) -> dict[str, Any]:
    """Where a field takes a number or a word, the mistake is about the number."""
    return mistake | {"loc": tuple(part for part in mistake["loc"] if part != "constrained-int")}


def explain_mistake(mistake: dict[str, Any]) -> str:
    """One mistake that pydantic found, as a sentence with the nearest right key or value."""
    where = ".".join(shorten(part) for part in mistake["loc"])
    kind = mistake["type"]
    if kind == "extra_forbidden":
        key = str(mistake["loc"][-1])
        return f"unknown key {where!r}: {nearest(key, _known_keys(mistake['loc'][:-1]))}"
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


def _known_keys(path: Sequence[str | int]) -> list[str]:
    sections: dict[str, type[Section]] = {
        "data": DataConfig,
        "detectors": DetectorConfig,
        "training": TrainingConfig,
        "strategies": StrategyConfig,
        "optimizer": OptimizerConfig,
        "augmentation": AugmentationConfig,
        "salience": SalienceConfig,
        "measures": MeasuresConfig,
        "noise": NoiseConfig,
        "summary": SummaryConfig,
        "report": ReportConfig,
        "compute": ComputeConfig,
    }
    names = [part for part in path if isinstance(part, str)]
    return sorted((sections[names[-1]] if names else Config).model_fields)
