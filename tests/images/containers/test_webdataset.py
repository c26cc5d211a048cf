"""Samples in tars: grouped and labelled as WebDataset does."""

import hashlib
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from container_files import (
    image_bytes,
    png,
    refusal,
    rows_of,
    write_tar,
)
from small_trainings import all_splits

from explain2me.config.load import load_config
from explain2me.errors import ConfigError
from explain2me.images.listing import list_images, list_source
from explain2me.train.human_maps import read_human_maps


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
        "v1.0/s2.salience.png": png(5),
        ".hidden.png": b"",
        ".hidden/s3.png": b"",
        "__meta__.json": b"[]",
    }
    path = write_tar(tmp_path / "shards" / "0.tar", members)
    table = list_images(path.parent, extra=("salience",), classes=("real", "fake"))
    assert table.to_pylist() == [
        {"image_id": "0.tar/s1.PNG", "path": "0.tar/s1.PNG", "label": "fake", "source": "gan", "expected_sha256": "a" * 64, "salience": "0.tar/s1.salience.png"},
        {"image_id": "0.tar/v1.0/s2.jpg.png", "path": "0.tar/v1.0/s2.jpg.png", "label": "real", "source": "cam", "expected_sha256": None, "salience": "maps/s2.npy"},
    ]  # fmt: skip
    assert list_source(path.parent, classes=("real", "fake")).num_ignored == 5
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
        ({"json": b'{"label": 1.0}'}, ("real", "fake"), "fake"),
        ({"json": b'{"label": 1.0}'}, None, "1"),
        ({"json": b'{"label": true}'}, ("real", "fake"), "True"),
        ({"json": b'{"label": "1"}'}, ("real", "fake"), "1"),
        ({"json": b'{"label": "None"}'}, None, "None"),
        ({"cls": b"nan"}, None, "nan"),
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
    (tmp_path / "00000.parquet").write_bytes(b"damaged")
    assert "container files of one kind" in refusal(tmp_path)
    (tmp_path / "00000.parquet").unlink()
    pq.write_table(pa.table({"url": ["a"]}), tmp_path / "other.parquet")
    assert "container files of one kind" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[1, 2]", "expected a JSON object {...}, got a list"),
        (b"{", "no valid JSON"),
        (b"\xff\xfe\xfd", "no valid JSON"),
        (b"[" * 200_000, "no valid JSON"),
        (b'{"label": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b"{" + b" " * 2**20 + b"}", "expected at most 1048576"),
        (b'{"label": ["real"]}', "label: expected text, a whole number, true or false, got a list"),
        (b'{"label": 0.5}', "label: expected text, a whole number, true or false, got 0.5; write it as text"),
        (b'{"label": NaN}', "got nan"),
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
    splits = all_splits(config)
    assert splits.classes == ("real", "fake")
    assert len(splits.training.files) == 4
    human_maps = read_human_maps(config.training.strategies[0], splits.training, (16, 16))
    assert human_maps.record["maps"] == 4
    assert human_maps.files == [path / f"{i}.salience.png" for i in range(4)]
    tested = load_config(write_config(data=text, extra=training.replace("'train'", "'test'")))
    with pytest.raises(ConfigError, match="4 images would be trained on and tested"):
        all_splits(tested)
