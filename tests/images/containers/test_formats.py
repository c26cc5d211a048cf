"""All formats: images are the same as those of a folder, read by one path, many threads, and nothing is written."""

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from container_files import (
    CLASS_LABEL,
    image_table,
    kind_of,
    png,
    rows_of,
    write_parquet,
    write_saved,
    write_tar,
)

from explain2me.cli.entry import main
from explain2me.config.load import load_config
from explain2me.errors import MachineError
from explain2me.images.containers import tables
from explain2me.images.containers import tar as tar_module
from explain2me.images.containers.opened import Recent
from explain2me.images.decode import load_image
from explain2me.images.examine import index_images
from explain2me.images.listing import image_root, list_images
from explain2me.images.reading import read_file
from explain2me.report.material import Material
from explain2me.report.summary import Tables
from explain2me.run.folder import open_run
from explain2me.stages.explain import explain_run


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


def test_many_threads_read_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_module, "OPEN_TARS", Recent(2))
    monkeypatch.setattr(tables, "OPEN_TABLES", Recent(2))
    monkeypatch.setattr(
        tables, "IMAGE_PARTS", Recent(2000, cost=lambda images: images.nbytes)
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
    material = Material(run, Tables(run), pd.DataFrame())  # the report reads the images through it
    assert all(material.pixels(image) is not None for image in range(len(run.image_table)))


KEPT_OPEN = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from pathlib import Path
from explain2me.images.reading import read_file
for i in range(70):
    read_file(Path(f"{i}.tar/a.png"))
    read_file(Path(f"{i}.parquet/0"))
names = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
print(sum(name.endswith((".tar", ".parquet")) for name in names))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_containers_kept_open_are_less_than_half_of_the_files_that_may_be(tmp_path):
    for i in range(70):
        write_tar(tmp_path / f"{i}.tar", {"a.png": png(i)})
        write_parquet(tmp_path / f"{i}.parquet", image_table([png(i)]))
    done = subprocess.run([sys.executable, "-c", KEPT_OPEN], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert 2 <= int(done.stdout) < 32


def test_too_little_memory_is_not_blamed_on_a_table(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", image_table([png()]))

    def fail(*_, **__):
        raise pa.ArrowMemoryError("malloc of size 8 failed")

    monkeypatch.setattr("pyarrow.parquet.ParquetFile.iter_batches", fail)
    with pytest.raises(MemoryError):
        read_file(path / "0")


def test_a_lost_container_is_not_blamed_on_its_images(tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / f"{name}.tar", {"1.png": png()})
    table = list_images(tmp_path)
    (tmp_path / "b.tar").unlink()
    with pytest.raises(MachineError, match=r"b\.tar' is missing or empty; is its disk there\?"):
        index_images(table, tmp_path)
