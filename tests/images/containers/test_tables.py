"""Parquet and Arrow files with the columns and the metadata that ``datasets`` writes."""

import hashlib
import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from container_files import (
    CLASS_LABEL,
    features,
    image_bytes,
    image_table,
    kind_of,
    png,
    refusal,
    rows_of,
    write_parquet,
    write_saved,
)

from explain2me.images.examine import index_images
from explain2me.images.listing import list_images, list_source
from explain2me.images.reading import read_file


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
        (
            image_table([b"x"], {"label": [0.5]}),
            "a.parquet', label: expected text, a whole number, true or false, got 0.5",
        ),
        (
            image_table([b"x"], {"label": [float("nan")]}),
            "label: expected text, a whole number, true or false, got nan",
        ),
        (image_table([b"x"], {"label": [2.0**53]}), "got 9007199254740992.0; write it as text"),
        (image_table([b"x"], {"label": [b"a"]}), "expected text or numbers in the column 'label', got binary"),
        (image_table([b"x"], {"label": [2]}, label=CLASS_LABEL), "expected numbers below 2, its classes, got 2"),
        (image_table([b"x"], {"label": [0]}, label={"_type": "ClassLabel"}), "classes have no list of names"),
        (image_table([b"x"], {"sha256": ["xyz"]}), "row 0 of 'a.parquet': expected a sha256"),
        (image_table([b"x", b"y"], {"image_id": ["a", "a"]}), "row 1 of 'a.parquet': the image_id 'a' is on row 0"),
        (image_table([b"x", b"y"], {"label": ["a", None]}), "row 1 of 'a.parquet': the label is empty"),
        (image_table([b"x"]).append_column("image", pa.array([b"y"])), "twice"),
    ],
    ids=range(14),
)
def test_wrong_tables_are_refused(tmp_path, table, words):
    assert words in refusal(write_parquet(tmp_path / "a.parquet", table))


@pytest.mark.parametrize(
    ("labels", "classes", "texts"),
    [
        ([0, 1], None, ["0", "1"]),
        ([0, 1], ("real", "fake"), ["real", "fake"]),
        ([0.0, 1.0], None, ["0", "1"]),
        ([0.0, 1.0], ("real", "fake"), ["real", "fake"]),
        ([False, True], None, ["False", "True"]),
        ([False, True], ("real", "fake"), ["False", "True"]),
        (["nan", "None"], None, ["nan", "None"]),
        (["1.0", "true"], None, ["1.0", "true"]),
        (pd.Categorical([0, 1]), None, ["0", "1"]),
        (pd.array([0, 1], "Int64"), None, ["0", "1"]),
        ([np.nan, np.nan], None, [None, None]),
        ([None, None], None, [None, None]),
    ],
    ids=str,
)
def test_labels_of_a_data_frame_keep_their_meaning(tmp_path, labels, classes, texts):
    frame = pd.DataFrame({"image": [png(0), png(1)], "label": labels})
    frame.to_parquet(tmp_path / "a.parquet")
    assert [row["label"] for row in rows_of(tmp_path / "a.parquet", classes=classes)] == texts


@pytest.mark.parametrize("labels", [[0, 1, None], [True, False, None], ["nan", "a", None]], ids=str)
def test_a_null_among_labels_is_refused_in_every_format(tmp_path, labels):
    frame = pd.DataFrame({"image": [png(0), png(1), png(2)], "label": labels})
    frame.to_parquet(tmp_path / "a.parquet")
    assert "row 2 of 'a.parquet': the label is empty; fill it in every row" in refusal(tmp_path / "a.parquet")
    frame.assign(path=["a", "b", "c"]).drop(columns="image").to_csv(tmp_path / "a.csv", index=False)
    assert "line 4: the label is empty; fill it in every row" in refusal(tmp_path / "a.csv")


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"info": 1}', b'{"info": {"features": []}}', b"\xff", b"[" * 100_000])
def test_damaged_metadata_is_refused(tmp_path, text):
    table = pa.table({"image": [b"x"]}).replace_schema_metadata({b"huggingface": text})
    assert "metadata 'huggingface' of its schema is not as datasets writes it" in refusal(
        write_parquet(tmp_path / "a.parquet", table)
    )


def test_damaged_tables_are_refused(tmp_path):
    table = image_table([png(i) for i in range(9)], {"label": ["a"] * 9})
    parquet = write_parquet(tmp_path / "a.parquet", table)
    arrow = write_saved(tmp_path / "saved", table) / "data-00000-of-00001.arrow"
    for path in (parquet, arrow):
        whole = path.read_bytes()
        for length in (0, 3, 100, len(whole) // 2, len(whole) - 9, len(whole) - 8, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert "cannot be read as a table" in refusal(path)
            assert kind_of(lambda path=path: read_file(path / "1"))[0] == "unreadable"
        path.write_bytes(os.urandom(5000))
        assert "cannot be read as a table" in refusal(path)


def test_the_column_called_image_is_the_one_that_is_meant(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", pa.table({"depth": [b"x"], "image": [png(1)]}))
    assert image_bytes(path, str(rows_of(path)[0]["path"])) == png(1)


def test_a_row_is_a_number_of_few_digits(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", image_table([png()]))
    for name in ("0" * 5000, "²", "+0", "1"):
        assert kind_of(lambda name=name: read_file(path / name))[0] == "missing"
