"""Read the tensors of a checkpoint file without running code from it."""

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
from explain2me.text import printable, shorten

NESTS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
"""Keys under which training scripts save the state dict."""
PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.", "backbone.")
"""Prefixes that DataParallel, Lightning, torch.compile and wrapper modules put before every name."""
MAX_NESTS = 10
"""Maximum number of dicts around a state dict, and of prefixes before its names."""
MAX_BYTES = 64 * 2**30
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")
"""Prefixes of the auxiliary heads of Inception-v3 and GoogLeNet."""


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], str]:
    """The weights of a safetensors file or a file of ``torch.save`` by name, and its sha256; runs no code from it.

    Nesting and wrapper prefixes are removed.

    Raises:
        CheckpointError: the file is missing, empty or damaged, is no checkpoint, or holds more than tensors.
    """
    where = f"checkpoint {str(path)!r}"
    data = _read_bytes(path, where)
    tree = _read_safetensors(data, where) if _is_safetensors(data, path) else _read_pickle(data, where)
    state = _unnest(tree, where)
    for key, value in state.items():
        _check_tensor(value, f"{where}: {shorten(key)!r}", max_bytes=len(data))
    return _without_prefixes(state), hashlib.sha256(data).hexdigest()


def _read_bytes(path: Path, where: str) -> bytes:
    try:
        return read_bytes(path, max_bytes=MAX_BYTES)
    except ImageError as error:
        if error.kind == "missing":
            raise CheckpointError(f"{where} does not exist; give the path of a .safetensors or .pth file") from None
        if error.kind == "empty":
            raise CheckpointError(f"{where} is empty (0 bytes); save it again") from None
        raise CheckpointError(f"{where} cannot be read: {error.message}") from None


def _check_tensor(value: Tensor, where: str, *, max_bytes: int) -> None:
    """Refuse a tensor that is not dense, or that is larger than the file it comes from."""
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
        raise CheckpointError(
            f"{where} must be a dense tensor, got layout {value.layout}, quantized {value.is_quantized}, nested "
            f"{value.is_nested}, device {value.device}; save the state_dict() of the floating point model"
        )
    num_bytes = value.numel() * value.element_size()
    if num_bytes > max_bytes:
        raise CheckpointError(
            f"{where} would take {num_bytes} bytes, larger than the file ({max_bytes} bytes), so the file does not store "
            f"each of its values; save a clone() of it"
        )


def _is_safetensors(data: bytes, path: Path) -> bool:
    """Decide by the suffix or by the content: a header of JSON that starts at byte 8."""
    return path.suffix == ".safetensors" or data[8:9] == b"{"


def _read_safetensors(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        state = load_safetensors(data)
        header = data[8 : 8 + int.from_bytes(data[:8], "little")]
        json.loads(header, object_pairs_hook=_unique_names)
        return state
    except Exception as error:  # hostile bytes make the reader raise anything
        raise CheckpointError(f"{where} is not a valid safetensors file ({one_line(error)}); save it again") from None


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a repeated name: JSON does not define which of the two values counts."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"its header repeats a name among {shorten(', '.join(values))}")
    return values


def _read_pickle(data: bytes, where: str) -> Any:
    if data.startswith(b"PK"):
        _check_zip(data, where)
    try:
        with warnings.catch_warnings():  # torch warns of unusual pickles; the errors below are enough
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if refused_object := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{where} names the Python object {refused_object[1]} and is refused: only tensors are read, because other "
                f"objects could run code; load it where you trust it and save its state_dict() as safetensors"
            ) from None
        reason = str(error).partition("WeightsUnpickler error:")[2] or str(error)
        raise CheckpointError(
            f"{where} is not a checkpoint that torch.load(weights_only=True) can read ({one_line(reason)}); save the "
            f"model's state_dict() as safetensors"
        ) from None
    except Exception as error:  # hostile bytes make the reader raise anything
        raise CheckpointError(_unreadable(error, where)) from None


def _check_zip(data: bytes, where: str) -> None:
    """Refuse a zip file that repeats a member, or that unpacks to more bytes than it has."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            unpacked = sum(member.file_size for member in archive.infolist())
    except Exception as error:  # hostile bytes make the reader raise anything
        raise CheckpointError(_unreadable(error, where)) from None
    if len(set(names)) < len(names):
        raise CheckpointError(f"{where} holds two members of one name, so its content is ambiguous; save it again")
    if unpacked > len(data):
        raise CheckpointError(
            f"{where} would unpack to {unpacked} bytes, larger than the file ({len(data)} bytes); torch.save does not "
            f"compress: save it again with torch.save or as safetensors"
        )


def _unreadable(error: Exception, where: str) -> str:
    return (
        f"{where} is no whole checkpoint: expected a file of safetensors or torch.save, got one that cannot be read as such "
        f"({type(error).__name__}: {one_line(error)}); it may be cut off or another kind of file: save it again"
    )


def _unnest(tree: Any, where: str) -> dict[str, Tensor]:
    """Find the dict of tensors inside dicts such as ``{"epoch": 3, "state_dict": {...}}``."""
    for _ in range(MAX_NESTS):  # bounded, because a dict may hold itself
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
    raise CheckpointError(
        f"{where}: expected weights by name, or a dict with a state_dict, got {kind}; save the model's state_dict()"
    )


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the ``PREFIXES`` that all names share."""
    for _ in range(MAX_NESTS):
        prefix = next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), "")
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def first_few(names: list[str]) -> str:
    """The first three names in brackets, for a message; empty without names.

    >>> first_few(["a", "b", "c", "d"])
    " ('a', 'b', 'c', ...)"
    """
    if not names:
        return ""
    return f" ({', '.join(repr(shorten(name)) for name in names[:3])}{', ...' if len(names) > 3 else ''})"


def one_line(error: Exception | str) -> str:
    """The first line of an error, at most 160 characters, control characters escaped."""
    text = str(error).strip().split("\n")[0]
    return printable(text if len(text) <= 160 else f"{text[:157]}...")
