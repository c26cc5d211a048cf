"""Images and settings made to do harm: each is refused in one line, before it takes time or memory."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from refused import refused

SECONDS = 20
"""Enough for any refusal on a busy machine; what is refused would take minutes."""


def picture(side: int = 96, *, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytearray:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return bytearray(buffer.getvalue())


def png_bomb() -> bytes:
    """60,000 x 60,000 pixels of one bit."""
    packer = zlib.compressobj(9)
    first, again = (packer.compress(bytes(7501 * 1000)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    body = first + again * 59 + packer.flush()
    chunks = (b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")
    written = [struct.pack(">I", len(b)) + name + b + struct.pack(">I", zlib.crc32(name + b)) for name, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def gif_bomb() -> bytes:
    data = encoded(picture().quantize(4), "GIF")
    data[6:10] = struct.pack("<HH", 65_535, 65_535)
    return bytes(data)


def webp_bomb() -> bytes:
    data = encoded(picture(), "WEBP", lossless=True)
    start = data.index(b"VP8L") + 9
    data[start : start + 4] = struct.pack("<I", 16_382 | 16_382 << 14)
    return bytes(data)


def tiff_bomb() -> bytes:
    data = encoded(picture(), "TIFF", compression="tiff_adobe_deflate")
    for tag in (256, 257):  # ImageWidth, ImageLength
        entry = next(
            i for i in range(len(data)) if struct.unpack_from("<H", data, i)[0] == tag and data[i + 2] in (3, 4)
        )
        struct.pack_into("<HI", data, entry + 2, 4, 1)
        struct.pack_into("<I", data, entry + 8, 60_000)
    return bytes(data)


def jpeg_of_scans() -> bytes:
    """A progressive photograph whose last scan is repeated: each repetition costs a pass over 49 million pixels."""
    data = encoded(Image.new("L", (7000, 7000)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return bytes(data[:-2] + data[last:-2] * 3000 + data[-2:])


BOMBS = {
    "PNG": (png_bomb, "pixels"),
    "GIF": (gif_bomb, "pixels"),
    "WebP": (webp_bomb, "pixels"),
    "TIFF": (tiff_bomb, "pixels"),
    "JPEG of 3,000 scans": (jpeg_of_scans, "more than 100 scans"),
    "a zip": (lambda: b"PK\3\4" + bytes(1000), "archive is not read"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_go_off(call, write_config, tmp_path, name):
    make, message = BOMBS[name]
    data = make()
    assert len(data) < 2_000_000
    for label in ("real", "fake"):
        (tmp_path / f"{label}.png").write_bytes(data)
    (tmp_path / "bombs.csv").write_text("path,label\nreal.png,real\nfake.png,fake\n")
    started = time.monotonic()
    refused(call("run", write_config(data='manifest = "bombs.csv"'), "-o", "run"), message)
    assert time.monotonic() - started < SECONDS


def test_a_photograph_of_many_pictures_has_few_scans(tmp_path):
    """Only those of the picture that is taken count."""
    from explain2me.images.decode import MAX_SCANS, decode_image

    pages = [picture(16, seed=i) for i in range(30)]
    data = encoded(pages[0], "MPO", save_all=True, append_images=pages[1:], progressive=True)
    assert data.count(b"\xff\xda") > MAX_SCANS
    assert decode_image(bytes(data)).shape == (16, 16, 3)


ABSURD = {
    "seed of 5,000 digits": ("--set", "seed=" + "9" * 5000),
    "seed of 24,000 bits": ("--set", "seed=0x" + "f" * 6000),
    "batches of 10^15": ("--set", "compute.batch_size=1000000000000000"),
    "images of a million pixels a side": ("--set", "detectors.0.input_size=1000000"),
    "images without pixels": ("--set", "detectors.0.input_size=[0,0]"),
    "images too small for the network": ("--set", "detectors.0.input_size=8"),
    "10^18 images of each source": ("--set", "data.sample=1000000000000000000"),
    "brackets": ("--set", "measures.noise=" + "[" * 10_000),
    "nested": ("--set", "measures.noise=" + "[" * 40 + "]" * 40),
    "endless key": ("--set", "a." * 100_000 + "a=1"),
    "NUL": ("--set", 'data.manifest="a\\u0000.csv"'),
    "device that does not exist": ("--set", "compute.device=cuda:99999999999999999999"),
    "weights from a device": ("--set", "detectors.0.checkpoints=/dev/zero"),
    "escape sequences": ("--set", 'salience.target="\\u001b[2J\\u009b31m"'),
    "markup": ("--set", "compute.device=[red]x[/red]"),
    "code to import": ("--set", "detectors.0.architecture=os:system"),
    "a pattern without end": ("--set", "detectors.0.checkpoints=" + "*" * 5000),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_settings_are_refused(call, write_config, name):
    started = time.monotonic()
    refused(call("check", write_config(), *ABSURD[name]))
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize(
    "text",
    [b"\xff\xfe", b"[" * 10**5, b"a." * 10**4 + b"a = 1", b"x = " + b"9" * 10**5, b"\0", b"x = 1\n" * 10**6, b""],
    ids=["UTF-16", "brackets", "endless key", "endless number", "NUL", "too large", "empty"],
)
def test_absurd_files_are_refused(call, tmp_path, text):
    (tmp_path / "config.toml").write_bytes(text)
    refused(call("check", "config.toml"))


@pytest.mark.parametrize("architecture", ["torchvision:densenet121", "torchvision:vit_b_16"])
def test_a_size_that_a_network_cannot_take_is_one_line(call, write_config, architecture):
    table = f'[[detectors]]\nname = "a"\narchitecture = "{architecture}"\nrandom_runs = 2\ninput_size = 17\n'
    refused(call("check", write_config(detectors=table)), "17")
