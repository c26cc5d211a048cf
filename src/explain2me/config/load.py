"""Read a config from a TOML file, apply ``--set``, and check it."""

import glob
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from explain2me.config.mistakes import MOST_MISTAKES, explain_mistake, plain_mistake
from explain2me.config.schema import Config
from explain2me.config.training import StrategyConfig
from explain2me.errors import ConfigError
from explain2me.text import shorten

MAX_BYTES = 2**20
MAX_DEPTH = 20
MAX_VALUES = 100_000
MAX_CHARACTERS = 2000
"""Longest name or text; longer paths do not work on every system."""
LONG_KEY = re.compile(  # possessive quantifiers, so its time is linear in the length of the text
    rf"""(?:(?<![\w-])[\w-]++|"[^"\n]*+"|'[^'\n]*+')(?:[ \t]*+\.[ \t]*+(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')){{{MAX_DEPTH},}}+"""
)


def load_config(path: Path, sets: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply ``--set`` overrides, check the config, and make its paths absolute.

    Args:
        path: the TOML file.
        sets: overrides such as ``measures.noise.levels=[0,0.1]``; the right side is TOML or a plain string.

    Raises:
        ConfigError: the file is missing or not TOML, or a key or value is wrong; the message names the key.
    """
    tree = _read_tree(path)
    _apply_sets(tree, sets)
    return _absolute(parse_config(tree), path.resolve().parent)


def _read_tree(path: Path) -> dict[str, Any]:
    """Read a TOML file of limited size."""
    where = f"config {str(path)!r}"
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ConfigError(f"{where} is a pipe or a device; give a TOML file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{where} is larger than {MAX_BYTES} bytes; give a TOML file")
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{where} does not exist; give the path of a TOML file") from None
    except IsADirectoryError:
        raise ConfigError(f"{where} is a folder; give a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} cannot be read as UTF-8 text: {error}") from None
    try:
        return _parse_toml(text)
    except (ValueError, RecursionError) as error:  # ValueError: not TOML, or a number of thousands of digits
        raise ConfigError(f"{where} is not valid TOML: {shorten(str(error))}") from None


def _parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML; refuses long keys, because tomllib needs minutes and all memory for a key of 100,000 names."""
    if LONG_KEY.search(text):
        raise ValueError(f"a key of more than {MAX_DEPTH} names; no field is so deep")
    return tomllib.loads(text)


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Check a parsed config. A ConfigError holds its mistakes in one line."""
    _check_tree(tree)
    try:
        return Config.model_validate(_tuples(tree))
    except ValidationError as error:
        mistakes = [
            plain_mistake(dict(mistake)) for mistake in error.errors() if mistake["loc"][-1:] != ("literal['auto']",)
        ]
        inner = [
            mistake for mistake in mistakes if mistake["type"] != "too_short"
        ]  # a wrong item makes a list too short
        lines = list(dict.fromkeys(explain_mistake(mistake) for mistake in inner or mistakes))
        more = f"; and {len(lines) - MOST_MISTAKES} more" if len(lines) > MOST_MISTAKES else ""
        raise ConfigError("config: " + "; ".join(lines[:MOST_MISTAKES]) + more) from None


def _check_tree(tree: Mapping[str, Any]) -> None:
    """Refuse trees that are too deep or too large, and NUL characters and huge numbers, which later code cannot read."""
    level: list[tuple[str, Any]] = [("", tree)]
    count = 0
    for _ in range(MAX_DEPTH):
        below: list[tuple[str, Any]] = []
        for where, value in level:
            _check_value(where, value)
            children = (
                value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
            )
            for key, child in children:
                _check_value(where, key)
                below.append((f"{where}.{shorten(key)}" if where else shorten(key), child))
        count += len(below)
        if count > MAX_VALUES:
            raise ConfigError(f"config: expected at most {MAX_VALUES} values, got more; is it a config of explain2me?")
        if not below:
            return
        level = below
    raise ConfigError(
        f"{shorten(level[0][0])}: tables and arrays are nested more than {MAX_DEPTH} deep; no field needs that"
    )


def _check_value(where: str, value: Any) -> None:
    if isinstance(value, str) and len(value) > MAX_CHARACTERS:
        raise ConfigError(f"{where or 'config'}: a text of {len(value)} characters, expected at most {MAX_CHARACTERS}")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{where or 'config'}: {shorten(repr(value))} holds a NUL character; take it out")
    if isinstance(value, int) and abs(value) >= 2**64:
        raise ConfigError(
            f"{where}: expected a number below 2^64, got one of {value.bit_length()} bits; give a smaller one"
        )


def override(config: Config, sets: Sequence[str]) -> Config:
    """The config with ``--set`` overrides applied. Paths stay as they are."""
    if not sets:
        return config
    tree = json.loads(config.model_dump_json())
    _apply_sets(tree, sets)
    return parse_config(tree)


def _tuples(tree: Any) -> Any:
    """Turn arrays of TOML into tuples: the models are strict and frozen."""
    if isinstance(tree, Mapping):
        return {key: _tuples(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return tuple(_tuples(value) for value in tree)
    return tree


def _apply_sets(tree: dict[str, Any], sets: Sequence[str]) -> None:
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set: expected key=value, e.g. compute.batch_size=16, got {shorten(repr(item))}")
        keys = key.strip().split(".")
        if len(keys) > MAX_DEPTH:
            raise ConfigError(f"--set {shorten(item)}: {len(keys)} names in one key; no field is so deep")
        _set(tree, keys, _parse_value(text, item), shorten(item))


def _set(node: Any, keys: list[str], value: Any, item: str) -> None:
    """Set a value in a tree of dicts and lists; ``item`` is the override, for errors."""
    for i, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            if (index := _index(key, node)) is not None:
                node = node[index]
            elif len(node) == 1 and isinstance(node[0], dict):  # the index 0 may be left out of a list of one table
                _set(node[0], keys[i:], value, item)
                return
            else:
                raise ConfigError(
                    f"--set {item}: {shorten(key)!r} is not an index of a list of {len(node)}; give 0 to {len(node) - 1}"
                )
        else:
            node = node.setdefault(key, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {item}: {shorten('.'.join(keys[: i + 1]))} is a value, not a table")
    if isinstance(node, list):
        if len(node) == 1 and isinstance(node[0], dict):
            node = node[0]
        elif (index := _index(keys[-1], node)) is not None:
            node[index] = value
            return
        else:
            raise ConfigError(f"--set {item}: {shorten(keys[-1])!r} is not an index of a list of {len(node)}")
    node[keys[-1]] = value


def _parse_value(text: str, item: str) -> Any:
    try:
        return _parse_toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()
    except (ValueError, RecursionError) as error:  # TOML, but thousands of digits or brackets
        raise ConfigError(f"--set {shorten(item)}: the value cannot be read: {shorten(error)}") from None


def _index(key: str, node: Sequence[Any]) -> int | None:
    """The index of a list that a part of a key names; None for any other text."""
    return int(key) if re.fullmatch("[0-9]{1,9}", key) and int(key) < len(node) else None


def _absolute(config: Config, folder: Path) -> Config:
    """The config with absolute paths: paths are relative to the TOML file, and must not depend on the current folder."""
    data = config.data.model_copy(update={"manifest": str(folder / config.data.manifest)})
    detectors = []
    for detector in config.detectors:
        paths = detector.checkpoints
        if paths is not None:
            paths = _below(folder, paths) if isinstance(paths, str) else tuple(_below(folder, p) for p in paths)
        detectors.append(detector.model_copy(update={"checkpoints": paths}))
    training = config.training
    if training is not None:
        strategies = tuple(_absolute_strategy(strategy, folder) for strategy in training.strategies)
        manifest = None if training.manifest is None else str(folder / training.manifest)
        training = training.model_copy(update={"strategies": strategies, "manifest": manifest})
    return config.model_copy(update={"data": data, "detectors": tuple(detectors), "training": training})


def _below(folder: Path, pattern: str) -> str:
    """A path or pattern below a folder; the name of the folder itself is never a pattern."""
    path = folder / pattern
    exists = os.path.exists(path)  # noqa: PTH110 - False for a name that no file can have
    return str(path) if exists or Path(pattern).is_absolute() else str(Path(glob.escape(str(folder))) / pattern)


def _absolute_strategy(strategy: StrategyConfig, folder: Path) -> StrategyConfig:
    kind, colon, path = strategy.salience.partition(":")
    return strategy.model_copy(update={"salience": f"{kind}:{folder / path}"}) if colon else strategy
