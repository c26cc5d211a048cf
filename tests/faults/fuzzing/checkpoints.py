"""Checkpoints as pickles, zips and safetensors, and changes of their structure."""

import contextlib
import io
import json
import os
import pickle
import pickletools
import random
import struct
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

from fuzzing.mutations import BLIND, NUMBERS, Outcome, check_error

SNIPPETS = (
    *(b"}q\x00X\x0a\x00\x00\x00state_dicth\x00s.", b"h\x00", b"q\x00", b"}", b"]", b"(", b")", b"t", b"R", b"b", b"s", b"u"),
    *(b"\x85", b"\x86", b"\x87", b"0", b"2", b"N", b"Q", b".", b"cbuiltins\nexec\n", b"cos\nsystem\n", b"ctorch\nnope\n"),
    *(b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8a\xff" + b"\x7f" * 255),
    *(b"X\xff\xff\xff\xff", b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nBoolStorage\n"),
    *(b"X\x07\x00\x00\x00module.", b"K\x00", b"M\xff\xff", b"G\x7f\xf8\x00\x00\x00\x00\x00\x00", b"ctorch\ndevice\n"),
)  # fmt: skip


class Deadly:
    """A pickle that ends the process which trusts it: a failure that cannot be overlooked."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (77,)


@cache
def tiny() -> str:
    """A real network of 500 weights, so that a change seldom falls into the numbers; its name for load_detector."""
    from timm.models import register_model
    from torch import nn

    class Tiny(nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, bias=False)
            self.norm = nn.BatchNorm2d(4)
            self.fc = nn.Linear(4, num_classes)
            self.pretrained_cfg = {"input_size": (3, 32, 32), "classifier": "fc"}

    def fuzz_tiny(pretrained: bool = False, *, num_classes: int = 10, **_: object) -> nn.Module:
        return Tiny(num_classes)

    register_model(fuzz_tiny)
    return "timm:fuzz_tiny"


@cache
def checkpoints() -> tuple[bytes, ...]:
    """Weights that fit in every container that is read, and two pickles with code."""
    import timm
    import torch
    from safetensors.torch import save

    torch.manual_seed(0)
    state = dict(timm.create_model(tiny().partition(":")[2], num_classes=2).state_dict())
    wrapped = {f"module.{key}": value for key, value in state.items()}
    nested = {"epoch": 3, "state_dict": wrapped, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    found = [save(state), save({key: value.bfloat16() for key, value in wrapped.items()}, {"format": "pt"})]
    for tree in (state, nested, {"model": state, "loss": torch.tensor(0.1)}):
        for new in (True, False):
            buffer = io.BytesIO()
            torch.save(tree, buffer, _use_new_zipfile_serialization=new)
            found.append(buffer.getvalue())
    buffer = io.BytesIO()
    torch.save({"state_dict": Deadly()}, buffer)
    return (*found, buffer.getvalue(), pickle.dumps({"state_dict": Deadly()}, protocol=2))


def change_checkpoint(data: bytes, rng: random.Random) -> bytes:
    if data.startswith(b"PK"):
        return change_zip(data, rng)
    if data[8:9] == b"{":
        return change_safetensors(data, rng)
    return change_pickle(data, rng)


def change_zip(data: bytes, rng: random.Random) -> bytes:
    """Another member, with its checksum made right again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    pickles = [i for i, (name, _) in enumerate(members) if name.endswith("data.pkl")]
    number = rng.choice((*pickles, *pickles, rng.randrange(len(members))))
    name, body = members[number]
    kind = rng.randrange(8)
    if kind <= 3:
        members[number] = (name, change_pickle(body, rng))
    elif kind == 4:
        changed = bytearray(body or b"\0")
        rng.choice(BLIND)(changed, rng)
        members[number] = (name, bytes(changed))
    elif kind == 5:
        members[number] = (rng.choice(("data.pkl", "../../x", "", "archive/data.pkl", name + "\0", "a" * 60000)), body)
    elif kind == 6:
        del members[number]
    else:
        members[number] = (name, bytes(rng.choice((10**6, 3 * 10**7))))
    buffer = io.BytesIO()
    how = zipfile.ZIP_DEFLATED if kind == 7 or rng.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, body in members:
            archive.writestr(zipfile.ZipInfo(name), body, how)
    return buffer.getvalue()


def change_pickle(data: bytes, rng: random.Random) -> bytes:
    """Other instructions, mostly where one begins."""
    changed = bytearray(data or b"\0")
    starts = [*instructions(data), len(data)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        number = rng.randrange(len(starts))
        start = starts[number] if rng.random() < 0.9 else rng.randrange(len(changed))
        stop = rng.choice((start, start, starts[min(number + rng.randint(0, 3), len(starts) - 1)]))
        other = rng.randrange(len(starts))
        own = data[starts[other] : starts[min(other + rng.randint(1, 8), len(starts) - 1)]]
        changed[start : max(start, stop)] = rng.choice((rng.choice(SNIPPETS), own))
    if rng.random() < 0.3:  # a number of elements, a side or a step, as protocol 2 writes them
        starts = [i for i, byte in enumerate(changed) if byte in b"KMJ"]
        if starts:
            start = rng.choice(starts)
            size = {ord("K"): 1, ord("M"): 2, ord("J"): 4}[changed[start]]
            changed[start : start + 1 + size] = b"J" + struct.pack("<I", rng.choice(NUMBERS) % 2**32)
    return bytes(changed)


def instructions(data: bytes) -> list[int]:
    """Where the instructions of a pickle begin, as far as it can be read; of every pickle of a legacy file."""
    stream = io.BytesIO(data)
    found: list[int] = []
    with contextlib.suppress(Exception):
        while True:
            found += [place for _, _, place in pickletools.genops(stream) if place is not None]
    return found or [0]


def change_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Another header: types, shapes, places, names, or not what it should be at all."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = rng.choice([key for key in header if key != "__metadata__"])
    odd: tuple[Any, ...] = (*NUMBERS, -1, 1.5, 10**30, None, "1", [], {}, True, 1e308)
    text = None
    kind = rng.randrange(9)
    if kind == 0:
        known = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL")
        known += ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "X", "", 7, None)
        header[name]["dtype"] = rng.choice(known)
    elif kind == 1:
        header[name]["shape"] = [rng.choice(odd) for _ in range(rng.randint(0, 4))] * rng.choice((1, 1, 1, 40))
    elif kind == 2:
        header[name]["data_offsets"] = [rng.choice((*odd, *range(64))) for _ in range(rng.choice((2, 2, 2, 0, 3)))]
    elif kind == 3:
        header[name] = rng.choice((*odd, dict(header)))
    elif kind == 4:
        new = rng.choice(
            ("", "module." * rng.choice((1, 3, 20000)), "\u0000", "\u202e" * 99, "__metadata__", "a" * 100000)
        )
        header = {(new + key if rng.random() < 0.9 else key): value for key, value in header.items()}
    elif kind == 5:
        header["__metadata__"] = rng.choice((*odd, {"a": 1}, {"a": {"b": "c"}}))
    elif kind == 6:
        text = rng.choice(("[" * 100000, '{"a":' * 5000, "{}", "null", '{"a"' + " " * 10**6, json.dumps(header) * 2))
    elif kind == 7:
        text = json.dumps(header)[:-1] + "," + json.dumps(header)[1:]  # every name twice
    body = data[8 + size :]
    if kind == 8:  # other sides for the same bytes
        count = 1
        for side in header[name]["shape"]:
            count *= side
        header[name]["shape"] = rng.choice(([count], [1, count], [count, 1, 1], [0, 2**63], [count, 2**32, 0]))
    written = (json.dumps(header) if text is None else text).encode("utf-8", "surrogatepass")
    length = rng.choice((len(written), len(written), len(written), *NUMBERS)) if rng.random() < 0.2 else len(written)
    return struct.pack("<Q", length) + written + body


def read_weights(data: bytes, rng: random.Random, folder: Path) -> Outcome:
    import torch

    from explain2me.detectors.load import load_detector
    from explain2me.errors import CheckpointError

    path = folder / f"weights{rng.choice(('.pth', '.pt', '.pkl', '.bin', '.safetensors'))}"
    path.write_bytes(data)
    try:
        detector = load_detector(tiny(), path, num_classes=rng.choice((None, 2)))
    except CheckpointError as error:
        check_error(error)
        kinds = (
            "could run code",
            "safetensors file",
            "not a checkpoint",
            "does not fit",
            "not finite",
            "expected weights",
        )
        kinds += ("cannot be read", "classes", "larger than")
        return next((kind for kind in kinds if kind in str(error)), "other")
    finally:
        path.unlink()
    assert all(torch.isfinite(value).all() for value in detector.model.state_dict().values())
    return "accepted"
