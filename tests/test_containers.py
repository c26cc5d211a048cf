"""Images in tars, Parquet and Arrow files: listed as a folder would be, read in memory, and hostile ones refused.

The tars are those of tarfile, the Parquet and Arrow files have the columns and the metadata that ``datasets`` writes.
"""

import hashlib
import io
import json
import os
import random
import tarfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from explain2me.cli.entry import main
from explain2me.config.load import load_config
from explain2me.errors import ConfigError, ImageError, ManifestError
from explain2me.images import containers
from explain2me.images.containers import container_of, open_tar
from explain2me.images.decode import load_image
from explain2me.images.examine import index_images
from explain2me.images.listing import image_root, list_images, list_source, resolve
from explain2me.images.reading import read_file
from explain2me.report.material import Material
from explain2me.run.folder import open_run
from explain2me.stages.check import warnings_of
from explain2me.stages.explain import explain_run
from explain2me.stages.select import list_data
from explain2me.train.data import read_human_maps, read_splits

COLUMNS = ["image_id", "path", "label", "source"]


def png(seed: int = 0, side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


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


def features(**kinds: object) -> dict[bytes, bytes]:
    """The schema metadata of datasets."""
    known = {"image": {"_type": "Image"}} | kinds
    return {b"huggingface": json.dumps({"info": {"features": known}}).encode()}


CLASS_LABEL = {"names": ["real", "fake"], "_type": "ClassLabel"}


def image_table(
    images: Sequence[bytes | None],
    columns: Mapping[str, Sequence[object]] = {},
    *,
    paths: Sequence[str | None] = (),
    **kinds: object,
) -> pa.Table:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    given = paths or [f"{i}.png" for i in range(len(images))]
    cells = [{"bytes": image, "path": path} for image, path in zip(images, given, strict=True)]
    table = pa.table({"image": pa.array(cells, kind)} | dict(columns))
    return table.replace_schema_metadata(features(**kinds))


def write_parquet(path: Path, table: pa.Table, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def write_saved(folder: Path, *tables: pa.Table, split: str | None = None, batch_rows: int = 2) -> Path:
    """What Dataset.save_to_disk writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=batch_rows)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def rows_of(source: Path, **options: object) -> list[dict[str, str | None]]:
    return list_images(source, **options).to_pylist()


def image_bytes(source: Path, path: str) -> bytes:
    return read_file(resolve(image_root(source), path))


def refusal(source: Path, **options: object) -> str:
    with pytest.raises(ManifestError) as caught:
        list_images(source, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert source.name in message
    return message


def kind_of(function: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        function()
    assert caught.value.message.isprintable()
    return caught.value.kind, caught.value.message


# --------------------------------------------------------------------------------------------------------------- tars


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


def test_a_tar_is_listed_as_the_folder_that_it_packs(tmp_path):
    for name in ("real/cam/1.png", "real/cam/deep/2.PNG", "fake/gan/1.png", "fake/3.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(png(len(name)))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "images", arcname=".")
    folder, packed = list_images(tmp_path / "images"), list_images(tmp_path / "a.tar")
    assert packed.drop_columns(["image_id", "path"]).equals(folder.drop_columns(["image_id", "path"]))
    for row, other in zip(folder.to_pylist(), packed.to_pylist(), strict=True):
        assert other["image_id"] == other["path"] == "a.tar/" + row["path"]
        assert image_bytes(tmp_path / "a.tar", other["path"]) == (tmp_path / "images" / row["path"]).read_bytes()


def test_samples_as_webdataset_groups_them(tmp_path):
    members = {
        "s1.PNG": png(1),
        "s1.cls": b"1\n",
        "s1.json": json.dumps({"source": "gan", "split": "test", "sha256": "A" * 64}).encode(),
        "s1.mask.png": png(2),
        "s1.salience.png": png(3),
        "v1.0/s2.jpg.png": png(4),
        "v1.0/s2.cls": b"real",
        "v1.0/s2.json": json.dumps({"source": "cam", "split": "train", "salience": "maps/s2.npy"}).encode(),
        "README": b"no extension, no sample",
        "notes.txt": b"no image",
        ".hidden.png": b"",
        "__meta__.json": b"[]",
    }
    path = write_tar(tmp_path / "shards" / "0.tar", members)
    table = list_images(path.parent, extra=("salience",), classes=("real", "fake"))
    assert table.to_pylist() == [
        {"image_id": "0.tar/s1.PNG", "path": "0.tar/s1.PNG", "label": "fake", "source": "gan", "expected_sha256": "a" * 64, "salience": "0.tar/s1.salience.png"},
        {"image_id": "0.tar/v1.0/s2.jpg.png", "path": "0.tar/v1.0/s2.jpg.png", "label": "real", "source": "cam", "expected_sha256": None, "salience": "maps/s2.npy"},
    ]  # fmt: skip
    assert list_source(path.parent, classes=("real", "fake")).num_ignored == 4
    assert list_source(path.parent).splits == {"test": 1, "train": 1}
    assert [row["label"] for row in rows_of(path.parent, split="test")] == ["1"]


@pytest.mark.parametrize(
    ("said", "classes", "label"),
    [
        ({"cls": b"1"}, None, "1"),
        ({"cls": b" 1\n"}, ("real", "fake"), "fake"),
        ({"cls": b"1"}, ("1", "0"), "1"),
        ({"cls": b"7"}, ("real", "fake"), "7"),
        ({"cls": b"morph"}, ("real", "fake"), "morph"),
        ({"json": b'{"label": 1}'}, ("real", "fake"), "fake"),
        ({"json": b'{"label": "1"}'}, ("real", "fake"), "1"),
        ({"json": b'{"label": "fake"}', "cls": b"0"}, ("real", "fake"), "real"),
        ({"json": b'{"label": null}'}, None, "folder"),
    ],
)
def test_label_of_a_sample(tmp_path, said, classes, label):
    members = {"folder/a.png": png()} | {f"folder/a.{name}": data for name, data in said.items()}
    (row,) = rows_of(write_tar(tmp_path / "a.tar", members), classes=classes)
    assert (row["label"], row["source"]) == (label, label)


def test_labels_are_in_every_sample_or_in_none(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.png": png(), "a.cls": b"1", "b.png": png()})
    assert "member 'b.png' of 'a.tar': the label is empty" in refusal(path)
    write_tar(path, {"a.png": png(), "real/b.png": png()})
    assert "expected every image in a folder of its label" in refusal(path)
    write_tar(path, {"a.png": png()})
    assert rows_of(path)[0]["label"] is None


def test_a_sample_split_over_tars_is_refused(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.png": png(), "a.cls": b"1", "b.png": png()})
    write_tar(tmp_path / "1.tar", {"b.cls": b"1"})
    assert "'1.tar': the member 'b.cls' labels no image; put both into one tar" in refusal(tmp_path)


def test_the_same_name_in_two_tars_is_two_samples(tmp_path):
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", {"real/1.png": png(i)})
    rows = rows_of(tmp_path)
    assert [row["image_id"] for row in rows] == ["0.tar/real/1.png", "1.tar/real/1.png"]
    assert [image_bytes(tmp_path, str(row["path"])) for row in rows] == [png(0), png(1)]


@pytest.mark.parametrize(
    "names", [["a.png", "a.jpg"], ["a.png", "a.PNG"], ["a.v1.png", "a.v2.png"]], ids=["two", "case", "versions"]
)
def test_two_images_in_a_sample_are_refused(tmp_path, names):
    message = refusal(write_tar(tmp_path / "a.tar", dict.fromkeys(names, png())))
    assert all(name in message for name in names)


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


# ------------------------------------------------------------------------------------------------------- hostile tars


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


def test_what_img2dataset_writes_is_read(tmp_path):
    for name in ("00000", "00001"):
        said = {"url": "https://example.org/a.png", "status": "success", "key": name, "label": "real", "width": 16}
        said["sha256"] = hashlib.sha256(b"what was downloaded").hexdigest()
        members = {f"{name}1.png": png(), f"{name}1.json": json.dumps(said).encode()}
        write_tar(tmp_path / f"{name}.tar", members)
        pq.write_table(pa.table({"url": [said["url"]], "status": ["success"]}), tmp_path / f"{name}.parquet")
    rows = rows_of(tmp_path)
    assert [(row["path"], row["label"]) for row in rows] == [
        ("00000.tar/000001.png", "real"),
        ("00001.tar/000011.png", "real"),
    ]
    assert not any(row.get("expected_sha256") for row in rows)
    pq.write_table(pa.table({"url": ["a"]}), tmp_path / "other.parquet")
    assert "container files of one kind" in refusal(tmp_path)


def test_a_folder_may_be_called_as_its_files_are(tmp_path):
    folder = tmp_path / "faces.parquet"  # as Spark and Dask do
    folder.mkdir()
    write_parquet(folder / "part-00000.parquet", image_table([png(), png(1)]))
    assert len(rows_of(folder)) == 2


@pytest.mark.parametrize("padding", [0, 2**20 + 512])
def test_joined_tars_are_not_read_by_half(tmp_path, padding):
    parts = [write_tar(tmp_path / f"{i}.tar", {f"real/{i}.png": png(i)}).read_bytes() for i in range(2)]
    (tmp_path / "0.tar").write_bytes(bytes(padding).join(parts))
    assert "goes on after its end mark" in refusal(tmp_path / "0.tar")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[1, 2]", "expected a JSON object {...}, got a list"),
        (b"{", "no valid JSON"),
        (b"\xff\xfe\xfd", "no valid JSON"),
        (b"[" * 200_000, "no valid JSON"),
        (b'{"label": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b"{" + b" " * 2**20 + b"}", "expected at most 1048576"),
        (b'{"label": ["real"]}', "label: expected text or a whole number, got a list"),
        (b'{"label": true}', "got a bool"),
        (b'{"label": 0.5}', "got a float"),
        (b'{"label": "real", "sha256": "abc"}', "expected a sha256 of 64"),
    ],
    ids=["list", "cut", "utf8", "deep", "digits", "large", "array", "bool", "float", "sha256"],
)
def test_wrong_json_is_refused(tmp_path, text, words):
    message = refusal(write_tar(tmp_path / "a.tar", {"s.png": png(), "s.json": text}))
    assert words in message
    assert "'s." in message


def test_wrong_labels_are_refused(tmp_path):
    assert "'s.cls' is empty" in refusal(write_tar(tmp_path / "a.tar", {"s.png": png(), "s.cls": b" \n"}))
    assert "expected at most 4096" in refusal(write_tar(tmp_path / "a.tar", {"s.png": png(), "s.cls": b"1" * 5000}))


def test_a_tar_without_images_and_a_missing_one(tmp_path):
    assert "expected images in 1 container files, got none" in refusal(write_tar(tmp_path / "a.tar", {"a.txt": b""}))
    assert "No such file" in refusal(tmp_path / "no.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    assert "expected a file, got a folder, pipe or device" in refusal(tmp_path / "pipe.tar")


# ------------------------------------------------------------------------------------------------ reading one by one


def test_a_csv_manifest_may_lead_into_containers(tmp_path):
    write_tar(tmp_path / "shards" / "a.tar", {"./real/001.png": png(1)})
    write_parquet(tmp_path / "b.parquet", image_table([png(2), png(3)]))
    digest = hashlib.sha256(png(1)).hexdigest()
    (tmp_path / "m.csv").write_text(
        f"path,image_id,sha256\nshards/a.tar/real/001.png,one,{digest}\nb.parquet/1,two,\nshards/a.tar/no.png,three,\n"
        f"shards/a.tar/../x.png,four,\nb.parquet/2,five,\nb.parquet/-1,six,\nb.parquet,seven,\nm.csv/1,eight,\n"
    )
    table = list_images(tmp_path / "m.csv")
    usable, refused = index_images(table, tmp_path)
    assert {row["image_id"]: row["sha256"] for row in usable.to_pylist()} == {
        "one": digest,
        "two": hashlib.sha256(png(3)).hexdigest(),
    }
    kinds = {row["image_id"]: row["kind"] for row in refused.to_pylist()}
    assert kinds == dict.fromkeys(("three", "four", "five", "six", "eight"), "missing") | {"seven": "not_an_image"}


def test_kinds_of_bad_members(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0.png": b"", "1.png": b"text", "2.png": png()[:-100], "3.png": png()})
    want = {"0.png": "empty", "1.png": "not_an_image", "2.png": "truncated", "4.png": "missing", "3.png/x": "missing"}
    assert {name: kind_of(lambda name=name: load_image(path / name, (8, 8)))[0] for name in want} == want
    assert kind_of(lambda: read_file(path / "3.png", max_bytes=10))[0] == "too_many_bytes"
    rows = write_parquet(tmp_path / "a.parquet", image_table([png()]))
    assert kind_of(lambda: read_file(rows / "0", max_bytes=10))[0] == "too_many_bytes"
    swapped = tmp_path / "b.csv"
    swapped.write_text(f"path,sha256\na.tar/3.png,{'0' * 64}\n")
    (row,) = index_images(list_images(swapped), tmp_path).quarantine.to_pylist()
    assert row["kind"] == "hash_mismatch"


def test_container_of(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.png": png()})
    (tmp_path / "plain").write_bytes(b"")
    assert container_of(tmp_path / "a.tar" / "b" / "c.png") == (tmp_path / "a.tar", "b/c.png")
    assert container_of(tmp_path / "plain" / "c.png") is None
    assert container_of(tmp_path / "no.tar" / "c.png") is None
    assert container_of(tmp_path / "a.tar") is None


def test_a_tar_put_in_the_place_of_another_is_read_anew(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"x.png": png(1)})
    assert read_file(path / "x.png") == png(1)
    write_tar(tmp_path / "b.tar", {"y/y.png": png(3), "x.png": png(2)}).replace(path)
    assert read_file(path / "x.png") == png(2)


def test_many_threads_read_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "_tars", containers._Recent(2))
    monkeypatch.setattr(containers, "_files", containers._Recent(2))
    monkeypatch.setattr(
        containers, "_parts", containers._Recent(2000)
    )  # a few images: others are thrown out all the time
    data = {seed: png(seed) for seed in range(24)}
    wanted = []
    for i in range(4):
        part = range(6 * i, 6 * i + 6)
        tar = write_tar(tmp_path / f"{i}.tar", {f"{seed}.png": data[seed] for seed in part})
        table = image_table([data[seed] for seed in part])
        rows = write_parquet(tmp_path / f"{i}.parquet", table, row_group_size=2)
        arrow = write_saved(tmp_path / f"saved{i}", table) / "data-00000-of-00001.arrow"
        for row, seed in enumerate(part):
            wanted += [(tar / f"{seed}.png", seed), (rows / str(row), seed), (arrow / str(row), seed)]
    wanted *= 10
    random.Random(0).shuffle(wanted)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda item: read_file(item[0]) == data[item[1]], wanted))
    assert threading.active_count() < 20


def test_descriptors_are_bounded_and_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "_tars", containers._Recent(3))
    for i in range(20):
        write_tar(tmp_path / f"{i}.tar", {"a.png": png()})
    before = num_descriptors()
    for i in range(20):
        read_file(tmp_path / f"{i}.tar" / "a.png")
    assert num_descriptors() <= before + 3


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_listing_reads_no_image(tmp_path, monkeypatch):
    table = image_table([os.urandom(200_000) for _ in range(8)], {"label": [0, 1] * 4}, label=CLASS_LABEL)
    write_tar(tmp_path / "tar" / "a.tar", {f"real/{i}.png": os.urandom(200_000) for i in range(8)})
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: read.append(size) or pread(file, size, offset))
    assert len(rows_of(tmp_path / "tar")) == 8
    assert sum(read) < 50_000
    before = pa.total_allocated_bytes()
    listed = (
        list_images(write_parquet(tmp_path / "a.parquet", table)),
        list_images(write_saved(tmp_path / "saved", table)),
    )
    assert [len(one) for one in listed] == [8, 8]
    assert pa.total_allocated_bytes() - before < 100_000


def test_nothing_is_written(tmp_path, monkeypatch):
    sources = [
        write_tar(tmp_path / "a.tar", {"real/1.png": png()}),
        write_parquet(tmp_path / "a.parquet", image_table([png()])),
        write_saved(tmp_path / "saved", image_table([png()])),
    ]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr("tempfile.mkstemp", None)
    monkeypatch.setattr("tempfile.mkdtemp", None)
    opened = []
    os_open = os.open
    monkeypatch.setattr(os, "open", lambda path, flags, *rest: opened.append(flags) or os_open(path, flags, *rest))
    for source in sources:
        assert len(index_images(list_images(source), image_root(source)).usable) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert opened
    assert not any(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) for flags in opened)


# ------------------------------------------------------------------------------------------------- Parquet and Arrow


def test_parquet_of_the_hub(tmp_path):
    data = [png(i) for i in range(5)]
    columns = {"label": [0, 1], "source": ["cam", "gan"]}
    for i in range(2):
        table = image_table(data[2 * i : 2 * i + 2], columns, label=CLASS_LABEL)
        write_parquet(tmp_path / "data" / f"train-{i:05d}-of-00002.parquet", table, row_group_size=1)
    last = image_table(data[4:], {"label": [-1], "source": ["cam"]}, label=CLASS_LABEL)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", last)
    (tmp_path / "README.md").write_text("a card")
    assert list_source(tmp_path, split="train").splits == {"train": 4, "test": 1}
    rows = rows_of(tmp_path, split="train")
    assert [(row["path"], row["label"], row["source"]) for row in rows] == [
        (f"data/train-{i:05d}-of-00002.parquet/{row:08d}", *cells)
        for i in range(2)
        for row, cells in enumerate([("real", "cam"), ("fake", "gan")])
    ]
    assert [image_bytes(tmp_path, str(row["path"])) for row in rows] == data[:4]
    assert rows_of(tmp_path, split="test")[0]["label"] is None
    assert "there are 'test' (1), 'train' (4) rows" in refusal(tmp_path, split="val")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.large_binary())])], ids=str)
def test_other_columns_of_images(tmp_path, kind):
    cells = [{"bytes": png(i)} if pa.types.is_struct(kind) else png(i) for i in range(3)]
    columns = {
        "photo": pa.array(cells, kind),
        "label": pa.array(["a", "b", "a"]).dictionary_encode(),
        "image_id": [5, 3, 4],
    }
    path = write_parquet(tmp_path / "a.parquet", pa.table(columns | {"split": ["test"] * 3, "other": [[1.0]] * 3}))
    rows = rows_of(path, split="test")
    assert [(row["image_id"], row["label"]) for row in rows] == [("3", "b"), ("4", "a"), ("5", "a")]
    assert image_bytes(path, str(rows[0]["path"])) == png(1)


def test_saved_by_datasets(tmp_path):
    data = [png(i) for i in range(5)]
    first, last = (image_table(part, {"label": [1] * len(part)}, label=CLASS_LABEL) for part in (data[:3], data[3:]))
    folder = write_saved(tmp_path / "one", first, last)
    rows = rows_of(folder)
    assert [row["path"] for row in rows][2:4] == [
        "data-00000-of-00002.arrow/00000002",
        "data-00001-of-00002.arrow/00000000",
    ]
    assert {row["label"] for row in rows} == {"fake"}
    assert list_source(folder).splits == {}
    assert [image_bytes(folder, str(row["path"])) for row in rows] == data
    assert image_bytes(folder / "data-00000-of-00002.arrow", "data-00000-of-00002.arrow/1") == data[1]
    write_saved(tmp_path / "both" / "train", first)
    write_saved(tmp_path / "both" / "test", last, split="ignored")
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert list_source(tmp_path / "both").splits == {"train": 3, "test": 2}
    (row, _) = rows_of(tmp_path / "both", split="test")
    assert row["path"] == "test/data-00000-of-00001.arrow/00000000"
    assert image_bytes(tmp_path / "both", str(row["path"])) == data[3]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/test-00001-of-00002-0a1b2c.parquet", "test"),
        ("ood_faces-00000-of-00001.parquet", "ood_faces"),
        ("default/validation/0000.parquet", "validation"),
        ("my-test_shards/0000.parquet", "test"),
        ("faces-val-000001.parquet", "val"),
        ("train/test.parquet", "train"),
        ("train-test.parquet", None),
        ("contest.parquet", None),
    ],
)
def test_the_name_tells_the_split(tmp_path, name, split):
    write_parquet(tmp_path / name, image_table([png()]))
    assert list_source(tmp_path).splits == ({split: 1} if split else {})


def test_a_row_without_bytes_names_a_file_beside_it(tmp_path):
    (tmp_path / "set" / "images").mkdir(parents=True)
    (tmp_path / "set" / "images" / "a.bmp").write_bytes(png(1))
    (tmp_path / "secret.png").write_bytes(png(2))
    paths = ["images/a.bmp", "images/no.png", "../secret.png", str(tmp_path / "secret.png"), "hf://x/y.png", None]
    path = write_parquet(tmp_path / "set" / "a.parquet", image_table([None] * 6, paths=paths))
    usable, refused = index_images(list_images(path), path.parent)
    assert usable["sha256"].to_pylist() == [hashlib.sha256(png(1)).hexdigest()]
    assert refused["kind"].to_pylist() == ["missing"] * 5
    messages = refused["message"].to_pylist()
    assert all("expected one relative to the folder of 'a.parquet'" in message for message in messages[1:4])
    assert "neither bytes nor a path" in messages[4]
    pq.write_table(image_table([png()]).slice(0, 0), path)
    assert "got none" in refusal(path)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pa.table({"text": ["a"]}), "expected one column of images"),
        (pa.table({"a": [b"x"], "b": [b"y"]}), "got ['a', 'b']"),
        (
            pa.table({"image": ["a.png"]}).replace_schema_metadata(features()),
            "expected bytes in the column 'image', got string",
        ),
        (image_table([b"x"], {"labels": [1]}), "the column 'labels' is not read; did you mean 'label'?"),
        (image_table([b"x"], {"label": [0.5]}), "expected text or whole numbers in the column 'label', got double"),
        (image_table([b"x"], {"label": [2]}, label=CLASS_LABEL), "expected numbers below 2, its classes, got 2"),
        (image_table([b"x"], {"label": [0]}, label={"_type": "ClassLabel"}), "names of its classes are damaged"),
        (image_table([b"x"], {"sha256": ["xyz"]}), "row 0 of 'a.parquet': expected a sha256"),
        (image_table([b"x", b"y"], {"image_id": ["a", "a"]}), "row 1 of 'a.parquet': the image_id 'a' is on row 0"),
        (image_table([b"x", b"y"], {"label": ["a", None]}), "row 1 of 'a.parquet': the label is empty"),
        (image_table([b"x"]).append_column("image", pa.array([b"y"])), "twice"),
    ],
    ids=range(11),
)
def test_wrong_tables_are_refused(tmp_path, table, words):
    assert words in refusal(write_parquet(tmp_path / "a.parquet", table))


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"info": 1}', b'{"info": {"features": []}}', b"\xff", b"[" * 100_000])
def test_damaged_metadata_is_refused(tmp_path, text):
    table = pa.table({"image": [b"x"]}).replace_schema_metadata({b"huggingface": text})
    assert "metadata 'huggingface' of its schema is damaged" in refusal(write_parquet(tmp_path / "a.parquet", table))


def test_damaged_tables_are_refused(tmp_path):
    table = image_table([png(i) for i in range(9)], {"label": ["a"] * 9})
    parquet = write_parquet(tmp_path / "a.parquet", table)
    arrow = write_saved(tmp_path / "saved", table) / "data-00000-of-00001.arrow"
    for path in (parquet, arrow):
        whole = path.read_bytes()
        for length in (0, 3, 100, len(whole) // 2, len(whole) - 9, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert "damaged or of another format" in refusal(path)
            assert kind_of(lambda path=path: read_file(path / "1"))[0] == "unreadable"
        path.write_bytes(os.urandom(5000))
        assert "damaged or of another format" in refusal(path)


def test_damaged_names_and_counts_are_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", image_table([png()], {"column": ["a"]}))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"column", b"colu\xe9\xe9"))
    assert "damaged or of another format" in refusal(path)
    many = pa.table({"image": pa.nulls(5_000_000, pa.binary())})  # a row takes no bytes: a file of any length is small
    assert "5000000 rows in a file of" in refusal(write_parquet(tmp_path / "b.parquet", many))


def test_wrong_offsets_in_an_arrow_file_are_not_followed(tmp_path):
    table = image_table([b"A" * 1000, b"B" * 1000, b"C" * 1000])
    path = write_saved(tmp_path / "saved", table, batch_rows=3) / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    offsets = np.array([0, 1000, 2000, 3000], "<i4").tobytes()
    assert whole.count(offsets) == 1
    path.write_bytes(whole.replace(offsets, np.array([0, 1000, 2**31 - 9, 3000], "<i4").tobytes()))
    assert kind_of(lambda: read_file(path / "1"))[0] == "unreadable"


@pytest.mark.parametrize(
    "state",
    [b"{", b"[]", b"{}", b'{"_data_files": [{"filename": "../evil.arrow"}]}', b'{"_data_files": [{"filename": "/etc/x"}]}',
     b'{"_data_files": [1]}', b'{"_data_files": 5}', b'{"_data_files": [{"filename": "data.arrow"}], "_indices_files": [1]}'],
    ids=range(8),
)  # fmt: skip
def test_damaged_state_is_refused(tmp_path, state):
    folder = write_saved(tmp_path / "saved", image_table([png()]))
    (folder / "state.json").write_bytes(state)
    assert "state.json" in refusal(folder)


def test_a_row_group_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", image_table([os.urandom(5000) for _ in range(4)]))
    monkeypatch.setattr(containers, "MAX_ROW_GROUP", 10_000)
    kind, message = kind_of(lambda: read_file(path / "0"))
    assert kind == "too_many_bytes"
    assert "smaller row groups" in message


# --------------------------------------------------------------------------------------------------- which it is, all


def test_a_folder_of_images_stays_one_and_says_what_it_leaves_out(tmp_path, write_config):
    (tmp_path / "set" / "real").mkdir(parents=True)
    (tmp_path / "set" / "real" / "1.png").write_bytes(png())
    write_tar(tmp_path / "set" / "a.tar", {"fake/1.png": png()})
    assert [row["path"] for row in rows_of(tmp_path / "set")] == ["real/1.png"]
    config = load_config(write_config(data=f"manifest = {json.dumps(str(tmp_path / 'set'))}"))
    assert (
        "its 1 container files are left out, first 'a.tar'"
        in warnings_of(config, [], pa.table({"label": ["real"]}), list_data(config))[0]
    )


def test_linked_folders_are_looked_into_once(tmp_path):
    write_tar(tmp_path / "far" / "a.tar", {"real/1.png": png()})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "near").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "circle").symlink_to(tmp_path / "far")
    assert [row["path"] for row in rows_of(tmp_path / "set")] == ["near/a.tar/real/1.png"]
    assert image_bytes(tmp_path / "set", "near/a.tar/real/1.png") == png()
    (tmp_path / "far" / "real").mkdir()
    (tmp_path / "far" / "real" / "1.png").write_bytes(png())
    assert {row["path"] for row in rows_of(tmp_path / "set")} == {"near/real/1.png"}


def test_kinds_are_not_mixed(tmp_path):
    write_tar(tmp_path / "a.tar", {"fake/1.png": png()})
    write_parquet(tmp_path / "a.parquet", image_table([png()]))
    assert "expected container files of one kind, got .parquet, .tar" in refusal(tmp_path)


def pack(images: Path, folder: Path, kind: str) -> Path:
    """The images of a manifest in a container of a kind, with the manifest's image_ids."""
    names = sorted(str(path.relative_to(images.parent)) for path in images.parent.rglob("*.png"))
    data = [(images.parent / name).read_bytes() for name in names]
    labels, sources = zip(*(name.split("/")[:2] for name in names), strict=True)
    if kind == "tar":
        said = [
            {"label": a, "source": b, "split": "test", "image_id": c}
            for a, b, c in zip(labels, sources, names, strict=True)
        ]
        members = [(f"{i:06d}.png", image) for i, image in enumerate(data)]
        members += [(f"{i:06d}.json", json.dumps(one).encode()) for i, one in enumerate(said)]
        return write_tar(folder / "images.tar", members)
    numbers = [CLASS_LABEL["names"].index(label) for label in labels]
    columns = {"label": numbers, "source": sources, "image_id": names, "split": ["test"] * len(names)}
    table = image_table(data, columns, label=CLASS_LABEL)
    if kind == "saved":
        return write_saved(folder / "saved", table.slice(0, 9), table.slice(9))
    write_parquet(folder / "set" / "train-00000-of-00002.parquet", table.slice(0, 9), row_group_size=4)
    write_parquet(folder / "set" / "train-00001-of-00002.parquet", table.slice(9), row_group_size=4)
    return folder / "set"


@pytest.fixture(scope="module")
def run_of_the_folder(tmp_path_factory, images, weights, detector_table) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    names = sorted(str(path.relative_to(images.parent)) for path in images.parent.rglob("*.png"))
    lines = [f"{images.parent / name},{name.split('/')[0]},{name.split('/')[1]},test,{name}" for name in names]
    (folder / "m.csv").write_text("\n".join(["path,label,source,split,image_id", *lines]))
    config = folder / "config.toml"
    config.write_text(explain_config(folder / "m.csv", weights, detector_table))
    return explain_run(load_config(config), folder / "run").folder


def explain_config(manifest: Path, weights: Path, detector_table: Callable[..., str]) -> str:
    return (
        f"name = 'tiny'\n{detector_table('a', f'{weights}/seed0.safetensors')}\n"
        f"[data]\nmanifest = {json.dumps(str(manifest))}\nsplit = 'test'\n"
        "[measures]\nstability = false\nfocus = false\nresilience = false\n"
        "[compute]\ndevice = 'cpu'\nbatch_size = 8\nshard_size = 10\n"
    )


def part_files(run: Path) -> dict[str, bytes]:
    """By number; their names hold a hash of the paths as well."""
    return {path.name.rpartition("-")[0]: path.read_bytes() for path in (run / "maps").rglob("*.parquet")}


@pytest.mark.parametrize("kind", ["tar", "parquet", "saved"])
def test_explain_gives_the_part_files_of_the_folder(
    tmp_path, monkeypatch, capsys, images, weights, detector_table, run_of_the_folder, kind
):
    config = tmp_path / "config.toml"
    config.write_text(explain_config(pack(images, tmp_path, kind), weights, detector_table))
    for arguments in (["check", config], ["explain", config, "--out", tmp_path / "run"]):
        monkeypatch.setattr("sys.argv", ["explain2me", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, capsys.readouterr().err
    found = part_files(tmp_path / "run")
    assert len(found) == 3
    assert found == part_files(run_of_the_folder)
    run = open_run(tmp_path / "run")
    material = Material(run, *[pd.DataFrame()] * 7, columns=[])  # what the report shows of an image
    assert all(material.pixels(image, (96, 96)) is not None for image in range(len(run.image_table)))


def test_training_reads_images_and_human_maps_in_a_tar(tmp_path, write_config):
    members: dict[str, bytes] = {}
    for i in range(8):
        label = ("real", "fake")[i % 2]
        said = {"label": label, "split": ("train", "test")[i // 4]}
        members |= {f"{i}.png": png(i), f"{i}.json": json.dumps(said).encode(), f"{i}.salience.png": png(i)}
    path = write_tar(tmp_path / "a.tar", members)
    text = f"manifest = {json.dumps(str(path))}\nsplit = 'test'"
    training = (
        "[training]\narchitectures = ['timm:test_resnet']\nsplit = 'train'\nbatch_size = 4\n"
        "[[training.strategies]]\nname = 'guided'\nloss = 'cyborg'\n"
    )
    config = load_config(write_config(data=text, extra=training))
    splits = read_splits(config, config.training)
    assert splits.classes == ("real", "fake")
    assert len(splits.training.files) == 4
    human_maps = read_human_maps(config.training.strategies[0], splits.training, (16, 16))
    assert human_maps.record["maps"] == 4
    assert human_maps.files == [path / f"{i}.salience.png" for i in range(4)]
    tested = load_config(write_config(data=text, extra=training.replace("'train'", "'test'")))
    with pytest.raises(ConfigError, match="4 images would be trained on and tested"):
        read_splits(tested, tested.training)


@pytest.mark.parametrize("kind", ["string", "dictionary"])
def test_a_parquet_file_that_unpacks_to_far_more_than_it_holds_is_refused(tmp_path, kind):
    labels = pa.array(["x" * 200_000] * 400)
    table = pa.table({"image": [png()] * 400, "label": labels.dictionary_encode() if kind == "dictionary" else labels})
    path = write_parquet(tmp_path / "bomb.parquet", table)
    assert path.stat().st_size < 1_000_000
    assert "unpack to more than" in refusal(path)


def test_images_that_unpack_to_more_than_a_row_group_may_hold_are_not_read(tmp_path, monkeypatch):
    picture = png(side=64)
    path = write_parquet(tmp_path / "bomb.parquet", pa.table({"image": [picture] * 1000, "label": ["a", "b"] * 500}))
    monkeypatch.setattr(containers, "MAX_ROW_GROUP", 20 * len(picture))
    assert path.stat().st_size < 10 * len(picture)
    assert kind_of(lambda: read_file(path / "0"))[0] == "too_many_bytes"
