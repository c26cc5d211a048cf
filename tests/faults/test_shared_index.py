"""Several machines index the images of one folder; any of them may begin the run at any moment."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from explain2me.config.load import parse_config
from explain2me.errors import MachineError
from explain2me.images.listing import list_images
from explain2me.stages import index
from explain2me.stages.begin import begin_run
from explain2me.stages.index import forget_chunks, index_run
from explain2me.workers import Engine


@pytest.fixture
def small_set(tmp_path, make_images):
    """The manifest of four images."""
    return make_images(tmp_path / "images", counts={("fake", "a"): 2, ("real", "b"): 2}, size=64)


@pytest.fixture
def on_sync(monkeypatch):
    """Let another machine act right after a file was synced, before it gets its name: (action of the path)."""
    sync = os.fsync

    def install(action: Callable[[Path], object]) -> None:
        def synced(handle: int) -> None:
            sync(handle)
            action(Path(f"/proc/self/fd/{handle}").readlink())

        monkeypatch.setattr(os, "fsync", synced)

    return install


def test_a_machine_continues_when_another_begins_the_run_during_its_index(tmp_path, small_set, on_sync):
    folder, images = tmp_path / "run", list_images(small_set)
    begun: list[Path] = []

    def other_machine(path: Path) -> None:
        if path.parent != folder / "index":
            return
        (folder / "run.json").write_text("{}")
        forget_chunks(folder)
        begun.append(path)

    on_sync(other_machine)
    assert index_run(images, small_set, folder, Engine(), max_pixels=10**6) is None
    assert begun
    (folder / "run.json").unlink()
    on_sync(lambda path: shutil.rmtree(folder / "index", ignore_errors=True))
    with pytest.raises(FileNotFoundError):  # nobody has begun it: something else removes files
        index_run(images, small_set, folder, Engine(), max_pixels=10**6)


def test_a_machine_indexes_again_when_another_found_no_usable_image(tmp_path, small_set, on_sync):
    folder, images = tmp_path / "run", list_images(small_set)
    removed: list[Path] = []

    def other_machine(path: Path) -> None:
        if not removed and path.parent == folder / "index":
            removed.append(path)
            forget_chunks(folder)

    for path in images["path"].to_pylist():
        (small_set.parent / path).write_bytes(b"")
    on_sync(other_machine)
    usable, refused = index_run(images, small_set, folder, Engine(), max_pixels=10**6)
    assert removed
    assert (len(usable), len(refused)) == (0, 4)


@pytest.mark.parametrize("moment", ["read_parquet", "write_parquet", "crash"])
def test_another_machine_may_begin_the_run_and_remove_the_index_at_any_moment(tmp_path, small_set, monkeypatch, moment):
    folder, images = tmp_path / "run", list_images(small_set)
    begun: list[str] = []

    def begin(*_, **__):
        (folder / "run.json").write_text("{}")
        forget_chunks(folder)
        begun.append(moment)
        raise FileNotFoundError(folder / "index")

    def processes_die_of_the_third_image(work, missing, engine, *, after_death, after_task, **_):
        queue = list(missing)
        while not begun:
            attempt = queue.pop(0)
            deadly = attempt.start <= 2 < attempt.stop
            queue = [*(after_death if deadly else after_task)(attempt), *queue]
        yield from ()

    if moment == "crash":
        monkeypatch.setattr("explain2me.workers.crash_search.run_tasks", processes_die_of_the_third_image)
    monkeypatch.setattr(index, "write_parquet" if moment == "crash" else moment, begin)
    assert index_run(images, small_set, folder, Engine(), max_pixels=10**6) is None
    assert begun


def test_all_machines_join_the_chunk_that_was_first(tmp_path, small_set, monkeypatch):
    folder, images = tmp_path / "run", list_images(small_set)
    write = index.write_parquet

    def another_is_first(table, path, **options):
        write(table.slice(1), path)  # an image that it could not read
        write(table, path, **options)

    monkeypatch.setattr(index, "write_parquet", another_is_first)
    usable, _ = index_run(images, small_set, folder, Engine(), max_pixels=10**6)
    assert len(usable) == 3


def test_an_index_of_other_images_or_of_a_lost_disk_is_not_taken_up(tmp_path, make_images):
    engine = Engine()
    for name in ("v1", "v2"):
        make_images(tmp_path / name, counts={("fake", "a"): 2, ("real", "b"): 2}, size=64 if name == "v1" else 72)
    found = []
    for name in ("v1", "v2"):
        source = tmp_path / name / "manifest.csv"
        usable, _ = index_run(list_images(source), source, tmp_path / "run", engine, max_pixels=10**6)
        found.append(set(usable["width"].to_pylist()))
    assert found == [{64}, {72}]
    forget_chunks(tmp_path / "run")
    config = parse_config(
        {
            "name": "x",
            "data": {"manifest": str(tmp_path / "v1" / "manifest.csv")},
            "detectors": [{"name": "d", "architecture": "timm:test_resnet", "random_runs": 2}],
            "compute": {"device": "cpu"},
        }
    )
    (tmp_path / "v1" / "fake").rename(tmp_path / "fake")
    (tmp_path / "v1" / "real").rename(tmp_path / "real")
    with pytest.raises(MachineError, match="fake/a' is missing or empty"):
        begin_run(config, tmp_path / "again")
    (tmp_path / "fake").rename(tmp_path / "v1" / "fake")
    (tmp_path / "real").rename(tmp_path / "v1" / "real")
    assert len(begin_run(config, tmp_path / "again").image_table) == 4
