"""Files that can be used come out right, whatever their format, depth and orientation."""

import io
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pictures import encoded, picture, png_of_zeros
from PIL import Image, ImageOps, PngImagePlugin

from explain2me.errors import ImageError
from explain2me.images.decode import FORMATS, MIN_SIDE, decode_image, examine_file
from explain2me.images.examine import index_images
from explain2me.images.reading import read_file


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_pixels_are_exact_whatever_the_name(tmp_path, kind):
    path = tmp_path / "wrong.jpg"
    path.write_bytes(encoded(picture(), kind))
    pixels = decode_image(read_file(path))
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, np.asarray(picture()))


def test_smallest_side_is_read():
    assert decode_image(encoded(picture(MIN_SIDE, 200))).shape == (200, MIN_SIDE, 3)


GREY = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)


GREY[0, :2] = 0, 65535


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    pixels = decode_image(encoded(Image.fromarray(GREY), kind))
    want = np.round(GREY / 257).astype(np.uint8)
    np.testing.assert_array_equal(pixels, np.stack([want] * 3, 2))
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_16_bit_grey_of_other_byte_order_and_white_is_zero():
    want = np.round(GREY / 257).astype(np.uint8)
    big = Image.frombytes("I;16B", (16, 16), GREY.astype(">u2").tobytes())
    np.testing.assert_array_equal(decode_image(encoded(big, "TIFF"))[..., 0], want)
    data = bytearray(encoded(Image.fromarray(GREY), "TIFF"))
    entry = data.index(struct.pack("<HHIH", 262, 3, 1, 1))  # PhotometricInterpretation, one short, BlackIsZero
    data[entry + 8] = 0
    np.testing.assert_array_equal(decode_image(bytes(data))[..., 0], 255 - want)


def test_grey_and_one_bit():
    grey = picture().convert("L")
    np.testing.assert_array_equal(decode_image(encoded(grey)), np.stack([np.asarray(grey)] * 3, 2))
    bits = grey.point(lambda value: 255 * (value > 127)).convert("1")
    pixels = decode_image(encoded(bits))
    assert set(np.unique(pixels)) == {0, 255}
    np.testing.assert_array_equal(pixels[..., 1] == 255, np.asarray(bits))


def test_alpha_is_dropped_not_composited():
    colour = np.asarray(picture())
    alpha = np.random.default_rng(0).integers(0, 256, colour.shape[:2], dtype=np.uint8)
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(np.dstack([colour, alpha])))), colour)
    grey = colour[..., 0]
    np.testing.assert_array_equal(
        decode_image(encoded(Image.fromarray(np.dstack([grey, alpha]), "LA"))), np.stack([grey] * 3, 2)
    )


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(16))], ids=["none", "one-colour", "every-colour"])
def test_palette(transparency):
    image = picture().quantize(16)
    options = {} if transparency is None else {"transparency": transparency}
    pixels = decode_image(encoded(image, **options))
    np.testing.assert_array_equal(pixels, np.asarray(picture().quantize(16).convert("RGB")))


def test_still_gif_and_transparent_colour_of_rgb():
    image = picture().quantize(16)
    np.testing.assert_array_equal(decode_image(encoded(image, "GIF")), np.asarray(image.convert("RGB")))
    pixels = decode_image(encoded(picture(), transparency=(1, 2, 3)))
    np.testing.assert_array_equal(pixels, np.asarray(picture()))


def test_cmyk():
    cyan, red = Image.new("CMYK", (16, 16), (255, 0, 0, 0)), Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    np.testing.assert_allclose(decode_image(encoded(cyan, "TIFF"))[0, 0], [0, 255, 255], atol=1)
    np.testing.assert_allclose(decode_image(encoded(red, "JPEG", quality=95))[0, 0], [255, 0, 0], atol=3)


def test_first_picture_of_a_phone_photograph_is_taken():
    first, second = picture(), ImageOps.invert(picture())
    data = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
    np.testing.assert_allclose(decode_image(data).astype(int), np.asarray(first), atol=40)


def test_colour_profile_is_ignored():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    np.testing.assert_array_equal(decode_image(encoded(picture(), icc_profile=profile)), np.asarray(picture()))


ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    row, column = ORIENTATIONS[orientation]
    stored = upright if row in ("top", "bottom") else upright.transpose(1, 0, 2)
    stored = stored[::-1] if row in ("bottom", "right") else stored
    return stored[:, ::-1] if column in ("right", "bottom") else stored


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation(tmp_path, kind, orientation):
    upright = np.asarray(picture(48, 32))
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(np.ascontiguousarray(stored_as(upright, orientation)))
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    data = encoded(stored, kind, exif=exif, **options)
    pixels = decode_image(data)
    assert pixels.shape == upright.shape
    np.testing.assert_allclose(pixels.astype(int), upright, atol=4 if kind == "JPEG" else 0)
    (tmp_path / "a.jpg").write_bytes(data)
    usable = index_images(pa.table({"image_id": ["a"], "path": ["a.jpg"], "label": ["x"], "source": ["x"]}), tmp_path)[
        0
    ]
    assert (usable["width"][0].as_py(), usable["height"][0].as_py()) == (48, 32)


def broken_exif(orientation: int) -> bytes:
    """An orientation, then a tag whose text lies outside the block: Pillow warns at the second."""
    entries = struct.pack("<HHIHH", 274, 3, 1, orientation, 0) + struct.pack("<HHII", 305, 2, 4000, 9000)
    return b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(4)


def test_pillows_warnings_do_not_escape():
    """Not even in threads, and the filters are found as they were."""
    data = encoded(picture(), "JPEG", exif=broken_exif(6))
    with pytest.warns(UserWarning, match="Skipping tag 305"), Image.open(io.BytesIO(data)) as image:
        image.getexif()
    results: list[object] = []

    def decode() -> None:
        try:
            results.extend(decode_image(data).shape for _ in range(20))
        except BaseException as error:
            results.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        threads = [threading.Thread(target=decode) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert warnings.filters == before
    assert results == [(48, 32, 3)] * 80


def test_pillow_logs_nothing_to_the_terminal():
    """A TIFF of too many samples: Pillow logs an error, which Python prints where nothing handles it."""
    data = bytearray(encoded(picture(), "TIFF"))
    entry = data.index(struct.pack("<HHIH", 277, 3, 1, 3))  # SamplesPerPixel, one short, 3
    data[entry + 8 : entry + 10] = struct.pack("<H", 60_000)
    script = (
        "import sys; from explain2me.images.decode import decode_image\ntry: decode_image(sys.stdin.buffer.read())\n"
    )
    script += "except Exception as error: print(error)"
    done = subprocess.run([sys.executable, "-c", script], input=bytes(data), capture_output=True, check=True)
    assert b"cannot be decoded" in done.stdout or b"damaged" in done.stdout
    assert done.stderr == b""


def test_hopeless_exif_counts_as_none():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0not a block of tags")
    assert decode_image(data).shape == (32, 48, 3)


def test_pillows_switches_are_left_alone():
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError):
        decode_image(png_of_zeros(20_000, 20_000))
    assert before == Image.MAX_IMAGE_PIXELS


def test_grey_of_12_bits_is_as_bright_as_it_is_meant():
    values = np.linspace(0, 4095, 256).round().astype(np.uint16)
    first, second = values[::2], values[1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    tags = {256: 16, 257: 16, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 16, 279: len(packed)}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + fields + bytes(4) + packed
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.asarray(image).ravel(), values)
    np.testing.assert_array_equal(decode_image(data)[..., 0].ravel(), (values * (255 / 4095)).round())


SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from explain2me.images.decode import examine_file
from explain2me.errors import MachineError

large, small = map(Path, sys.argv[1:])
pages = int(Path("/proc/self/statm").read_text().split()[0])
examine_file(small, max_pixels=10**8)
free = pages * resource.getpagesize() + 2**27
resource.setrlimit(resource.RLIMIT_AS, (free, free))
examine_file(small, max_pixels=10**8)
try:
    examine_file(large, max_pixels=10**8)
except MachineError as error:
    print(error.kind, error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_too_little_memory_is_not_blamed_on_the_image(tmp_path):
    for name, side in (("large", 7500), ("small", 64)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / f"{name}.png") for name in ("large", "small")]
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY, *paths], capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"memory {paths[0]!r}: out of memory, 922 MiB are not to be had"), done
    assert examine_file(Path(paths[0]), max_pixels=10**8)[:2] == (7500, 7500)


def test_an_image_that_asks_for_more_memory_than_it_needs_is_refused(monkeypatch):
    def fail(_):
        raise MemoryError

    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "PNG")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(ImageError, match="asks for more memory") as found:
        decode_image(stream.getvalue())
    assert found.value.kind == "corrupt"


def test_memory_that_images_beside_it_took_for_a_moment_is_not_blamed_on_the_image(monkeypatch):
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "PNG")
    genuine, fails = PngImagePlugin.PngImageFile.load, [MemoryError()]

    def load(image):
        if fails:
            raise fails.pop()
        return genuine(image)

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    assert decode_image(stream.getvalue()).shape == (64, 64, 3)


def test_a_decoder_that_is_loaded_late_is_not_blamed_on_the_image(monkeypatch):
    """Where no more files can be opened, Pillow could not load it."""
    code = "import sys; import explain2me.images.decode; sys.path.clear(); from PIL import Image; print(*Image.OPEN)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(FORMATS) <= set(done.stdout.split())
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda _: open("/dev/null/x"))  # noqa: PTH123, SIM115
    stream = io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "PNG")
    with pytest.raises(NotADirectoryError):
        decode_image(stream.getvalue())
