"""What differs between two configs, and which fields decide the maps."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from explain2me.config.schema import Config

MEASURING_FIELDS = (
    ("measures", "similarity"),
    ("measures", "entropy"),
    ("measures", "stability"),
    ("summary",),
    ("report",),
)
"""Fields that stage 1 does not read: they may change between two calls on one run folder."""
ENGINE_FIELDS = tuple(("compute", name) for name in ("workers", "executor", "ray_address", "gpus_per_worker"))
"""Who carries the shards; no result depends on it."""
FREE_FIELDS = (*MEASURING_FIELDS, *ENGINE_FIELDS, ("data", "allowed_quarantine"), ("name",), ("training",))


def fingerprint(config: Config) -> dict[str, Any]:
    """The part of the config that decides the maps, as a flat dict ``{"measures.noise.0.levels.0": 0.05, ...}``."""
    tree = json.loads(config.model_dump_json())
    for *parents, last in FREE_FIELDS:
        node = tree
        for parent in parents:
            node = node[parent]
        del node[last]
    return flat(tree)


def digest(value: Any) -> str:
    """A short stable hash (16 hex digits) of anything that JSON can hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of dicts and lists as ``{"a.0.b": value}``."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def was_and_is(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    """What a field of two flat configs was and is, in the words of a TOML file.

    >>> was_and_is({}, {"detectors.0.input_size": 96}, "detectors.0.input_size")
    'detectors.0.input_size was not set, is 96'
    """
    values = (before.get(key), after.get(key))
    was, now = ("not set" if v is None else str(v).lower() if isinstance(v, bool) else repr(v) for v in values)
    return f"{key} was {was}, is {now}"
