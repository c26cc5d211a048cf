"""Pictures, files of them, and manifests, for the tests that read images."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from explain2me.errors import ImageError


def picture(width: int = 48, height: int = 32, *, seed: int = 0) -> Image.Image:
    """Smooth, coloured and without any symmetry."""
    corners = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_zeros(width: int, height: int) -> bytes:
    """A valid 1-bit PNG whose bytes are few whatever its size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    body = b"".join([packer.compress(row * 100) for _ in range(height // 100)] + [packer.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def pages() -> list[Image.Image]:
    return [picture(seed=seed) for seed in range(3)]


def kind_of(function: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        function()
    assert caught.value.message.isprintable(), "a message must hold no control character"
    return caught.value.kind, caught.value.message


def write_manifest(folder: Path, text: str | bytes) -> Path:
    manifest = folder / "manifest.csv"
    manifest.write_bytes(text.encode() if isinstance(text, str) else text)
    return manifest


def make_folder(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(picture()))
    return root
