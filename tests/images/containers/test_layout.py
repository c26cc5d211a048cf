"""Which files of a folder are containers, and which split they are."""

import json

import pyarrow as pa
import pytest
from container_files import (
    CLASS_LABEL,
    image_bytes,
    image_table,
    png,
    refusal,
    rows_of,
    write_parquet,
    write_saved,
    write_tar,
)

from explain2me.config.load import load_config
from explain2me.images.containers import container_of
from explain2me.images.listing import list_source
from explain2me.images.select import list_data
from explain2me.stages.check import warnings_of


def test_container_of(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.png": png()})
    (tmp_path / "plain").write_bytes(b"")
    assert container_of(tmp_path / "a.tar" / "b" / "c.png") == (tmp_path / "a.tar", "b/c.png")
    assert container_of(tmp_path / "plain" / "c.png") is None
    assert container_of(tmp_path / "no.tar" / "c.png") is None
    assert container_of(tmp_path / "a.tar") is None


def test_a_folder_may_be_called_as_its_files_are(tmp_path):
    folder = tmp_path / "faces.parquet"  # as Spark and Dask do
    folder.mkdir()
    write_parquet(folder / "part-00000.parquet", image_table([png(), png(1)]))
    assert len(rows_of(folder)) == 2


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
        ("test/data-00000-of-00001.parquet", "test"),
    ],
)
def test_the_name_tells_the_split(tmp_path, name, split):
    write_parquet(tmp_path / name, image_table([png()]))
    assert list_source(tmp_path).splits == ({split: 1} if split else {})


@pytest.mark.parametrize(
    "state",
    [b"{", b"[]", b"{}", b'{"_data_files": [{"filename": "../evil.arrow"}]}', b'{"_data_files": [{"filename": "/etc/x"}]}', b'{"_data_files": [{"filename": ".."}]}',
     b'{"_data_files": [1]}', b'{"_data_files": 5}', b'{"_data_files": [{"filename": "data.arrow"}], "_indices_files": [1]}'],
    ids=range(9),
)  # fmt: skip
def test_damaged_state_is_refused(tmp_path, state):
    folder = write_saved(tmp_path / "saved", image_table([png()]))
    (folder / "state.json").write_bytes(state)
    assert "state.json" in refusal(folder)


def test_a_folder_of_images_stays_one_and_says_what_it_leaves_out(tmp_path, write_config):
    (tmp_path / "set" / "real").mkdir(parents=True)
    (tmp_path / "set" / "real" / "1.png").write_bytes(png())
    write_tar(tmp_path / "set" / "a.tar", {"fake/1.png": png()})
    assert [row["path"] for row in rows_of(tmp_path / "set")] == ["real/1.png"]
    config = load_config(write_config(data=f"manifest = {json.dumps(str(tmp_path / 'set'))}"))
    assert (
        "its 1 container files are left out, first 'a.tar'"
        in warnings_of(config, [], pa.table({"label": ["real"]}), list_data(config.data))[0]
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


def test_hidden_files_are_no_containers(tmp_path):
    for name in ("a.tar", ".b.tar", ".hidden/c.tar"):
        write_tar(tmp_path / name, {"real/1.png": png()})
    assert [row["path"] for row in rows_of(tmp_path)] == ["a.tar/real/1.png"]


def test_kinds_are_not_mixed(tmp_path):
    write_tar(tmp_path / "a.tar", {"fake/1.png": png()})
    write_parquet(tmp_path / "a.parquet", image_table([png()]))
    assert "expected container files of one kind, got .parquet, .tar" in refusal(tmp_path)
