"""Compare two configs: the fields that decide the maps, and the fields that differ."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from explain2me.config.schema import ComputeConfig, Config
from explain2me.statistics.scores import MEASURES

MEASURING_FIELDS: tuple[tuple[str, ...], ...] = (
    ("measures", "similarity"),
    *(("measures", measure.name) for measure in MEASURES.values() if not measure.perturbation),
    ("summary",),
    ("report",),
)
"""Fields that stage 1 does not read; they may change between two commands on one run folder."""
ENGINE_FIELDS = tuple(("compute", name) for name in ("workers", "executor", "ray_address", "gpus_per_worker"))
"""Fields that choose the processes for the shards; no result depends on them."""
FREE_FIELDS = (*MEASURING_FIELDS, *ENGINE_FIELDS, ("data", "allowed_quarantine"), ("name",), ("training",))
"""Fields that do not decide the maps."""


def fingerprint(config: Config) -> dict[str, Any]:
    """The fields that decide the maps, as a flat dict ``{"compute.batch_size": 32, ...}``."""
    tree = json.loads(config.model_dump_json())
    for *parents, last in FREE_FIELDS:
        node = tree
        for parent in parents:
            node = node[parent]
        del node[last]
    return flat(tree)


def without_engine(config: Config) -> Config:
    """The config with the default of each field that chooses the processes for the shards."""
    default = ComputeConfig()
    engine = {name: getattr(default, name) for _, name in ENGINE_FIELDS}
    return config.model_copy(update={"compute": config.compute.model_copy(update=engine)})


def digest(value: Any) -> str:
    """A short stable hash (16 hex digits) of a value that JSON can hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a tree of dicts and lists to ``{"a.0.b": value}``."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    leaves: dict[str, Any] = {}
    for key, value in items:
        leaves |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def was_and_is(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    """The value of a field in two flat configs, before and after, as written in a TOML file.

    >>> was_and_is({}, {"detectors.0.input_size": 96}, "detectors.0.input_size")
    'detectors.0.input_size was not set, is 96'
    """
    values = (before.get(key), after.get(key))
    was, now = ("not set" if v is None else str(v).lower() if isinstance(v, bool) else repr(v) for v in values)
    return f"{key} was {was}, is {now}"
