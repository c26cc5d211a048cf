"""Parquet files that need far more memory than they are long."""

import os

import pyarrow as pa
import pytest
from container_files import image_table, kind_of, png, refusal, write_parquet

from explain2me.images.containers import parquet, tables
from explain2me.images.containers.opened import Recent
from explain2me.images.reading import read_file


def test_damaged_names_and_counts_are_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", image_table([png()], {"column": ["a"]}))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"column", b"colu\xe9\xe9"))
    assert "cannot be read as a table" in refusal(path)
    many = pa.table({"image": pa.nulls(5_000_000, pa.binary())})  # a row takes no bytes: a file of any length is small
    assert "5000000 rows in a file of" in refusal(write_parquet(tmp_path / "b.parquet", many))


def test_a_row_group_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", image_table([os.urandom(5000) for _ in range(4)]))
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP", 10_000)
    kind, message = kind_of(lambda: read_file(path / "0"))
    assert kind == "too_many_bytes"
    assert "smaller row groups" in message


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
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP", 20 * len(picture))
    assert path.stat().st_size < 10 * len(picture)
    assert kind_of(lambda: read_file(path / "0"))[0] == "too_many_bytes"


def test_row_groups_that_were_read_do_not_pile_up_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "IMAGE_PARTS", Recent(2 * 2**20, cost=lambda images: images.nbytes))
    images = image_table([os.urandom(2**20) for _ in range(8)])
    path = write_parquet(tmp_path / "a.parquet", images, row_group_size=1)
    before = pa.total_allocated_bytes()
    for row in range(8):
        read_file(path / str(row))
    assert pa.total_allocated_bytes() - before < 4 * 2**20
