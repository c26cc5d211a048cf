"""Tars: every member is found where ``tarfile`` finds it, and hostile or damaged tars are refused whole."""

import io
import os
import random
import tarfile
from pathlib import Path

import pytest
from container_files import (
    image_bytes,
    kind_of,
    png,
    refusal,
    rows_of,
    write_tar,
)

from explain2me.images.containers import tar as tar_module
from explain2me.images.containers.opened import Recent
from explain2me.images.containers.tar import open_tar
from explain2me.images.examine import index_images
from explain2me.images.listing import list_images
from explain2me.images.reading import read_file


def write_member(path: Path, **fields: object) -> Path:
    """A tar with an image and one member of any kind."""
    with tarfile.open(path, "w") as tar:
        image = tarfile.TarInfo("real/1.png")
        image.size = len(png())
        tar.addfile(image, io.BytesIO(png()))
        info = tarfile.TarInfo(str(fields.pop("name", "real/2.png")))
        for name, value in fields.items():
            setattr(info, name, value)
        tar.addfile(info)
    return path


@pytest.mark.parametrize(
    "kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["ustar", "gnu", "pax"]
)
def test_members_stand_where_tarfile_finds_them(tmp_path, kind):
    names = ["a.png", "folder/" * 15 + "b.png", "x" * 90 + "/" + "y" * 60 + ".png", "./c.png", "é/ü.png"]
    names += [] if kind == tarfile.USTAR_FORMAT else ["z/" * 200 + "long.png"]
    data = {name: os.urandom(random.Random(name).randrange(3000)) for name in names}
    path = write_tar(tmp_path / "a.tar", data, format=kind)
    with tarfile.open(path) as tar:
        want = {os.path.normpath(info.name).encode(): (info.offset_data, info.size) for info in tar}
    tar = open_tar(path)
    assert dict(tar.members) == want
    assert {name: tar.read(span) for name, span in tar.members.items()} == {
        os.path.normpath(name).encode(): value for name, value in data.items()
    }


def test_odd_names_work(tmp_path):
    names = [
        "real/new\nline.png",
        "real/\x1b[31m.png",
        "real/x\\xe9y.png",
        "real/ .png",
        "real/é.png",
        "real/\u202e.png",
    ]
    odd = [os.fsdecode(b"fake/\xe9.png"), os.fsdecode(b"fake/\xff\xfe.png")]
    members = {name: png(i) for i, name in enumerate([*names, *odd])}
    path = write_tar(tmp_path / "a.tar", members, format=tarfile.GNU_FORMAT, errors="surrogateescape")
    rows = rows_of(path)
    assert len(rows) == len(members)
    found = sorted(image_bytes(path, str(row["path"])) for row in rows)
    assert found == sorted(members.values())
    assert {row["path"] for row in rows} >= {"a.tar/fake/\\xe9.png", "a.tar/real/new\nline.png"}
    usable, refused = index_images(list_images(path), tmp_path)
    assert (len(usable), len(refused)) == (len(members), 0)


def test_a_container_whose_name_is_not_utf8(tmp_path):
    folder = tmp_path / "shards"
    write_tar(folder / os.fsdecode(b"\xe9.tar"), {"real/1.png": png()})
    (row,) = rows_of(folder)
    assert row["path"] == "\\xe9.tar/real/1.png"
    assert image_bytes(folder, str(row["path"])) == png()


def test_very_long_names_are_found(tmp_path):
    name = "/".join(["n" * 250] * 16) + ".png"
    path = write_tar(tmp_path / "a.tar", {name: png()})
    assert image_bytes(path, str(rows_of(path)[0]["path"])) == png()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "../../etc/evil.png"}, "'../../etc/evil.png' leads out of the tar"),
        ({"name": "real/../../evil.png"}, "leads out of the tar"),
        ({"name": "/etc/evil.png"}, "'/etc/evil.png' leads out of the tar"),
        ({"name": "..", "type": tarfile.DIRTYPE}, "leads out of the tar"),
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "'real/2.png' is a symbolic link"),
        ({"type": tarfile.LNKTYPE, "linkname": "real/1.png"}, "'real/2.png' is a hard link"),
        ({"type": tarfile.CHRTYPE}, "is a device"),
        ({"type": tarfile.BLKTYPE}, "is a device"),
        ({"type": tarfile.FIFOTYPE}, "is a pipe"),
        ({"type": tarfile.GNUTYPE_SPARSE}, "is a sparse file"),
        ({"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}}, "is a sparse file"),
        ({"type": b"Q"}, "unknown kind b'Q'"),
        ({"name": "real/1.png"}, "'real/1.png' is there twice"),
        ({"name": "./real//1.png"}, "is there twice"),
        ({"name": "."}, "has no name"),
        ({"name": "a/" * 3000 + ".png"}, "too long"),
        ({"pax_headers": {"path": "real/\0evil.png"}}, "leads out of the tar"),
        ({"pax_headers": {"comment": "x" * 2**21}}, "has a header of 2097"),
        ({"pax_headers": {"size": "-5"}}, "damaged size"),
        ({"pax_headers": {"size": "1e9"}}, "damaged size"),
        ({"pax_headers": {"size": "9" * 18}}, "is cut off"),
        ({"name": "\x1b[2J\n/../x.png"}, "\\x1b[2J\\n/../x.png"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_hostile_members_are_refused(tmp_path, fields, words):
    path = write_member(tmp_path / "a.tar", **fields)
    message = refusal(path)
    assert words in message
    assert "'a.tar'" in message
    assert kind_of(lambda: read_file(path / "real/1.png"))[0] == "unreadable"


def test_global_pax_headers_name_no_member(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"real/1.png": png()}, pax_headers={"comment": "made by git"})
    assert len(rows_of(path)) == 1
    write_tar(path, {"real/1.png": png()}, pax_headers={"path": "real/evil.png"})
    assert "gives all members one name or size" in refusal(path)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tars_are_refused(tmp_path, mode):
    with tarfile.open(tmp_path / f"a.tar.{mode}", f"w:{mode}") as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    assert "decompress it to a .tar" in refusal(tmp_path / f"a.tar.{mode}")
    (tmp_path / f"a.tar.{mode}").rename(tmp_path / "a.tar")
    assert "decompress it to a .tar" in refusal(tmp_path / "a.tar")
    assert "decompress it to a .tar" in refusal(tmp_path)


def test_a_tar_cut_off_anywhere_is_refused(tmp_path):
    whole = write_tar(tmp_path / "a.tar", {f"real/{i}.png": png(i) for i in range(3)}).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for length in {0, 1, 100, 511, 512, 513, 700, end - 1, end, *range(0, end, 512)}:
        (tmp_path / "a.tar").write_bytes(whole[:length])
        assert refusal(tmp_path / "a.tar")


def test_damaged_headers_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"real/{i}.png": png(i) for i in range(3)})
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        second = tar.getmembers()[1].offset
    for place in range(0, 265, 7):
        path.write_bytes(whole[: second + place] + bytes([whole[second + place] ^ 0x15]) + whole[second + place + 1 :])
        assert f"damaged at byte {second}" in refusal(path)


@pytest.mark.parametrize(
    "data", [b"", b"no tar at all" * 100, os.urandom(2048), png()], ids=["empty", "text", "random", "png"]
)
def test_bytes_that_are_no_tar(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    refusal(tmp_path / "a.tar")


@pytest.mark.parametrize("padding", [0, 2**20 + 512])
def test_joined_tars_are_not_read_by_half(tmp_path, padding):
    parts = [write_tar(tmp_path / f"{i}.tar", {f"real/{i}.png": png(i)}).read_bytes() for i in range(2)]
    (tmp_path / "0.tar").write_bytes(bytes(padding).join(parts))
    assert "continues after its end mark" in refusal(tmp_path / "0.tar")


def test_a_tar_without_images_and_a_missing_one(tmp_path):
    assert "expected images in 1 container files, got none" in refusal(write_tar(tmp_path / "a.tar", {"a.txt": b""}))
    assert "No such file" in refusal(tmp_path / "no.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    assert "expected a file, got a folder, pipe or device" in refusal(tmp_path / "pipe.tar")


def test_a_tar_put_in_the_place_of_another_is_read_anew(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"x.png": png(1)})
    assert read_file(path / "x.png") == png(1)
    write_tar(tmp_path / "b.tar", {"y/y.png": png(3), "x.png": png(2)}).replace(path)
    assert read_file(path / "x.png") == png(2)


def test_descriptors_are_bounded_and_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_module, "OPEN_TARS", Recent(3))
    for i in range(20):
        write_tar(tmp_path / f"{i}.tar", {"a.png": png()})
    before = num_descriptors()
    for i in range(20):
        read_file(tmp_path / f"{i}.tar" / "a.png")
    assert num_descriptors() <= before + 3


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def header(name: str, *, kind: bytes = tarfile.REGTYPE, size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def with_checksum(block: bytes) -> bytes:
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    return block[:148] + b"%06o\0 " % total + block[156:]


def block(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


END = bytes(1024)


def test_old_tars_have_no_kinds(tmp_path):
    folder, image = (
        header("real/", kind=tarfile.AREGTYPE, size=700),
        header("real/1.png", kind=tarfile.AREGTYPE, size=700),
    )
    (tmp_path / "a.tar").write_bytes(folder + image + block(b"x" * 700) + END)
    assert dict(open_tar(tmp_path / "a.tar").members) == {b"real/1.png": (1024, 700)}
    assert [row["path"] for row in rows_of(tmp_path / "a.tar")] == ["a.tar/real/1.png"]


def test_times_of_an_incremental_gnu_tar_are_no_part_of_the_name(tmp_path):
    image = header("real/1.png", size=3)
    image = with_checksum(image[:257] + b"ustar  \0" + image[265:345] + b"14723561234\0" * 2 + image[369:])
    (tmp_path / "a.tar").write_bytes(image + block(b"xyz") + END)
    assert set(open_tar(tmp_path / "a.tar").members) == {b"real/1.png"}


def test_a_negative_size_is_damage(tmp_path):
    image = header("real/2.png")
    image = with_checksum(image[:124] + b"\xff" * 12 + image[136:])
    (tmp_path / "a.tar").write_bytes(header("real/1.png") + image + END)
    assert "damaged at byte 512, expected a member's header (negative size)" in refusal(tmp_path / "a.tar")


@pytest.mark.parametrize(
    "records",
    [b"x", b"9999 a=b\n", b"5 a=b\n", b"6 a=bc", b"5 abc\n", b"0 a=b\n", b"-6 a=b\n", b"1" * 60_000, b"2 " * 30_000],
    ids=["text", "long", "short", "end", "key", "zero", "negative", "digits", "keys"],
)
def test_damaged_pax_headers_are_refused(tmp_path, records):
    pax = header("PaxHeaders/1.png", kind=tarfile.XHDTYPE, size=len(records)) + block(records)
    (tmp_path / "a.tar").write_bytes(pax + header("real/1.png") + END)
    assert "'PaxHeaders/1.png' has a damaged pax header" in refusal(tmp_path / "a.tar")


def test_the_size_in_a_pax_header_counts(tmp_path):
    pax = header("PaxHeaders/1.png", kind=tarfile.XHDTYPE, size=12) + block(b"12 size=513\n")
    other = header("PaxHeaders/2.png", kind=tarfile.XHDTYPE, size=13) + block(b"13 comment=x\n")
    (tmp_path / "a.tar").write_bytes(
        pax + other + header("real/1.png") + block(b"x" * 513) + header("real/2.png") + END
    )
    assert dict(open_tar(tmp_path / "a.tar").members) == {b"real/1.png": (2560, 513), b"real/2.png": (4096, 0)}


def test_a_tar_without_its_end_mark_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(header("real/1.png") + b"")
    assert "cut off, it has no end mark" in refusal(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(header("real/1.png", size=513) + block(b"x"))
    assert "'real/1.png' is cut off" in refusal(tmp_path / "a.tar")
