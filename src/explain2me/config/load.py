"""Read a TOML file, apply ``--set``, and check it."""

import glob
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from explain2me.config.mistakes import explain
from explain2me.config.schema import Config
from explain2me.config.training import TrainingConfig
from explain2me.errors import ConfigError
from explain2me.text import shorten

MAX_BYTES = 2**16
"""Of a config file: tomllib needs 20 s and 4 GB for a hostile key of this length, and four times as long for twice of it."""


def load_config(path: Path, sets: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply ``--set`` overrides, make its paths absolute, and check it.

    Args:
        path: of the file.
        sets: overrides such as ``measures.noise.levels=[0,0.1]``; the right side is TOML, or else a plain string.

    Raises:
        ConfigError: the file is missing or not TOML, or a key or value is wrong; the message names the key.
    """
    where = f"config {str(path)!r}"
    text = _read_text(path, where)
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not TOML, or a number of thousands of digits
        raise ConfigError(f"{where} is not valid TOML: {shorten(str(error))}") from None
    _apply_sets(tree, sets)
    return _absolute(parse_config(tree), path.resolve().parent)


def _read_text(path: Path, where: str) -> str:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ConfigError(f"{where} is a pipe or a device; give a TOML file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(
                f"{where} is larger than {MAX_BYTES} bytes; give a TOML file, with patterns for many files"
            )
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{where} does not exist; give the path of a TOML file") from None
    except IsADirectoryError:
        raise ConfigError(f"{where} is a folder; give a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} cannot be read as UTF-8 text: {error}") from None


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Check a parsed config; its mistakes become one line of a ConfigError."""
    try:
        _refuse_unprintable(tree, "config")
        return Config.model_validate(_tuples(tree))
    except ValidationError as error:
        raise ConfigError(f"config: {explain(error)}") from None
    except RecursionError:
        raise ConfigError("config: tables or arrays are nested too deep; no field needs that") from None


def _refuse_unprintable(node: Any, where: str) -> None:
    """Raise for a NUL character, which no file name can hold, and for a number that Python refuses to print."""
    if isinstance(node, str) and "\0" in node:
        raise ConfigError(f"{where}: {shorten(repr(node))} holds a NUL character; take it out")
    if isinstance(node, int) and node.bit_length() > 64:
        got = f"got one of {node.bit_length()} bits"
        raise ConfigError(f"{where}: expected a number below 2^64, {got}; give a smaller one")
    if isinstance(node, Mapping):
        for key, value in node.items():
            _refuse_unprintable(key, where)
            _refuse_unprintable(value, shorten(key if where == "config" else f"{where}.{key}"))
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            _refuse_unprintable(value, f"{where}.{i}")


def training_of(config: Config) -> TrainingConfig:
    """The table [training] of a config; a ConfigError where it has none."""
    if config.training is None:
        raise ConfigError(
            "training is missing: this config has nothing to train; add a table [training], or call `explain2me run`"
        )
    return config.training


def override(config: Config, sets: Sequence[str]) -> Config:
    """The same config with ``--set`` overrides applied; paths in it are kept as they are."""
    if not sets:
        return config
    tree = json.loads(config.model_dump_json())
    _apply_sets(tree, sets)
    return parse_config(tree)


def _tuples(tree: Any) -> Any:
    """TOML arrays to tuples: the models are strict and frozen."""
    if isinstance(tree, Mapping):
        return {key: _tuples(value) for key, value in tree.items()}
    return tuple(map(_tuples, tree)) if isinstance(tree, list) else tree


def _apply_sets(tree: dict[str, Any], sets: Sequence[str]) -> None:
    for item in sets:
        if len(item) > MAX_BYTES:
            raise ConfigError(f"--set {shorten(item)}: {len(item)} characters, expected at most {MAX_BYTES}")
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set: expected key=value, e.g. compute.batch_size=16, got {shorten(repr(item))}")
        _set(tree, key.strip().split("."), _parse_value(text, item), shorten(item))


def _set(node: Any, keys: list[str], value: Any, item: str) -> None:
    for i, key in enumerate(keys):
        place: Any = key
        if isinstance(node, list):
            if re.fullmatch("[0-9]{1,9}", key) and int(key) < len(node):
                place = int(key)
            elif len(node) == 1 and isinstance(node[0], dict):  # measures.noise.levels when there is one kind of noise
                node = node[0]
            else:
                todo = f"give a number below {len(node)}" if node else "give the whole list"
                raise ConfigError(f"--set {item}: {shorten(key)!r} is not an index of a list of {len(node)}; {todo}")
        if i == len(keys) - 1:
            node[place] = value
            return
        node = node[place] if isinstance(node, list) else node.setdefault(key, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {item}: {shorten('.'.join(keys[: i + 1]))} is a value, not a table")


def _parse_value(text: str, item: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()
    except (ValueError, RecursionError) as error:  # TOML, but thousands of digits or brackets
        raise ConfigError(f"--set {shorten(item)}: the value cannot be read: {shorten(error)}") from None


def _absolute(config: Config, folder: Path) -> Config:
    """Paths in the TOML file are relative to it; a run folder must not depend on where it was started from."""
    data = config.data.model_copy(update={"manifest": str(folder / config.data.manifest)})
    detectors = []
    for detector in config.detectors:
        paths = detector.checkpoints
        if paths is not None:
            paths = _below(folder, paths) if isinstance(paths, str) else tuple(_below(folder, p) for p in paths)
        detectors.append(detector.model_copy(update={"checkpoints": paths}))
    training = config.training
    if training is not None:
        strategies = []
        for strategy in training.strategies:
            kind, colon, path = strategy.salience.partition(":")
            salience = f"{kind}:{folder / path}" if colon else kind
            strategies.append(strategy.model_copy(update={"salience": salience}))
        manifest = None if training.manifest is None else str(folder / training.manifest)
        training = training.model_copy(update={"strategies": tuple(strategies), "manifest": manifest})
    return config.model_copy(update={"data": data, "detectors": tuple(detectors), "training": training})


def _below(folder: Path, pattern: str) -> str:
    """A path or pattern below a folder, whose own name is no pattern."""
    path = folder / pattern
    exists = os.path.exists(path)  # noqa: PTH110 - False for a name that no file can have
    return str(path) if exists or Path(pattern).is_absolute() else str(Path(glob.escape(str(folder))) / pattern)
