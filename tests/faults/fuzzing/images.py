"""Images of every format that is read, and changes of their structure."""

import io
import random
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

from fuzzing.mutations import (
    MAX_PIXELS,
    NUMBERS,
    Outcome,
    check_error,
    delete,
    duplicate,
    overwrite_bytes,
    overwrite_number,
)


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
