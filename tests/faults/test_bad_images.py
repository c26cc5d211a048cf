"""25 images of 1,000 are bad, each in its own way: each is named in the quarantine, and all others are scored."""

import hashlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from odd_files import make_socket, make_too_large, writes
from PIL import Image

from explain2me.images import decode

SIDE = 32
COUNT = 1000
TINY = 'device = "cpu"\nbatch_size = 64\nshard_size = 250'
ENTROPY = "noise = false\nresilience = false\nfocus = false\nstability = false"


def encoded(kind: str = "PNG", *, size: tuple[int, int] = (SIDE, SIDE), seed: int = 0, **options: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def pages() -> dict[str, Any]:
    return {"save_all": True, "append_images": [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue")]}


def without_checksum() -> bytes:
    data = bytearray(encoded())
    data[data.index(b"IDAT") + 20] ^= 255
    return bytes(data)


def zeroed() -> bytes:
    """A JPEG whose middle is zeros: every decoder takes it for a picture."""
    data = bytearray(encoded("JPEG"))
    start = data.index(b"\xff\xda") + 100
    data[start : start + 200] = bytes(200)
    return bytes(data)


WAYS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "absent": ("missing", lambda path: None),
    "link to nowhere": ("dangling_link", lambda path: path.symlink_to("nowhere.png")),
    "link to itself": ("dangling_link", lambda path: path.symlink_to(path.name)),
    "folder": ("not_regular", lambda path: path.mkdir()),
    "pipe": ("not_regular", lambda path: os.mkfifo(path)),
    "socket": ("not_regular", make_socket),
    "device": ("not_regular", lambda path: path.symlink_to("/dev/zero")),
    "no bytes": ("empty", writes(lambda: b"")),
    "half a gigabyte": ("too_many_bytes", make_too_large),
    "text": ("not_an_image", writes(lambda: b"<!DOCTYPE html><title>404</title>")),
    "zeros": ("not_an_image", writes(lambda: bytes(2000))),
    "PDF": ("format_not_allowed", writes(lambda: encoded("PDF"))),
    "EPS": ("format_not_allowed", writes(lambda: encoded("EPS"))),
    "SVG": ("format_not_allowed", writes(lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>')),
    "half a JPEG": ("truncated", writes(lambda: encoded("JPEG")[:800])),
    "half a PNG": ("truncated", writes(lambda: encoded()[:1500])),
    "half a WebP": ("truncated", writes(lambda: encoded("WEBP")[:200])),
    "wrong checksum": ("corrupt", writes(without_checksum)),
    "no frame": ("corrupt", writes(lambda: b"\xff\xd8\xff\xdb" + bytes(200))),
    "a million pixels and more": (
        "too_many_pixels",
        writes(lambda: encoded(size=(1100, 1000))),
    ),  # max_pixels is a million
    "4 x 4": ("too_small", writes(lambda: encoded(size=(4, 4)))),
    "film": ("animated", writes(lambda: encoded("GIF", **pages()))),
    "pages": ("animated", writes(lambda: encoded("TIFF", **pages()))),
    "floats": ("unknown_range", lambda path: Image.new("F", (SIDE, SIDE), 0.5).save(path, "TIFF")),
    "other bytes": ("hash_mismatch", writes(zeroed)),
}


@pytest.fixture
def thousand(tmp_path: Path) -> Path:
    """A manifest of 1,000 images; every fortieth is bad."""
    folder = tmp_path / "set"
    folder.mkdir()
    good = [encoded(kind, seed=seed) for seed in range(10) for kind in ("PNG", "JPEG")]
    lines = ["path,label,source,sha256"]
    ways = iter(WAYS.values())
    for i in range(COUNT):
        path = folder / f"{i:04d}.jpg"
        sha256 = ""
        if i % 40 == 7:
            kind, make = next(ways)
            make(path)
            sha256 = hashlib.sha256(encoded("JPEG")).hexdigest() if kind == "hash_mismatch" else ""
        else:
            path.write_bytes(good[i % len(good)])
        lines.append(f"{path.name},{'fake' if i % 2 else 'real'},s{i % 3},{sha256}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


def test_25_bad_images_of_1000(call, write_config, thousand, weights, detector_table, tmp_path):
    config = write_config(
        data=f'manifest = "{thousand}"\nmax_pixels = 1000000',
        detectors=detector_table("a", f"{weights}/seed0.safetensors", size=SIDE),
        measures=ENTROPY,
        compute=TINY,
    )
    code, _, errors = call("run", config, "-o", "run")
    assert code == 3
    assert errors.startswith(
        "explain2me: 25 of 1000 images are quarantined, more than data.allowed_quarantine = 0.01; first '"
    )
    assert errors.count("\n") == 1

    quarantine = pq.read_table(tmp_path / "run/quarantine").to_pylist()
    assert len(WAYS) == len(quarantine) == 25
    numbers = [i for i in range(COUNT) if i % 40 == 7]
    wanted = {f"{i:04d}.jpg": kind for i, (kind, _) in zip(numbers, WAYS.values(), strict=True)}
    assert {row["path"]: row["kind"] for row in quarantine} == wanted
    for row in quarantine:
        assert row["stage"] == "index"
        assert row["message"].startswith(repr(row["path"]) + ": ")
        assert row["message"].isprintable()

    images = pq.read_table(tmp_path / "run/images.parquet").to_pylist()
    assert {row["path"] for row in images} == {f"{i:04d}.jpg" for i in range(COUNT)} - set(wanted)
    maps = pq.read_table(tmp_path / "run/maps", columns=["image", "condition"])
    assert sorted(maps["image"].to_pylist()) == list(range(975))
    scores = pq.read_table(tmp_path / "run/scores").to_pylist()
    for variant in ("spatial", "intensity"):
        assert sorted(row["image"] for row in scores if row["variant"] == variant) == list(range(975))

    of_images = (decode.__doc__ or "").partition("MachineError")[0]
    known = set(re.findall(r"^``(\w+)`` +\S", of_images, re.MULTILINE))
    # there is no container here; test_crashes.py has images that end a process
    assert {row["kind"] for row in quarantine} == known - {"unreadable", "crash"}

    assert call("verify", "run")[0] == 0
    code, _, errors = call("run", config, "-o", "run", "--set", "data.allowed_quarantine=0.05")
    assert (code, errors) == (0, "")


def test_the_share_allowed_is_a_limit_not_a_strict_one(call, write_config, thousand, weights, detector_table):
    """25 of 1,000 are 0.025: allowed, and not one part in a million less."""
    config = write_config(
        data=f'manifest = "{thousand}"\nmax_pixels = 1000000',
        detectors=detector_table("a", f"{weights}/seed0.safetensors", size=SIDE),
        measures=ENTROPY,
        compute=TINY,
    )
    assert call("explain", config, "-o", "run", "--set", "data.allowed_quarantine=0.025")[0] == 0
    assert call("explain", config, "-o", "run", "--set", "data.allowed_quarantine=0.024999")[0] == 3
