"""Folders of images: labels, sources, splits, links and hostile names."""

import os
from pathlib import Path

import pyarrow as pa
import pytest
from pictures import encoded, make_folder, picture, write_manifest

from explain2me.errors import ManifestError
from explain2me.images.examine import index_images
from explain2me.images.listing import image_root, list_images, list_source


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
