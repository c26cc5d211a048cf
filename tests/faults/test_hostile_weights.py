"""Weights made to do harm: each is refused in one line, and no code in them runs."""

import io
import json
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refused import refused
from safetensors.torch import load_file, save

Call = Callable[..., tuple[int, str, str]]


State = dict[str, torch.Tensor]


SECONDS = 20
"""Enough for any refusal on a busy machine; what is refused would take minutes."""


class Runs:
    """Pickled, it is a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def saved(tree: object, *, new: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def with_member(data: bytes, name: str, body: bytes, *, keep: bool = False) -> bytes:
    """The same zip with one member replaced, or (``keep``) with a second one of its name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.namelist():
            if keep or not member.endswith(name):
                new.writestr(member, old.read(member))
            if member.endswith(name):
                new.writestr(zipfile.ZipInfo(member), body)
    return buffer.getvalue()


def hub(canary: Path) -> Runs:
    """A call of torch.hub.load for a folder: its hubconf.py is run."""
    folder = canary.parent / "hub"
    folder.mkdir(exist_ok=True)
    (folder / "hubconf.py").write_text(f"import os\nos.mkdir({str(canary)!r})\ndef entry():\n    return None\n")
    return Runs(run_hub, str(folder))


def run_hub(folder: str) -> object:
    return torch.hub.load(folder, "entry", source="local", trust_repo=True)


def touch(canary: Path) -> Runs:
    return Runs(os.system, f"touch {canary}")


def written_by_hand(canary: Path) -> bytes:
    return f"cos\nmkdir\n(V{canary}\ntR.".encode()


CODE: dict[str, tuple[str, Callable[[Path, State], bytes]]] = {
    "os.system": ("w.pt", lambda canary, state: saved({"state_dict": touch(canary)})),
    "exec": ("w.pth", lambda canary, state: saved(Runs(exec, f"import os; os.mkdir({str(canary)!r})"))),
    "beside good weights": ("w.pth", lambda canary, state: saved({"state_dict": state, "optimizer": touch(canary)})),
    "instead of a weight": ("w.pth", lambda canary, state: saved(state | {"fc.bias": touch(canary)})),
    "plain pickle": ("w.pkl", lambda canary, state: pickle.dumps(touch(canary))),
    "pickle of protocol 0": ("w.pkl", lambda canary, state: pickle.dumps(touch(canary), protocol=0)),
    "written by hand": ("w.bin", lambda canary, state: written_by_hand(canary)),
    "legacy": ("w.pth", lambda canary, state: saved({"state_dict": touch(canary)}, new=False)),
    "data.pkl replaced": (
        "w.pth", lambda canary, state: with_member(saved(state), "/data.pkl", pickle.dumps(touch(canary), protocol=2))
    ),
    "named .safetensors": ("w.safetensors", lambda canary, state: saved(touch(canary))),
    "torch.hub": ("w.pt", lambda canary, state: saved(hub(canary))),
    "a folder is made": ("w.pt", lambda canary, state: saved(Runs(os.mkdir, str(canary)))),
    "import": ("w.pt", lambda canary, state: saved(Runs(eval, f"__import__('pathlib').Path({str(canary)!r}).touch()"))),
    "a whole model": ("w.pt", lambda canary, state: saved({"model": torch.nn.Linear(2, 2), "then": touch(canary)})),
}  # fmt: skip


@pytest.fixture
def state(weights: Path) -> State:
    return load_file(weights / "seed0.safetensors")


@pytest.fixture
def check_weights(call: Call, write_config: Callable[..., Path], detector_table: Callable[..., str], tmp_path: Path):
    """`explain2me check` of one detector with these weights: (name, bytes) -> exit code, output, errors."""

    def check(name: str, data: bytes) -> tuple[int, str, str]:
        (tmp_path / name).write_bytes(data)
        table = detector_table("a", str(tmp_path / name))
        return call("check", write_config(detectors=table, measures="stability = false"))

    return check


def test_good_weights_pass(check_weights, state):
    assert check_weights("w.pth", saved(state))[0] == 0
    assert (
        check_weights("w2.pth", with_member(saved(state), "/nothing", b""))[0] == 0
    )  # the zips made here are in order


@pytest.mark.parametrize("name", CODE)
def test_code_in_weights_is_refused_and_never_run(check_weights, state, tmp_path, name):
    canary = tmp_path / "canary"
    file_name, make = CODE[name]
    data = make(canary, state)
    assert not canary.exists()
    refused(check_weights(file_name, data), "w.")
    assert not canary.exists()
    if name == "written by hand" or file_name.endswith(".pkl"):  # who trusts such a file runs it
        pickle.loads(data)
    else:
        torch.load(io.BytesIO(data), weights_only=False)
    assert canary.exists()


def safetensors(change: Callable[[dict[str, Any]], object]) -> Callable[[State], bytes]:
    """A file whose header was changed."""

    def make(state: State) -> bytes:
        data = save(state)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        return with_header(json.dumps(header).encode(), data[8 + size :])

    return make


def with_header(header: bytes, body: bytes = b"", *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def repeated(state: State) -> bytes:
    data = save(state)
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    return with_header(header[:-1] + b"," + header[1:], data[8 + size :])


def bomb(state: State) -> bytes:
    """200 MB of zeros where a weight should be, in 1 MB."""
    data = saved(state)
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for member in old.namelist():
            with new.open(member, "w") as file:
                for _ in range(20 if member.endswith("/data/0") else 0):
                    file.write(bytes(10**7))
                file.write(old.read(member))
    return buffer.getvalue()


DAMAGED: dict[str, tuple[str, Callable[[State], bytes], str]] = {
    "header longer than the file": (
        "w.safetensors", lambda state: with_header(b"{}", length=2**62), "is not a valid safetensors file"
    ),
    "header of 100 MB, by its length": (
        "w.safetensors", lambda state: with_header(b"{}", length=10**8), "is not a valid safetensors file"
    ),
    "header is no JSON": ("w.safetensors", lambda state: with_header(b"{not json"), "is not a valid safetensors file"),
    "header nested": ("w.pt", lambda state: with_header(b'{"a":' * 10**5), "is not a valid safetensors file"),
    "offsets overlap": (
        "w.safetensors",
        safetensors(lambda header: header["fc.bias"].update(data_offsets=header["fc.weight"]["data_offsets"])),
        "is not a valid safetensors file",
    ),
    "offsets beyond the end": (
        "w.safetensors",
        safetensors(lambda header: header["fc.bias"].update(data_offsets=[2**40, 2**40 + 8])),
        "is not a valid safetensors file",
    ),
    "offsets backwards": (
        "w.safetensors",
        safetensors(lambda header: header["fc.bias"].update(data_offsets=header["fc.bias"]["data_offsets"][::-1])),
        "is not a valid safetensors file",
    ),
    "shape of 2^64": (
        "w.safetensors", safetensors(lambda header: header["fc.bias"].update(shape=[2**33, 2**33])), "safetensors file"
    ),
    "another type": (
        "w.safetensors", safetensors(lambda header: header["fc.bias"].update(dtype="I32")), "must hold floating point"
    ),
    "unknown type": (
        "w.safetensors", safetensors(lambda header: header["fc.bias"].update(dtype="F31")), "safetensors file"
    ),
    "every name twice": ("w.safetensors", repeated, "safetensors file"),
    "names of a megabyte": (
        "w.safetensors",
        safetensors(lambda header: header.update({"\x1b[2J" * 10**5: header.pop("fc.bias")})),
        "1 of 92 weights are missing ('fc.bias') and 1 are unknown",
    ),
    "zip bomb": ("w.pth", bomb, "would unpack to 20"),
    "two members of one name": (
        "w.pth", lambda state: with_member(saved(state), "/data.pkl", b"N.", keep=True), "two members of one name"
    ),
    "holds itself": (
        "w.pth", lambda state: b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dictq\x01h\x00s.", "checkpoint"
    ),
    "a billion classes": (
        "w.pth",
        lambda state: saved(state | {"fc.weight": torch.zeros(1).as_strided((10**9, 96), (0, 0))}),
        "larger than the file",
    ),
    "cut off": ("w.pth", lambda state: saved(state)[:-200], "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_damaged_weights_are_refused(check_weights, state, name):
    file_name, make, message = DAMAGED[name]
    data = make(state)
    started = time.monotonic()
    refused(check_weights(file_name, data), message)
    assert time.monotonic() - started < SECONDS
