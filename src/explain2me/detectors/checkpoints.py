"""Read a checkpoint safely: tensors only, whatever file they come in."""

import hashlib
import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from explain2me.errors import CheckpointError, ImageError
from explain2me.images.reading import read_bytes
from explain2me.text import shorten

NESTS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")


PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.", "backbone.")


MAX_NESTS = 10
"""Dicts around a state dict, and prefixes before its names."""
MAX_BYTES = 64 * 2**30
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], str]:
    """The weights in a file by their plain names, and the sha256 of the file; no code of the file is ever run.

    Raises:
        CheckpointError: missing, empty, damaged, not weights, or a pickle that holds more than tensors.
    """
    where = f"checkpoint {str(path)!r}"
    try:
        data = read_bytes(path, max_bytes=MAX_BYTES)
    except ImageError as error:
        if error.kind in ("missing", "dangling_link"):
            raise CheckpointError(f"{where} does not exist; give the path of a .safetensors or .pth file") from None
        if error.kind == "empty":
            raise CheckpointError(f"{where} is empty; save it again") from None
        raise CheckpointError(f"{where} cannot be read: {error.message}") from None
    tree = _read_safetensors(data, where) if _is_safetensors(data, path) else _read_pickle(data, where)
    state = _unnest(tree, where)
    for key, value in state.items():
        _check_tensor(value, f"{where}: {shorten(key)!r}", most_bytes=len(data))
    return _plain_names(state), hashlib.sha256(data).hexdigest()


def _check_tensor(value: Tensor, where: str, *, most_bytes: int) -> None:
    """Only what a model's own weights are: dense numbers that stand in the file, each of them."""
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
        raise CheckpointError(f"{where} is no dense tensor; save the state_dict() of the float model")
    if value.numel() * value.element_size() > most_bytes:
        raise CheckpointError(
            f"{where} would be {value.numel() * value.element_size()} bytes, larger than the file of {most_bytes}: it repeats few "
            f"numbers; save it again"
        )


def _is_safetensors(data: bytes, path: Path) -> bool:
    """By the content, since people rename files: a header length, then JSON."""
    return path.suffix == ".safetensors" or data[8:9] == b"{"


def _read_safetensors(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        state = load_safetensors(data)
        json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], object_pairs_hook=_without_repetition)
        return state
    except Exception as error:  # hostile bytes make the reader raise anything
        raise CheckpointError(f"{where} is not a valid safetensors file ({one_line(error)}); save it again") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Which of two weights of one name is meant is undefined."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name is there twice among {shorten(', '.join(found))}")
    return found


def _read_pickle(data: bytes, where: str) -> Any:
    if data.startswith(b"PK"):
        _check_zip(data, where)
    try:
        with warnings.catch_warnings():  # torch warns of odd pickles; what is wrong with them is said below
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported" in str(error):
            raise CheckpointError(
                f"{where} holds Python objects besides tensors and is refused, because loading it could run code"
                f"{_refused_object(error)}; load it where you trust it and save its state_dict() as safetensors"
            ) from None
        raise CheckpointError(f"{where} is not a checkpoint of torch.save or safetensors ({one_line(error)})") from None
    except Exception as error:  # hostile bytes make the reader raise anything
        raise CheckpointError(
            f"{where} cannot be read ({type(error).__name__}: {one_line(error)}); save it again"
        ) from None


def _check_zip(data: bytes, where: str) -> None:
    """``torch.save`` does not compress: a small file that unpacks to a large one was made to fill the memory."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            unpacked = sum(member.file_size for member in archive.infolist())
    except Exception as error:  # as above
        raise CheckpointError(
            f"{where} cannot be read ({type(error).__name__}: {one_line(error)}); save it again"
        ) from None
    if len(set(names)) < len(names):
        raise CheckpointError(f"{where} holds two members of one name, so what is in it is undefined; save it again")
    if unpacked > len(data):
        raise CheckpointError(
            f"{where} would unpack to {unpacked} bytes, larger than the file of {len(data)}: torch.save does not compress; "
            f"save it again"
        )


def _unnest(tree: Any, where: str) -> dict[str, Tensor]:
    """Down to the dict of tensors: ``{"epoch": 3, "state_dict": {...}}`` and the like."""
    for _ in range(MAX_NESTS):  # a dict may hold itself
        if not isinstance(tree, Mapping):
            break
        tensors = {key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, Tensor)}
        inner = next((tree[key] for key in NESTS if isinstance(tree.get(key), Mapping)), None)
        if tensors and inner is None:
            return tensors
        if inner is None:
            break
        tree = inner
    names = sorted(shorten(key) for key in tree if isinstance(key, str)) if isinstance(tree, Mapping) else []
    kind = f"a dict with the keys {names[:5]}" if isinstance(tree, Mapping) else f"a {type(tree).__name__}"
    raise CheckpointError(f"{where}: expected weights by name, or a dict with a state_dict, got {kind}")


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefixes that DataParallel, Lightning and torch.compile put before every name."""
    for _ in range(MAX_NESTS):
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _refused_object(error: Exception) -> str:
    """The name of the object that torch refused, in brackets."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" ({found[1]})" if found else ""


def first_few(names: list[str]) -> str:
    """The first three names in brackets, for a message."""
    return (
        f" ({', '.join(repr(shorten(name)) for name in names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    )


def one_line(error: Exception) -> str:
    """The first sentence of an error, without control characters."""
    text = str(error).strip().split("\n")[0]
    text = text if len(text) <= 160 else f"{text[:157]}..."
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
