"""Files that cannot be used: each has its kind and its message, and the index names them."""

import contextlib
import hashlib
import os
import resource
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from odd_files import make_socket, make_too_large, writes
from pictures import encoded, kind_of, make_folder, pages, picture, png_of_zeros, write_manifest
from PIL import Image

from explain2me.errors import ImageError
from explain2me.images.decode import MIN_SIDE, decode_image, load_image
from explain2me.images.examine import index_images
from explain2me.images.listing import list_images
from explain2me.images.reading import read_file

not_root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() == 0, reason="root may read everything")


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def png_without_its_checksum() -> bytes:
    data = bytearray(encoded(picture()))
    data[data.index(b"IDAT") + 20] ^= 255
    return bytes(data)


BAD = {
    "missing": ("missing", lambda path: None),
    "name-too-long": ("missing", None),
    "below-a-file": ("missing", None),
    "dangling-link": ("dangling_link", lambda path: path.symlink_to("nowhere.png")),
    "link-to-itself": ("dangling_link", lambda path: path.symlink_to(path.name)),
    "folder": ("not_regular", lambda path: path.mkdir()),
    "link-to-folder": ("not_regular", lambda path: path.symlink_to(".")),
    "pipe": ("not_regular", make_pipe),
    "socket": ("not_regular", make_socket),
    "device": ("not_regular", lambda path: path.symlink_to("/dev/zero")),
    "empty": ("empty", writes(lambda: b"")),
    "too-many-bytes": ("too_many_bytes", make_too_large),
    "text": ("not_an_image", writes(lambda: b"no image here\n" * 100)),
    "one-byte": ("not_an_image", writes(lambda: b"\xff")),
    "git-lfs-pointer": ("not_an_image", writes(lambda: b"version https://git-lfs.github.com/spec/v1\n")),
    "pdf": ("format_not_allowed", writes(lambda: encoded(picture(), "PDF"))),
    "eps": ("format_not_allowed", writes(lambda: encoded(picture(), "EPS"))),
    "psd": ("format_not_allowed", writes(lambda: b"8BPS\0\1" + bytes(100))),
    "ico": ("format_not_allowed", writes(lambda: encoded(picture(), "ICO"))),
    "ppm": ("format_not_allowed", writes(lambda: encoded(picture(), "PPM"))),
    "jpeg2000": ("format_not_allowed", writes(lambda: encoded(picture(), "JPEG2000"))),
    "avif": ("format_not_allowed", writes(lambda: b"\0\0\0\x1cftypavif" + bytes(100))),
    "svg": ("format_not_allowed", writes(lambda: b'<?xml version="1.0"?>\n<svg xmlns="x"/>')),
    "zip": ("format_not_allowed", writes(lambda: b"PK\3\4" + bytes(100))),
    "truncated-jpeg": ("truncated", writes(lambda: cut(encoded(picture(), "JPEG"), 0.8))),
    "truncated-jpeg-header": ("truncated", writes(lambda: encoded(picture(), "JPEG")[:100])),
    "truncated-progressive": ("truncated", writes(lambda: cut(encoded(picture(), "JPEG", progressive=True), 0.9))),
    "truncated-png": ("truncated", writes(lambda: cut(encoded(picture()), 0.8))),
    "truncated-gif": ("truncated", writes(lambda: cut(encoded(picture(), "GIF"), 0.9))),
    "truncated-bmp": ("truncated", writes(lambda: cut(encoded(picture(), "BMP"), 0.8))),
    "truncated-webp": ("truncated", writes(lambda: cut(encoded(picture(), "WEBP"), 0.8))),
    "truncated-tiff": ("truncated", writes(lambda: cut(encoded(picture(), "TIFF"), 0.8))),
    "truncated-tiff-lzw": ("truncated", writes(lambda: cut(encoded(picture(), "TIFF", compression="tiff_lzw"), 0.8))),
    "corrupt-png": ("corrupt", writes(png_without_its_checksum)),
    "corrupt-jpeg": ("corrupt", writes(lambda: b"\xff\xd8\xff\xdb" + bytes(200))),
    "corrupt-tiff": ("corrupt", writes(lambda: b"II*\0\x08\0\0\0" + b"\xff" * 200)),
    "20000x20000": ("too_many_pixels", writes(lambda: png_of_zeros(20_000, 20_000))),
    "1x1": ("too_small", writes(lambda: encoded(picture(1, 1)))),
    "narrow": ("too_small", writes(lambda: encoded(picture(MIN_SIDE - 1, 100)))),
    "animated-gif": ("animated", writes(lambda: encoded(pages()[0], "GIF", save_all=True, append_images=pages()[1:]))),
    "animated-webp": (
        "animated",
        writes(lambda: encoded(pages()[0], "WEBP", save_all=True, append_images=pages()[1:])),
    ),
    "animated-png": ("animated", writes(lambda: encoded(pages()[0], "PNG", save_all=True, append_images=pages()[1:]))),
    "tiff-of-pages": (
        "animated",
        writes(lambda: encoded(pages()[0], "TIFF", save_all=True, append_images=pages()[1:])),
    ),
    "float": ("unknown_range", writes(lambda: encoded(Image.new("F", (16, 16), 0.5), "TIFF"))),
    "32-bit": ("unknown_range", writes(lambda: encoded(Image.new("I", (16, 16), 5), "TIFF"))),
}


def make_bad(folder: Path, name: str) -> Path:
    """The bad file, named as a JPEG whatever is in it."""
    (folder / "beside").touch()  # a folder without files would count as lost
    make = BAD[name][1]
    if name == "name-too-long":
        return folder / ("x" * 300 + ".jpg")
    if name == "below-a-file":
        (folder / "file").write_text("x")
        return folder / "file" / "x.jpg"
    path = folder / f"{name}.jpg"
    make(path)
    return path


@pytest.mark.parametrize("name", BAD)
def test_bad_file_has_its_kind(tmp_path, name):
    path = make_bad(tmp_path, name)
    kind, message = kind_of(lambda: load_image(path, (32, 32)))
    assert kind == BAD[name][0]
    assert message.startswith(repr(path.name) + ": ")
    assert str(tmp_path) not in message


@not_root
def test_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))
    path.chmod(0)
    assert kind_of(lambda: read_file(path)) == (
        "permission",
        "'a.png': the file may not be read; change its permissions",
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "no such file"),
        ("dangling-link", "a link to a file that does not exist"),
        ("folder", "expected a file, got a folder"),
        ("pipe", "expected a file, got a pipe"),
        ("socket", "expected a file, got a socket"),
        ("device", "expected a file, got a device"),
        ("empty", "the file is empty (0 bytes)"),
        ("text", "not an image of a known format; it starts with b'no image here\\nno'"),
        ("pdf", "PDF is not read; expected one of JPEG, PNG, GIF, BMP, WEBP, TIFF: convert it"),
        ("1x1", "1 x 1 pixels; expected at least 8 a side"),
        ("animated-gif", "several frames or pages; save the one that is meant as an image of its own"),
        ("float", "32-bit pixels (mode F); save it with 8 or 16 bits a channel"),
    ],
)
def test_message(tmp_path, name, message):
    path = make_bad(tmp_path, name)
    assert kind_of(lambda: load_image(path, (32, 32)))[1] == f"{path.name!r}: {message}"


def test_read_file(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("a")
    assert read_file(tmp_path / "a") == read_file(tmp_path / "link") == b"12345"
    assert read_file(tmp_path / "a", max_bytes=5) == b"12345"
    assert kind_of(lambda: read_file(tmp_path / "a", max_bytes=4))[0] == "too_many_bytes"
    assert kind_of(lambda: read_file(Path("a\0b")))[0] == "missing"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_a_cut_file_is_never_an_image(kind):
    data = encoded(picture(), kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    for end in range(0, len(data) * 9 // 10, 7):
        assert kind_of(lambda end=end: decode_image(data[:end]))[0] in ("empty", "not_an_image", "truncated", "corrupt")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_hostile_bytes_raise_nothing_else(kind):
    data = np.frombuffer(encoded(picture(), kind), np.uint8)
    random = np.random.default_rng(1)
    for _ in range(150):
        changed = data.copy()
        changed[random.integers(0, min(len(data), random.choice([60, 10**6])), 3)] = random.integers(0, 256, 3)
        with contextlib.suppress(ImageError):
            assert decode_image(changed.tobytes(), max_pixels=1_000_000).ndim == 3


def test_bombs_take_no_memory():
    # the last is above the limit at which Pillow itself refuses, the first below the one at which it warns
    bombs = [png_of_zeros(size, size) for size in (9_000, 13_000, 20_000)]
    assert max(map(len, bombs)) < 100_000
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bomb in bombs:
        kind, message = kind_of(lambda bomb=bomb: decode_image(bomb))
        assert kind == "too_many_pixels"
        assert "64000000" in message
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 20 * 2**20


def test_max_pixels_is_a_limit_not_a_strict_one():
    data = encoded(picture(40, 30))
    assert decode_image(data, max_pixels=1200).shape == (30, 40, 3)
    assert kind_of(lambda: decode_image(data, max_pixels=1199)) == (
        "too_many_pixels",
        "40 x 30 pixels are more than the allowed 1199",
    )


def test_index_splits_usable_and_quarantine(tmp_path):
    good = {f"good{number}.png": encoded(picture(40 + number, 30)) for number in range(3)}
    for name, data in good.items():
        (tmp_path / name).write_bytes(data)
    bad = {make_bad(tmp_path, name).relative_to(tmp_path).as_posix(): BAD[name][0] for name in BAD}
    text = "path,label,source\n" + "".join(f"{name},fake,sg\n" for name in [*bad, *good])
    calls: list[int] = []
    manifest = write_manifest(tmp_path, text)
    usable, quarantine = index_images(list_images(manifest), tmp_path, on_done=calls.append)
    assert calls == list(range(1, len(good) + len(bad) + 1))
    assert usable.schema.names == ["image_id", "path", "label", "source", "width", "height", "sha256"]
    assert [tuple(row.values()) for row in usable.to_pylist()] == [
        (name, name, "fake", "sg", 40 + number, 30, hashlib.sha256(data).hexdigest())
        for number, (name, data) in enumerate(good.items())
    ]
    assert quarantine.schema.names == ["image_id", "path", "stage", "kind", "message"]
    assert {row["path"]: row["kind"] for row in quarantine.to_pylist()} == bad
    assert set(quarantine["stage"].to_pylist()) == {"index"}
    assert quarantine["image_id"].to_pylist() == sorted(bad)


@pytest.mark.parametrize("names", [["good"], ["bad"]], ids=str)
def test_index_with_nothing_on_one_side(tmp_path, names):
    (tmp_path / "good").write_bytes(encoded(picture()))
    (tmp_path / "bad").write_bytes(b"text")
    both = index_images(list_images(write_manifest(tmp_path, "path\ngood\nbad\n")), tmp_path)
    one = index_images(list_images(write_manifest(tmp_path, "path\n" + names[0])), tmp_path)
    assert one.usable.schema == both.usable.schema
    assert one.quarantine.schema == both.quarantine.schema
    assert one.usable.num_rows + one.quarantine.num_rows == 1


def test_index_is_the_same_for_any_number_of_threads(tmp_path):
    make_folder(tmp_path, [f"a/{number}.png" for number in range(20)])
    (tmp_path / "a/5.png").write_bytes(b"text")
    (tmp_path / "a/6.png").write_bytes(cut(encoded(picture()), 0.5))
    table = list_images(tmp_path)
    one, many = (index_images(table, tmp_path, num_threads=number) for number in (1, 5))
    assert one.usable.equals(many.usable)
    assert one.quarantine.equals(many.quarantine)
    assert one.quarantine.num_rows == 2


def test_hash_of_the_manifest_is_compared(tmp_path):
    data = encoded(picture())
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(data)
    text = f"path,sha256\na,{hashlib.sha256(data).hexdigest().upper()}\nb,{'0' * 64}\nc,\n"
    table = list_images(write_manifest(tmp_path, text))
    usable, quarantine = index_images(table, tmp_path)
    assert usable["path"].to_pylist() == ["a", "c"]
    assert "expected_sha256" not in usable.schema.names
    (row,) = quarantine.to_pylist()
    assert (row["path"], row["kind"]) == ("b", "hash_mismatch")
    assert row["message"].startswith("'b': expected the sha256 000000000000..., got ")
