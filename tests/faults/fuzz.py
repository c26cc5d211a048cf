"""Mutated images, configs and checkpoints: each is read or refused in one clear error, in seconds and in bounded memory.

    python tests/faults/fuzz.py --count 10000 --seed 0 [images] [configs] [checkpoints]
    python tests/faults/fuzz.py --seed 0 images --only 4711

Input i of a kind depends on (seed, kind, i) only. A child process with a limit on its memory reads them; one that hangs or
dies is replaced, and its input counts as a failure. Exit code 1 when an input failed.
"""

import argparse
import contextlib
import faulthandler
import importlib
import io
import json
import os
import pickle
import pickletools
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

SECONDS = 5.0
MEMORY = 1536 * 2**20
MAX_PIXELS = 4_000_000
TOO_LATE = 1
"""The exit code that faulthandler gives."""
MOST_CHARACTERS = 4000
"""Of an error: more is not one clear line."""

Outcome = str  # "accepted", or the kind of the refusal


# ------------------------------------------------------------------------------------------------------------- mutations

NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 16383, 32767, 32768, 60000, 65535, 65536)
NUMBERS += (2**24, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)


def flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        data[place(data, rng)] ^= 1 << rng.randrange(8)


def overwrite_bytes(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 16)):
        data[place(data, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))


def overwrite_number(data: bytearray, rng: random.Random) -> None:
    """Lengths, counts, offsets and sides are numbers of 2, 4 or 8 bytes."""
    size = rng.choice((2, 4, 8))
    start = place(data, rng)
    number = rng.choice((*NUMBERS, len(data), len(data) - 1, len(data) + 1)) % 2 ** (8 * size)
    data[start : start + size] = number.to_bytes(size, rng.choice(("little", "big")))


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[place(data, rng) :]


def insert(data: bytearray, rng: random.Random) -> None:
    start = place(data, rng)
    data[start:start] = rng.choice((rng.randbytes(rng.randint(1, 64)), bytes(rng.randint(1, 4096)), b"\xff" * 300))


def delete(data: bytearray, rng: random.Random) -> None:
    start = place(data, rng)
    del data[start : start + rng.randint(1, 64)]


def duplicate(data: bytearray, rng: random.Random) -> None:
    start = place(data, rng)
    block = data[start : start + rng.randint(1, 512)]
    data[start:start] = block * rng.choice((1, 1, 2, 50))


def place(data: bytearray, rng: random.Random) -> int:
    """Often in the header, sometimes at the end (zip keeps its list of files there), else anywhere."""
    size = max(1, len(data))
    return rng.choice((rng.randrange(min(size, 96)), size - 1 - rng.randrange(min(size, 96)), rng.randrange(size)))


BLIND = (flip_bits, overwrite_bytes, overwrite_number, truncate, insert, delete, duplicate)


def mutate(
    corpus: Sequence[bytes],
    aware: Callable[[bytes, random.Random], bytes],
    rng: random.Random,
    *,
    share: float = 0.5,
) -> bytes:
    """One item of the corpus after a change that knows its format (``share``), some that do not, or both."""
    data = rng.choice(corpus)
    if rng.random() < share:
        data = aware(data, rng)
        if rng.random() < share:
            return data
    if rng.random() < 0.1:
        other = rng.choice(corpus)
        data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(BLIND)(changed, rng)
        changed = changed or bytearray(b"\0")
    return bytes(changed)


# ---------------------------------------------------------------------------------------------------------------- images


@cache
def images() -> tuple[bytes, ...]:
    """Small images of every format and of most of their flavours."""
    from PIL import Image

    colour = Image.frombytes("RGB", (6, 5), random.Random(0).randbytes(90)).resize((48, 32))
    exif = Image.Exif()
    exif[274], exif[305] = 6, "fuzz"
    grey = colour.convert("L")
    deep = Image.frombytes("I;16", (48, 32), random.Random(1).randbytes(2 * 48 * 32))

    def pages() -> dict[str, Any]:  # new ones each time: a saved image remembers settings of its encoder
        return {"save_all": True, "append_images": [colour.rotate(90), colour.rotate(180)]}

    wanted: list[tuple[Any, str, dict[str, Any]]] = [
        *((colour, "JPEG", {"quality": 60, "progressive": flag, "exif": exif}) for flag in (False, True)),
        (colour, "JPEG", {"subsampling": 0, "optimize": True, "restart_marker_blocks": 2}),
        (grey, "JPEG", {}), (colour.convert("CMYK"), "JPEG", {}), (colour, "MPO", pages()),
        *((colour.convert(mode), "PNG", {}) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")), (deep, "PNG", {}),
        (colour.quantize(16), "PNG", {"transparency": bytes(range(16)), "exif": exif}), (colour, "PNG", pages()),
        (colour.quantize(16), "GIF", {"transparency": 3}), (colour.quantize(16), "GIF", {"interlace": 0}),
        (colour.quantize(16), "GIF", pages()), *((colour.convert(mode), "BMP", {}) for mode in ("RGB", "L", "1", "P")),
        (colour, "WEBP", {"quality": 50}), (colour.convert("RGBA"), "WEBP", {"lossless": True, "exif": exif}),
        (colour, "WEBP", pages()), (deep, "TIFF", {}), (colour.convert("CMYK"), "TIFF", {}), (colour, "TIFF", pages()),
        (Image.new("F", (16, 16), 0.5), "TIFF", {}), (grey.convert("1"), "TIFF", {"compression": "group4"}),
        *((colour, "TIFF", {"compression": f"tiff_{name}"}) for name in ("lzw", "adobe_deflate", "jpeg", "packbits")),
        (colour, "TIFF", {"compression": "raw", "tiffinfo": {278: 4}}), (colour, "TIFF", {"big_tiff": True}),
        (colour.convert("YCbCr"), "TIFF", {"compression": "jpeg"}), (colour.convert("LAB"), "TIFF", {}),
    ]  # fmt: skip
    found = []
    for image, kind, options in wanted:
        buffer = io.BytesIO()
        image.copy().save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return tuple(found)


def change_image(data: bytes, rng: random.Random) -> bytes:
    """A field of the container, with the checksums that hide it made right again."""
    if data.startswith(b"\x89PNG"):
        return change_png(data, rng)
    if data[:2] in (b"II", b"MM"):
        return change_tiff(data, rng)
    if data.startswith(b"\xff\xd8"):
        return change_jpeg(data, rng)
    sides = {b"GI": (6, 2, 2), b"BM": (18, 4, 2), b"RI": (24, 3, 2)}.get(data[:2])
    if sides is None:
        return data
    start, size, count = sides
    changed = bytearray(data)
    for i in range(count):
        changed[start + i * size : start + (i + 1) * size] = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(
            size, "little"
        )
    return bytes(changed)


def change_png(data: bytes, rng: random.Random) -> bytes:
    chunks = []
    start = 8
    while start + 12 <= len(data):
        length = int.from_bytes(data[start : start + 4], "big")
        chunks.append((data[start + 4 : start + 8], data[start + 8 : start + 8 + length]))
        start += 12 + length
    number = rng.choice((0, rng.randrange(len(chunks))))
    name, body = chunks[number]
    changed = bytearray(body or b"\0")
    rng.choice((overwrite_number, overwrite_bytes, delete, duplicate))(changed, rng)
    chunks[number] = (rng.choice((name, name, name, b"zTXt", b"iCCP", b"eXIf", b"fdAT")), bytes(changed))
    if rng.random() < 0.3:
        chunks.insert(
            rng.randrange(len(chunks)), rng.choice((*chunks, (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6)))))
        )
    written = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return data[:8] + b"".join(written)


def change_tiff(data: bytes, rng: random.Random) -> bytes:
    """A field of the first directory: its tag, type, count or value."""
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    if data[2 if order == "<" else 3] != 42 or start + 14 > len(data):
        return data
    (count,) = struct.unpack_from(f"{order}H", data, start)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        entry = start + 2 + 12 * rng.randrange(count)
        if entry + 12 > len(data):
            break
        what, place = rng.choice((("H", 0), ("H", 2), ("I", 4), ("I", 8), ("I", 8), ("I", 8)))
        known = (256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 322, 323, 324, 325, 338, 339, 347, 530)
        number = rng.choice(known if place == 0 else range(20) if place == 2 else (*NUMBERS, start, len(data)))
        struct.pack_into(f"{order}{what}", changed, entry + place, number % 2 ** (16 if what == "H" else 32))
    return bytes(changed)


def change_jpeg(data: bytes, rng: random.Random) -> bytes:
    """The sides of the frame, or segments that are repeated, also very often."""
    marks = [
        i for i in range(2, len(data) - 4) if data[i] == 0xFF and 0xC0 <= data[i + 1] <= 0xFE and data[i + 1] != 0xD0
    ]
    frames = [i for i in marks if data[i + 1] in (0xC0, 0xC1, 0xC2)]
    changed = bytearray(data)
    if frames and rng.random() < 0.5:
        struct.pack_into(">HH", changed, frames[0] + 5, rng.choice((32, 2000, 65535)), rng.choice((48, 2000, 65535)))
        if rng.random() < 0.5:
            return bytes(changed)
    first, last = sorted(rng.choices([*marks, len(data)], k=2))
    scans = [i for i in marks if data[i + 1] == 0xDA]
    if scans and rng.random() < 0.3:
        first = rng.choice(scans)
        last = min((i for i in marks if i > first), default=len(data) - 2)
    changed[last:last] = changed[first:last] * rng.choice((1, 5, 200))
    return bytes(changed)


def read_image(data: bytes, rng: random.Random, folder: Path) -> Outcome:
    import numpy as np

    from explain2me.errors import ImageError
    from explain2me.images.decode import decode_image, examine_file

    path = folder / "image.jpg"
    path.write_bytes(data)
    try:
        width, height, _ = examine_file(path, max_pixels=MAX_PIXELS)
    except ImageError as error:
        check_error(error)
        return error.kind
    pixels = decode_image(data, max_pixels=MAX_PIXELS)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (height, width, 3)
    assert width * height <= MAX_PIXELS
    return "accepted"


# --------------------------------------------------------------------------------------------------------------- configs

EVERY_FIELD = """
name = "full"
seed = 3
[data]
manifest = "faces/manifest.csv"
split = "test"
positive = "fake"
sample = {camera = 3, gan = 4}
classes = ["real", "fake"]
max_pixels = 1000000
allowed_quarantine = 0.05
[[detectors]]
name = "one"
architecture = "timm:resnet50"
checkpoints = ["weights/*.safetensors", "more/a.pth"]
layer = "layer4"
input_size = [224, 160]
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
interpolation = "bicubic"
[[detectors]]
name = "two"
architecture = "torchvision:densenet121"
random_runs = 2
input_size = 96
[salience]
method = "gradcam"
target = "predicted"
[measures]
entropy = true
noise = [{kind = "salt_pepper", levels = [0.05, 0.1]}, {kind = "gaussian", levels = [20]}]
resilience = true
focus = false
stability = true
similarity = ["ssim", "pearson"]
[summary]
bootstrap = 100
[report]
after_run = false
images = 3
colormap = "jet"
[compute]
device = "cuda:1"
precision = "bfloat16"
batch_size = 8
shard_size = 64
workers = 2
threads = 1
[training]
architectures = ["timm:resnet18"]
runs = 2
manifest = "train.csv"
split = "train"
validation_share = 0.1
sample = 100
pretrained = true
input_size = 224
epochs = 3
batch_size = 4
class_balance = "weights"
monitor = "auroc"
patience = 2
checkpoint = "last"
devices = 1
loaders = 2
loggers = ["tensorboard"]
[[training.strategies]]
name = "cyborg"
loss = "cyborg"
alpha = 0.3
cam_class = "true"
entropy_weight = 0.1
salience = "mean-of:maps"
[training.optimizer]
name = "adamw"
learning_rate = 1e-3
momentum = 0.8
weight_decay = 0.01
schedule = "cosine"
step_epochs = 2
step_factor = 0.5
warmup_epochs = 1
gradient_clip = 1.0
[training.augmentation]
flip = true
crop = 0.8
shift = 0.1
"""
ABSURD = (
    *("1", "2", "8", "0.5", "0.25", '"fake"', '"cpu"', "[0.5]", "[96, 96]", "false"),
    *("nan", "inf", "-inf", "-0.0", "1e999", "-1", "0", "1e-320", "true", "[]", "{}", '""', "''", "1979-05-27T07:32:00Z"),
    *("07:32:00", "0xffffffffffffffffffffff", "9" * 30, "9" * 5000, "-" + "9" * 4400, "0x" + "f" * 6000, "1e" + "9" * 400),
    *("[" * 50 + "]" * 50, "[" * 400 + "]" * 400, "[" * 20000, "{a=" * 60 + "1" + "}" * 60, "{a=" * 3000, "[[[[{a=[{b=1}]}]]]]"),
    *('"\\u0000"', '"\\u001b[2J"', '"\\U0001F600"', '"\\ud800"', '"' + "x" * 50000 + '"', '"' + "../" * 300 + '"', '"/dev/zero"'),
    *("[1" + ",1" * 20000 + "]", '["a"' + ',"a"' * 2000 + "]", "[[1,2],[3,4]]", "[nan]", "[0x" + "f" * 6000 + "]"),
    *('"cuda:' + "9" * 5000 + '"', '"cuda:٣"', '"mean-of:\\u0000"', '"timm:' + "x" * 3000 + '"', '{kind="gaussian",levels=[1e308]}'),
    *("{" + ",".join(f"k{i}=1" for i in range(3000)) + "}", '"""\n\n"""', "1__0", "+.5", "0b2", "\x00", "\ufeff", "'''"),
)  # fmt: skip
KEYS = (
    *("data", "name", "x", '""', "'\u200b'", '"\\u0000"', "a" * 60000, ".".join("a" * 5000), ".".join("a" * 100_000), "a.b.c", "detectors", "seed"),
    *("training", "training.strategies", "measures.noise", "compute", "data.sample", '"data.manifest"', "__class__"),
)  # fmt: skip


@cache
def configs() -> tuple[bytes, ...]:
    """The examples, and one config with every field."""
    examples = Path(__file__).resolve().parents[2] / "examples"
    return (*(path.read_bytes() for path in sorted(examples.glob("*.toml"))), EVERY_FIELD.encode())


def change_config(data: bytes, rng: random.Random) -> bytes:
    """Another value, another key, or another table."""
    lines = data.decode().splitlines()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        number = rng.randrange(len(lines))
        key, equals, value = lines[number].partition("=")
        kind = rng.randrange(6)
        if kind <= 2 and equals:
            lines[number] = f"{key}= {rng.choice(ABSURD)}"
        elif kind == 3:
            lines[number] = f"{rng.choice(KEYS)} {equals or '='} {value or '1'}"
        elif kind == 4:
            lines.insert(number, rng.choice((f"[{rng.choice(KEYS)}]", f"[[{rng.choice(KEYS)}]]", rng.choice(lines))))
        else:
            lines[number] = rng.choice(("", f"{rng.choice(KEYS)} = {rng.choice(ABSURD)}", lines[number] * 2))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def random_sets(rng: random.Random) -> list[str]:
    """What stands behind --set, often nothing."""
    names = ("seed", "name", "data.manifest", "data.sample", "measures.noise.levels", "measures.noise.0.kind")
    names += ("detectors.0.input_size", "detectors.checkpoints", "compute.device", "training.strategies.alpha", "")
    names += (
        "training.optimizer",
        "measures",
        "a" * 3000,
        ".".join("ab" * 3000),
        "detectors." + "9" * 5000,
        "detectors.²",
    )
    return [
        rng.choice(
            (f"{rng.choice(names)}={rng.choice(ABSURD)}", rng.choice(ABSURD), f"{rng.choice(names)}={rng.random()}")
        )
        for _ in range(rng.choice((0, 0, 0, 0, 1, 2)))
    ]


def read_config(data: bytes, rng: random.Random, folder: Path) -> Outcome:
    from explain2me.config.compare import digest, fingerprint
    from explain2me.config.load import load_config, override
    from explain2me.errors import ConfigError

    path = folder / "config.toml"
    path.write_bytes(data)
    try:
        config = load_config(path, random_sets(rng))
        digest(fingerprint(override(config, random_sets(rng))))
    except ConfigError as error:
        check_error(error)
        text = str(error)
        kinds = (
            "not valid TOML",
            "UTF-8",
            "--set",
            "unknown key",
            "unknown value",
            "is missing",
            "input should",
            "expected",
        )
        return next((kind for kind in kinds if kind in text), "other")
    return "accepted"


# ----------------------------------------------------------------------------------------------------------- checkpoints

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


# ------------------------------------------------------------------------------------------------------ parent and child


def read_broken(data: bytes, rng: random.Random, folder: Path) -> Outcome:
    """Everything that a reader must not do: shows that this script sees it."""
    match data:
        case b"raises":
            raise KeyError(data)
        case b"hangs":
            while True:
                time.sleep(0.01)
        case b"dies":
            os.abort()
        case b"grows":
            bytes(2 * MEMORY)
        case b"hides":
            try:
                try:
                    bytes(2 * MEMORY)
                except MemoryError:
                    raise ValueError("refused") from None
            except ValueError as error:
                check_error(error)
    return "accepted"


BROKEN = (b"fine", b"raises", b"hangs", b"dies", b"grows", b"hides")
Make = Callable[[random.Random, int], bytes]
KINDS: dict[str, tuple[Make, Callable[[bytes, random.Random, Path], Outcome], tuple[str, ...]]] = {
    "images": (lambda rng, _: mutate(images(), change_image, rng), read_image, ("explain2me.images.decode",)),
    "configs": (lambda rng, _: mutate(configs(), change_config, rng, share=0.9), read_config, ("explain2me.config.schema",)),
    "checkpoints": (
        lambda rng, _: mutate(checkpoints(), change_checkpoint, rng, share=0.8), read_weights, ("explain2me.detectors.load",)
    ),
    "broken": (lambda _, index: BROKEN[index % len(BROKEN)], read_broken, ()),
}  # fmt: skip


def check_error(error: Exception) -> None:
    """One line of bearable length, and not the end of memory in disguise."""
    assert len(str(error)) <= MOST_CHARACTERS, f"an error of {len(str(error))} characters: {str(error)[:300]}"
    cause: BaseException | None = error
    while cause is not None:
        assert not isinstance(cause, MemoryError), f"more than {MEMORY >> 20} MiB were asked for: {error}"
        cause = cause.__cause__ or cause.__context__


def child(kind: str, indices: range, seed: int, seconds: float) -> None:
    """Read the inputs one after the other, and say before each which it is."""
    make, read, modules = KINDS[kind]
    for module in modules:
        importlib.import_module(module)
    make(random.Random(0), 0)  # makes the corpus, and loads what Pillow and torch load late
    faulthandler.enable()
    baseline = Path("/proc/self/statm").read_text().split() if Path("/proc/self/statm").exists() else ["0", "0"]
    size, resident = (int(pages) * resource.getpagesize() for pages in baseline[:2])
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        for index in indices:
            rng = random.Random(f"{seed} {kind} {index}")
            with warnings.catch_warnings(action="ignore"):  # zipfile, of names that are there twice
                data = make(rng, index)
            tell({"start": index})
            faulthandler.dump_traceback_later(seconds, exit=True)
            started = time.monotonic()
            failure, outcome = "", ""
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    outcome = read(data, rng, Path(folder))
                assert not said, f"a warning reached the user: {said[0].message}"
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"[:400]
                traceback.print_exc()
            took = time.monotonic() - started
            faulthandler.cancel_dump_traceback_later()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
            tell({"end": index, "outcome": outcome, "failure": failure, "seconds": took, "peak": peak})


def tell(words: dict[str, Any]) -> None:
    print(json.dumps(words), flush=True)


@dataclass
class Tally:
    """What came of the inputs of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, -1)
    peak: int = 0


def fuzz(kind: str, indices: range, seed: int, seconds: float) -> Tally:
    """Every input, whatever becomes of the children. A machine can stall: what took too long is tried once more."""
    tally = Tally()
    left = indices
    late = -1
    while left:
        at = None
        code = [0]
        for words in lines_of_child(kind, left, seed, seconds, code):
            if "start" in words:
                at = words["start"]
                continue
            index, at = words["end"], None
            left = range(index + 1, indices.stop)
            if words["failure"]:
                tally.failures[index] = words["failure"]
            else:
                tally.outcomes[words["outcome"]] += 1
            tally.slowest = max(tally.slowest, (words["seconds"], index))
            tally.peak = max(tally.peak, words["peak"])
        if not left:
            break
        if at is None:
            raise SystemExit(f"{kind}: the child ended between two inputs, at {left.start}")
        if code[0] == TOO_LATE and at != late:
            late = at
            left = range(at, indices.stop)
            continue
        tally.failures[at] = (
            f"longer than {seconds} s, twice" if code[0] == TOO_LATE else f"died ({code[0]}); see above"
        )
        left = range(at + 1, indices.stop)
    return tally


def lines_of_child(kind: str, indices: range, seed: int, seconds: float, code: list[int]) -> Iterator[dict[str, Any]]:
    """What a child says; its exit code goes into ``code`` at the end."""
    numbers = [str(number) for number in (indices.start, indices.stop, seed, seconds)]
    command = [sys.executable, __file__, "--child", kind, *numbers]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    code[0] = process.returncode


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        kind, start, stop, seed, seconds = sys.argv[2:]
        child(kind, range(int(start), int(stop)), int(seed), float(seconds))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "kinds", nargs="*", choices=[*KINDS, []], metavar="KIND", help="images, configs, checkpoints; default: all"
    )
    parser.add_argument("--count", type=int, default=10_000, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="INDEX", help="this input alone")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="longest time for one input")
    options = parser.parse_args()
    indices = range(options.count) if options.only is None else range(options.only, options.only + 1)
    failed = 0
    for kind in options.kinds or ("images", "configs", "checkpoints"):
        tally = fuzz(kind, indices, options.seed, options.seconds)
        refused = tally.outcomes.total() - tally.outcomes["accepted"]
        print(
            f"{kind}: {len(indices)} inputs, {tally.outcomes['accepted']} accepted, {refused} refused, "
            f"{len(tally.failures)} failed; slowest {tally.slowest[0]:.2f} s (input {tally.slowest[1]}), "
            f"at most {tally.peak / 2**20:.0f} MiB more than at the start"
        )
        print(
            "  refused: " + ", ".join(f"{name} {n}" for name, n in tally.outcomes.most_common() if name != "accepted")
        )
        for index, failure in tally.failures.items():
            print(
                f"  FAILED {failure}\n    again: python tests/faults/fuzz.py --seed {options.seed} {kind} --only {index}"
            )
        failed += len(tally.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
