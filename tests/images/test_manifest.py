"""Manifests: every flavour of CSV that is read, and the message for every wrong one."""

from pathlib import Path

import pyarrow as pa
import pytest
from pictures import encoded, picture, write_manifest

from explain2me.errors import ManifestError
from explain2me.images.examine import index_images
from explain2me.images.listing import image_root, list_images


def manifest_error(folder: Path, text: str | bytes, *, split: str | None = None) -> str:
    with pytest.raises(ManifestError) as caught:
        list_images(write_manifest(folder, text), split=split)
    message = str(caught.value)
    assert message.isprintable()
    return message.removeprefix(repr(str(folder / "manifest.csv")))


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


@pytest.mark.parametrize("labels", ["01", "0.0 1.0", "True False", "nan None", "NA null", "1e3 1_0"])
def test_labels_stay_as_they_are_written(tmp_path, labels):
    names = labels.split()
    table = list_images(write_manifest(tmp_path, "path,label\n" + "".join(f"{name}.jpg,{name}\n" for name in names)))
    assert sorted(table["label"].to_pylist()) == sorted(names)


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
