"""The image reader on real files: every kind of bad image, every wrong manifest, and that good ones come out right."""

import contextlib
import gc
import hashlib
import io
import os
import resource
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from odd_files import make_socket, make_too_large, writes
from PIL import Image, ImageOps

from explain2me.errors import ImageError, ManifestError
from explain2me.images.batches import batches
from explain2me.images.decode import MIN_SIDE, decode_image, examine_file, load_image
from explain2me.images.examine import index_images
from explain2me.images.listing import check_labels, image_root, list_images, list_source, resolve
from explain2me.images.reading import read_file

FACES = Path(__file__).resolve().parents[1] / "../shared/data/faces"
needs_faces = pytest.mark.skipif(not FACES.is_dir(), reason="the shared face photographs are not beside the repository")
not_root = pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() == 0, reason="root may read everything")


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


def write_manifest(folder: Path, text: str | bytes) -> Path:
    manifest = folder / "manifest.csv"
    manifest.write_bytes(text.encode() if isinstance(text, str) else text)
    return manifest


def manifest_error(folder: Path, text: str | bytes, *, split: str | None = None) -> str:
    with pytest.raises(ManifestError) as caught:
        list_images(write_manifest(folder, text), split=split)
    message = str(caught.value)
    assert message.isprintable()
    return message.removeprefix(repr(str(folder / "manifest.csv")))


def kind_of(function: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        function()
    assert caught.value.message.isprintable(), "a message must hold no control character"
    return caught.value.kind, caught.value.message


# ------------------------------------------------------------------------------------------------------ the manifest


def test_manifest_becomes_a_sorted_table(tmp_path):
    manifest = write_manifest(tmp_path, "path,label,source,origin\nb/2.jpg,fake,sg,x\na/1.jpg,real,ffhq,y\n")
    table = list_images(manifest)
    assert table.schema.names == ["image_id", "path", "label", "source"]
    assert set(table.schema.types) == {pa.string()}
    assert table.to_pylist() == [
        {"image_id": "a/1.jpg", "path": "a/1.jpg", "label": "real", "source": "ffhq"},
        {"image_id": "b/2.jpg", "path": "b/2.jpg", "label": "fake", "source": "sg"},
    ]
    assert image_root(manifest) == tmp_path


def test_order_of_lines_changes_nothing(tmp_path):
    lines = [f"{number}.jpg,{'fake' if number % 2 else 'real'},s{number % 3}" for number in range(30)]
    first = list_images(write_manifest(tmp_path, "\n".join(["path,label,source", *lines])))
    again = list_images(write_manifest(tmp_path, "\n".join(["path,label,source", *lines[::-1]])))
    assert first.equals(again)


@pytest.mark.parametrize(
    ("text", "label", "source"),
    [
        ("path\na.jpg", None, "images"),
        ("path,label\na.jpg,", None, "images"),
        ("path,label\na.jpg,fake", "fake", "fake"),
        ("path,label,source\na.jpg,fake,", "fake", "fake"),
        ("path,source\na.jpg,sg", None, "sg"),
    ],
)
def test_label_and_source_may_be_absent(tmp_path, text, label, source):
    (row,) = list_images(write_manifest(tmp_path, text)).to_pylist()
    assert (row["label"], row["source"]) == (label, source)


def test_image_id_of_the_manifest_decides_the_order(tmp_path):
    table = list_images(write_manifest(tmp_path, "path,image_id\na.jpg,2\nb.jpg,1\n"))
    assert table["image_id"].to_pylist() == ["1", "2"]
    assert table["path"].to_pylist() == ["b.jpg", "a.jpg"]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n"], ids=["lf", "crlf", "blank-lines"])
def test_flavours_of_csv(tmp_path, start, end):
    lines = [b"path,label", b'"a, ""b"".jpg",fake', '"été.jpg",real'.encode(), b'"two\nlines.jpg",fake', b""]
    table = list_images(write_manifest(tmp_path, start + end.join(lines)))
    assert table["path"].to_pylist() == ['a, "b".jpg', "two\nlines.jpg", "été.jpg"]


def test_split_is_taken_and_others_may_lack_labels(tmp_path):
    manifest = write_manifest(tmp_path, "path,label,split\na,fake,test\nb,,train\nc,real,test\n")
    assert list_images(manifest, split="test")["path"].to_pylist() == ["a", "c"]


def test_paths_resolve_beside_the_manifest_or_absolute(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("in/a.png", "b.png"):
        (tmp_path / name).write_bytes(encoded(picture()))
    manifest = write_manifest(tmp_path / "in", f"path\na.png\n../b.png\n{tmp_path}/in/../in/./a.png\n")
    table = list_images(manifest)
    assert f"{tmp_path}/in/../in/./a.png" in table["path"].to_pylist()
    assert index_images(table, image_root(manifest)).usable.num_rows == 3


SHA = "0" * 63


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file_path,label\na,b",
            " line 1: expected a column 'path', got the columns ['file_path', 'label']; rename 'file_path' to 'path'",
        ),
        ("paht\na", " line 1: expected a column 'path', got the columns ['paht']; rename 'paht' to 'path'"),
        (
            "path;label\na;b",
            " line 1: expected a column 'path', got the columns ['path;label']; separate fields by commas, not ';'",
        ),
        (
            "path\tlabel\na\tb",
            " line 1: expected a column 'path', got the columns ['path\\tlabel']; separate fields by commas",
        ),
        (
            "\x1b[31m,\x07\na,b",
            " line 1: expected a column 'path', got the columns ['\\x1b[31m', '\\x07']; add it",
        ),
        ("path,lable\na,b", " line 1: the column 'lable' is not read; did you mean 'label'? rename it"),
        ("path,Source\na,b", " line 1: the column 'Source' is not read; did you mean 'source'? rename it"),
        ("path,label,label\na,b,c", " line 1: the column 'label' is there twice; rename one"),
        ("path,label\n", ": expected a line of column names and one line per image, got no rows"),
        ("\n\n", ": expected a line of column names and one line per image, got no rows"),
        ("", ": the file is empty (0 bytes); give a CSV file with a column 'path', or a folder of images"),
        ("path,label\na,b\nc\n", " line 3: expected 2 fields ('path', 'label'), got 1; put a field that holds a comma"),
        (
            "path,label\n\na,b,c\n",
            " line 3: expected 2 fields ('path', 'label'), got 3; put a field that holds a comma",
        ),
        ('path,label\n"a\nb",c\nd\n', " line 4: expected 2 fields ('path', 'label'), got 1"),
        ('path,label\na,b\n"c,d\ne,f\n', " line 3: not valid CSV (unexpected end of data); look for an unclosed quote"),
        ("path,label\na,x\nb,x\na,x\n", " line 4: the path 'a' is on line 2 already; keep one of them"),
        ("path,label\na,x\n./a,x\n", " line 3: the path './a' is on line 2 already; keep one of them"),
        ("path,split\na,test\na,train\n", " line 3: the path 'a' is on line 2 already; keep one of them"),
        ("path,image_id\na,7\nb,8\nc,7\n", " line 4: the image_id '7' is on line 2 already; keep one of them"),
        ("path,label\na,x\n ,x\n", " line 3: the path is empty; fill it in every row"),
        ("path,label\n,x\n", ": the column 'path' is empty in every row; fill it"),
        ("path,label\na,x\nb,\nc, \n", " line 3: the label is empty (2 such rows); fill it in every row"),
        ("path,source\na,x\nb,\n", " line 3: the source is empty; fill it in every row"),
        ("path,image_id\na,x\nb,\n", " line 3: the image_id is empty; fill it in every row"),
        (f"path,sha256\na,{SHA}g\n", f" line 2: expected a sha256 of 64 hexadecimal digits, got '{SHA}g'"),
        (b"path\na\nb\xff\n", " line 3: expected UTF-8, got the byte 0xff; save the file as UTF-8"),
        ("path\na\n".encode("utf-16"), " line 1: expected UTF-8, got the byte 0xff; save the file as UTF-8"),
        (b"path\na\nb\0c\n", " line 3: expected text, got a NUL byte; save the file as UTF-8 text"),
    ],
)
def test_wrong_manifest(tmp_path, text, message):
    assert manifest_error(tmp_path, text).startswith(message)


def test_wrong_split(tmp_path):
    text = "path,split\na,train\nb,test\nc,test\n"
    assert manifest_error(tmp_path, text, split="tset") == (
        ": no rows of the split 'tset'; there are 'test' (2), 'train' (1) rows; did you mean 'test'?"
    )
    assert manifest_error(tmp_path, "path,label\na,b", split="test") == (
        ": the split 'test' was asked, but there is no column 'split' in ['path', 'label']"
    )


def test_missing_manifest(tmp_path):
    with pytest.raises(
        ManifestError, match=r"none\.csv': no such file; give a CSV file with a column 'path', or a folder"
    ):
        list_images(tmp_path / "none.csv")
    (tmp_path / "link.csv").symlink_to("nowhere.csv")
    with pytest.raises(ManifestError, match=r"link\.csv': a link to a file that does not exist"):
        list_images(tmp_path / "link.csv")


def test_unknown_label(tmp_path):
    table = list_images(write_manifest(tmp_path, "path,label\na.jpg,real\nb.jpg,fak\nc.jpg,fak\nd.jpg,x\n"))
    with pytest.raises(ManifestError) as caught:
        check_labels(table, ["real", "fake"])
    assert str(caught.value) == (
        "expected labels among the classes ['fake', 'real'], got the label 'fak' in 2 row(s), "
        "first for the path 'b.jpg'; did you mean 'fake'? (unknown as well: ['x'])"
    )
    check_labels(table, ["real", "fak", "x"])
    check_labels(list_images(write_manifest(tmp_path, "path\na.jpg\n")), ["real"])


# -------------------------------------------------------------------------------------------------------- the folder


def make_folder(root: Path, names: Sequence[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(picture()))
    return root


def test_folder_of_labels_and_sources(tmp_path):
    names = ["real/ffhq/1.JPG", "fake/sg/a.png", "fake/sg/00001/b.webp", "fake/c.tiff"]
    make_folder(tmp_path, names)
    for name in ("readme.txt", "fake/sg/notes.csv", "fake/sg/.hidden.jpg", "fake/sg/noname"):
        (tmp_path / name).write_text("no image")
    table = list_images(tmp_path)
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("fake/c.tiff", "fake/c.tiff", "fake", "fake"),
        ("fake/sg/00001/b.webp", "fake/sg/00001/b.webp", "fake", "sg"),
        ("fake/sg/a.png", "fake/sg/a.png", "fake", "sg"),
        ("real/ffhq/1.JPG", "real/ffhq/1.JPG", "real", "ffhq"),
    ]
    assert list_source(tmp_path).num_ignored == 4
    assert index_images(table, image_root(tmp_path)).usable.num_rows == 4


def test_folder_equals_its_manifest(tmp_path):
    make_folder(tmp_path, ["real/ffhq/1.png", "fake/sg/2.png", "fake/sg2/1.png"])
    text = "path,label,source\nfake/sg2/1.png,fake,sg2\nreal/ffhq/1.png,real,ffhq\nfake/sg/2.png,fake,sg\n"
    table = list_images(tmp_path)
    assert table.equals(list_images(write_manifest(tmp_path, text)))
    assert list_source(write_manifest(tmp_path, text)).num_ignored == 0


def test_order_of_directory_entries_changes_nothing(tmp_path):
    names = [f"{label}/s{number % 3}/{number}.png" for number in range(12) for label in ("a", "b")]
    one = list_images(make_folder(tmp_path / "one", names))
    two = list_images(make_folder(tmp_path / "two", names[::-1]))
    assert one.equals(two)


def test_flat_folder_has_no_labels(tmp_path):
    table = list_images(make_folder(tmp_path, ["b.png", "a.png"]))
    assert table["path"].to_pylist() == ["a.png", "b.png"]
    assert table["label"].null_count == 2
    assert table["label"].type == pa.string()
    assert set(table["source"].to_pylist()) == {"images"}


def test_wrong_folder(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ManifestError, match=r"expected images as label/source/\*\.jpg.*, got none \(1 other files\)"):
        list_images(tmp_path)
    make_folder(tmp_path, ["real/1.png", "2.png"])
    with pytest.raises(ManifestError, match=r"every image in a folder of its label, got 1 beside them, first '2\.png'"):
        list_images(tmp_path)
    with pytest.raises(
        ManifestError, match=r"no folder of the split 'rael'; did you mean 'real'\?; expected rael/label/"
    ):
        list_images(tmp_path, split="rael")


def test_folders_of_splits(tmp_path):
    make_folder(tmp_path, ["train/real/ffhq/1.png", "test/real/ffhq/1.png", "test/fake/2.png", "test/.hidden.png"])
    table = list_images(tmp_path, split="test", extra=["salience"])
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("test/fake/2.png", "test/fake/2.png", "fake", "fake", None),
        ("test/real/ffhq/1.png", "test/real/ffhq/1.png", "real", "ffhq", None),
    ]
    assert index_images(table, image_root(tmp_path)).usable.num_rows == 2
    assert list_images(tmp_path, split="train")["image_id"].to_pylist() == ["train/real/ffhq/1.png"]
    for split in ("..", ".", "test/real", ""):
        with pytest.raises(ManifestError, match="there is no folder of the split"):
            list_images(tmp_path, split=split)


def test_links_are_followed_once(tmp_path):
    make_folder(tmp_path / "elsewhere", ["1.png"])
    make_folder(tmp_path / "set", ["real/own/2.png"])
    (tmp_path / "set/real/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/real/circle").symlink_to(tmp_path / "set")
    (tmp_path / "set/real/itself").symlink_to("itself")
    assert list_images(tmp_path / "set")["path"].to_pylist() == ["real/linked/1.png", "real/own/2.png"]


def test_hostile_names_are_read(tmp_path):
    (tmp_path / "real").mkdir()
    names = [b"a\nb.png", b"\x1b[31m.png", b'=1+1,".png', b"\\xff literal.png", b"caf\xe9 \xff.png"]
    try:
        for name in names:
            Path(os.fsdecode(bytes(tmp_path) + b"/real/" + name)).write_bytes(encoded(picture()))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    table = list_images(tmp_path)
    assert "real/caf\\xe9 \\xff.png" in table["path"].to_pylist()
    indexed = index_images(table, tmp_path)
    assert indexed.usable.num_rows == len(names)
    assert indexed.quarantine.num_rows == 0


def test_hostile_names_do_not_reach_messages(tmp_path):
    (tmp_path / "real").mkdir()
    for name in (b"a\nb\x1b[2J.png", b"\xff\xfe.png", "\u202egpj.png".encode()):
        Path(os.fsdecode(bytes(tmp_path) + b"/real/" + name)).write_bytes(b"text")
    quarantine = index_images(list_images(tmp_path), tmp_path).quarantine.to_pylist()
    assert [row["kind"] for row in quarantine] == ["not_an_image"] * 3
    for row in quarantine:
        assert row["message"].isprintable()
        assert str(tmp_path) not in row["message"]


def test_two_names_written_alike_are_refused(tmp_path):
    for name in (b"\xff.png", b"\\xff.png"):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(b"")
    with pytest.raises(ManifestError, match="two files are written"):
        list_images(tmp_path)


# --------------------------------------------------------------------------------------------- files that are no use


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def _png_without_its_checksum() -> bytes:
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
    "pipe": ("not_regular", _pipe),
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
    "truncated-jpeg": ("truncated", writes(lambda: _cut(encoded(picture(), "JPEG"), 0.8))),
    "truncated-jpeg-header": ("truncated", writes(lambda: encoded(picture(), "JPEG")[:100])),
    "truncated-progressive": ("truncated", writes(lambda: _cut(encoded(picture(), "JPEG", progressive=True), 0.9))),
    "truncated-png": ("truncated", writes(lambda: _cut(encoded(picture()), 0.8))),
    "truncated-gif": ("truncated", writes(lambda: _cut(encoded(picture(), "GIF"), 0.9))),
    "truncated-bmp": ("truncated", writes(lambda: _cut(encoded(picture(), "BMP"), 0.8))),
    "truncated-webp": ("truncated", writes(lambda: _cut(encoded(picture(), "WEBP"), 0.8))),
    "truncated-tiff": ("truncated", writes(lambda: _cut(encoded(picture(), "TIFF"), 0.8))),
    "truncated-tiff-lzw": ("truncated", writes(lambda: _cut(encoded(picture(), "TIFF", compression="tiff_lzw"), 0.8))),
    "corrupt-png": ("corrupt", writes(_png_without_its_checksum)),
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


# ---------------------------------------------------------------------------------------------- files that are of use


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


# EXIF 2.3, tag 274: where the 0th row and the 0th column of the stored pixels are seen.
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


# --------------------------------------------------------------------------------------------------------- the index


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
    (tmp_path / "a/6.png").write_bytes(_cut(encoded(picture()), 0.5))
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


def test_error_of_the_callback_ends_the_threads(tmp_path):
    make_folder(tmp_path, [f"{number}.png" for number in range(100)])

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_images(list_images(tmp_path), tmp_path, on_done=stop)
    assert not image_threads()


# ------------------------------------------------------------------------------------------------- resize and batches


def test_size_is_height_then_width(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(48, 32)))
    image = load_image(tmp_path / "a.png", (20, 60))
    assert image.dtype == torch.uint8
    assert image.shape == (3, 20, 60)
    assert image.is_contiguous()
    assert load_image(tmp_path / "a.png", (48, 32)).shape == (3, 48, 32)


def test_image_of_the_right_size_is_untouched(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(48, 32)))
    image = load_image(tmp_path / "a.png", (32, 48), interpolation="lanczos")
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(picture(48, 32)))


@pytest.mark.parametrize("interpolation", ["area", "bilinear", "bicubic", "lanczos"])
def test_shrinking_is_antialiased(tmp_path, interpolation):
    """One-pixel stripes become even grey; sampling without a filter would show black or white."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(stripes)))
    middle = load_image(tmp_path / "a.png", (32, 32), interpolation=interpolation)[:, 4:-4, 4:-4].float()
    assert (middle - 127.5).abs().max() < 3


def test_bilinear_agrees_with_torch(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(150, 90)))
    pixels = torch.from_numpy(decode_image(encoded(picture(150, 90)))).permute(2, 0, 1)[None].double()
    want = torch.nn.functional.interpolate(pixels, (40, 60), mode="bilinear", antialias=True)[0]
    assert (load_image(tmp_path / "a.png", (40, 60)).double() - want).abs().max() < 1.01


def test_wrong_arguments(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected interpolation as one of .*, got 'bilinaer'; did you mean 'bilinear'"
    ):
        load_image(tmp_path / "a", (3, 3), interpolation="bilinaer")
    with pytest.raises(ValueError, match=r"expected size as \(height, width\) of at least 1 pixel each, got \(0, 3\)"):
        load_image(tmp_path / "a", (0, 3))
    with pytest.raises(ValueError, match="batch_size and prefetch of at least 1, got 0 and 2"):
        batches([], size=(3, 3), batch_size=0)
    with pytest.raises(ValueError, match="expected one sha256 per path, got 1 for 0 paths"):
        batches([], size=(3, 3), batch_size=1, expected_sha256=["x"])


def make_images(folder: Path, num_images: int) -> list[Path]:
    """The first ones are the largest, so that threads finish out of order."""
    paths = [folder / f"{number}.png" for number in range(num_images)]
    for number, path in enumerate(paths):
        side = 400 if number % 4 == 0 else 16
        path.write_bytes(encoded(picture(side, side, seed=number)))
    return paths


def image_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("explain2me-images")]


@pytest.mark.parametrize(("num_threads", "prefetch"), [(1, 1), (4, 1), (4, 3)])
def test_batches_keep_the_order(tmp_path, num_threads, prefetch):
    paths = make_images(tmp_path, 11)
    found = list(batches(paths, size=(12, 20), batch_size=4, num_threads=num_threads, prefetch=prefetch))
    assert [batch.positions for batch in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    want = torch.stack([load_image(path, (12, 20)) for path in paths])
    assert torch.equal(torch.cat([batch.images for batch in found]), want)
    assert not any(batch.failures for batch in found)
    assert not image_threads()


def test_failures_are_told_and_move_no_border(tmp_path):
    paths = make_images(tmp_path, 9)
    for number in (1, 3, 4, 5):
        paths[number].write_bytes(b"text")
    first, second, third = batches(paths, size=(12, 20), batch_size=3)
    assert (first.positions, second.positions, third.positions) == ([0, 2], [], [6, 7, 8])
    assert [failure.position for failure in second.failures] == [3, 4, 5]
    assert first.failures[0].position == 1
    assert first.failures[0].error.kind == "not_an_image"
    assert first.failures[0].error.message.startswith("'1.png': ")
    assert second.images.shape == (0, 3, 12, 20)
    assert second.images.dtype == torch.uint8
    assert torch.equal(first.images[1], load_image(paths[2], (12, 20)))


def test_file_swapped_after_the_index_is_noticed(tmp_path):
    paths = make_images(tmp_path, 3)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    paths[1].write_bytes(encoded(picture(16, 16, seed=99)))
    (batch,) = batches(paths, size=(12, 20), batch_size=3, expected_sha256=hashes)
    assert batch.positions == [0, 2]
    assert batch.failures[0].error.kind == "hash_mismatch"


def test_no_paths_no_batches():
    assert list(batches([], size=(12, 20), batch_size=3)) == []


class CountedPaths(list[Path]):
    """Remembers how many of its items were asked for."""

    asked = 0

    def __getitem__(self, position):
        self.asked += 1
        return super().__getitem__(position)


def test_decoding_ahead_is_bounded(tmp_path):
    paths = CountedPaths([make_images(tmp_path, 2)[1]] * 200)
    reader = batches(paths, size=(12, 20), batch_size=5, prefetch=2, num_threads=4)
    for number in range(1, 6):
        next(reader)
        time.sleep(0.1)  # long enough for the threads to run ahead of their bound
        assert paths.asked <= number * 5 + 2 * 5
    reader.close()
    assert not image_threads()
    assert paths.asked < 40


@pytest.mark.parametrize("how", ["close", "drop", "exception"])
def test_threads_end_with_the_generator(tmp_path, how):
    reader = batches(make_images(tmp_path, 1) * 100, size=(12, 20), batch_size=2)
    next(reader)
    assert image_threads()
    if how == "close":
        reader.close()
    elif how == "drop":
        del reader
    else:
        with pytest.raises(ZeroDivisionError):
            consume(reader)
        del reader
    gc.collect()
    assert not image_threads()


def consume(reader) -> None:
    for _ in reader:
        1 / 0  # noqa: B018


# --------------------------------------------------------------------------------------------------------- real faces


@needs_faces
def test_real_faces():
    table = list_images(FACES / "manifest.csv", split="test")
    check_labels(table, ["real", "fake"])
    some = table.take(list(range(0, table.num_rows, 8)))
    usable, quarantine = index_images(some, FACES)
    assert usable.num_rows == some.num_rows
    assert quarantine.num_rows == 0
    paths = [resolve(FACES, path) for path in usable["path"].to_pylist()]
    images = torch.cat([batch.images for batch in batches(paths, size=(224, 224), batch_size=16)])
    for path, image in list(zip(paths, images, strict=True))[::10]:
        with Image.open(path) as original:
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(original.convert("RGB")))


@needs_faces
def test_folder_of_real_faces_has_the_labels_of_its_manifest():
    manifest = list_images(FACES / "manifest.csv")
    folder = list_images(FACES)
    assert folder.equals(manifest)
    assert list_source(FACES).num_ignored == 1


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
from explain2me.errors import ImageError

large, small = map(Path, sys.argv[1:])
pages = int(Path("/proc/self/statm").read_text().split()[0])
examine_file(small, max_pixels=10**8)
free = pages * resource.getpagesize() + 2**27
resource.setrlimit(resource.RLIMIT_AS, (free, free))
examine_file(small, max_pixels=10**8)
try:
    examine_file(large, max_pixels=10**8)
except Exception as error:
    print(isinstance(error, ImageError), error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_a_machine_short_of_memory_is_not_blamed_on_the_image(tmp_path):
    for name, side in (("large", 7500), ("small", 64)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / f"{name}.png") for name in ("large", "small")]
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY, *paths], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("False out of memory: 922 MiB to decode an image"), done
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
