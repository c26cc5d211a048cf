import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from image_rows import GROUPS, image_rows

from explain2me.config.load import parse_config
from explain2me.errors import RunFolderError
from explain2me.run.files import atomic_path, write_json, write_parquet
from explain2me.run.folder import Run, open_run, stretches_of
from explain2me.run.leftovers import remove_leftovers
from explain2me.run.packs import pack_folder, read_parquet
from explain2me.run.plan import plan
from explain2me.run.record import Model
from explain2me.stages.compact import compact_run


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), atomic_path(tmp_path / "a" / "x.json") as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert list((tmp_path / "a").iterdir()) == []


def test_only_the_first_machine_writes_a_file_that_is_not_to_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    assert write_json({"by": "first"}, path, replace=False)
    monkeypatch.setattr(Path, "exists", lambda self: False)  # as a network drive answers from an old cache
    assert not write_json({"by": "second"}, path, replace=False)
    assert json.loads(path.read_text()) == {"by": "first"}


def test_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    table = pa.table({"x": [1, 2, 3]})
    for name in ("a", "b"):
        write_parquet(table, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "part.parquet"
    write_parquet(pa.table({"x": np.arange(5000)}), path)
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-10])
    else:
        data[100] ^= 0xFF
        path.write_bytes(data)
    with pytest.raises(RunFolderError, match=r"part\.parquet (is missing|cannot be read)"):
        read_parquet(path)


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"is not a run folder: it has no run\.json"):
        open_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match="cannot be read"):
        open_run(tmp_path)
    (tmp_path / "run.json").write_text('{"schema": 99}')
    with pytest.raises(RunFolderError, match="expected schema 1, got 99"):
        open_run(tmp_path)


def test_stretches_are_groups_of_label_and_source() -> None:
    found = [(s.label, s.source, s.stop - s.start) for s in stretches_of(image_rows(GROUPS))]
    assert found == [(label, source, count) for (label, source), count in GROUPS.items()]


def run_folder(folder: Path, images: pa.Table, **compute: object) -> Run:
    """A run.json and images.parquet, without any map."""
    folder.mkdir(exist_ok=True)
    detectors = [{"name": "d", "architecture": "timm:x", "random_runs": 2}]
    compute_table = {"shard_size": 16, "device": "cpu"} | compute
    config = parse_config({"name": "x", "data": {"manifest": "m"}, "detectors": detectors, "compute": compute_table})
    models = [
        Model(
            "d", f"r{i}", "timm:x", None, i, str(i), "layer", (64, 64), 2, (0.5,) * 3, (0.5,) * 3, "bilinear"
        ).__dict__
        for i in range(2)
    ]
    record = {
        "schema": 1,
        "config": json.loads(config.model_dump_json()),
        "classes": ["real", "fake"],
        "models": models,
    }
    (folder / "run.json").write_text(json.dumps(record))
    write_parquet(images, folder / "images.parquet")
    return open_run(folder)


def test_the_plan_covers_every_model_and_image_once(tmp_path: Path) -> None:
    run = run_folder(tmp_path, image_rows(GROUPS))
    covered = [(shard.model.run, image) for shard in plan(run) for image in range(shard.start, shard.stop)]
    assert sorted(covered) == sorted(itertools.product(("r0", "r1"), range(50)))
    assert len({shard.path(tmp_path) for shard in plan(run)}) == len(plan(run))


def test_the_key_of_a_shard_holds_what_decides_its_bytes(tmp_path: Path) -> None:
    images = image_rows(GROUPS)
    keys = [shard.key for shard in plan(run_folder(tmp_path / "a", images))]
    again = [shard.key for shard in plan(run_folder(tmp_path / "b", images))]
    assert keys == again  # not the folder
    assert keys == [shard.key for shard in plan(run_folder(tmp_path / "b", images, workers=2))]
    other_batch = [shard.key for shard in plan(run_folder(tmp_path / "b", images, batch_size=16))]
    assert not set(keys) & set(other_batch)
    other_threads = [shard.key for shard in plan(run_folder(tmp_path / "b", images, threads=2))]
    assert not set(keys) & set(other_threads)
    changed = images.set_column(7, "sha256", pa.array(["1"] + ["0"] * 49))
    other_image = [shard.key for shard in plan(run_folder(tmp_path / "c", changed))]
    assert [a == b for a, b in zip(keys, other_image, strict=True)] == [False, True, True, True] * 2


def test_leftovers_are_looked_for_while_another_machine_removes_folders(tmp_path: Path, monkeypatch) -> None:
    for name in ("index", "maps"):
        (tmp_path / name).mkdir()
    left = tmp_path / "maps" / ".tmp-elsewhere-1-abc.tmp"
    left.touch()
    os.utime(left, (0, 0))
    scan = os.scandir

    def removed_before(path):
        if Path(path).name == "index":
            Path(path).rmdir()
        return scan(path)

    monkeypatch.setattr(os, "scandir", removed_before)
    assert remove_leftovers(tmp_path) == 1
    assert not (tmp_path / "index").exists()


def test_what_a_dead_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from explain2me.run.files import atomic_path; import os, signal\n"
    code += "with atomic_path(Path(sys.argv[1])) as path:\n    path.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a" / "x.json")], check=False)
    assert len(list((tmp_path / "a").iterdir())) == 1
    with atomic_path(tmp_path / "a" / "y.json") as ours:
        ours.write_text("whole")
        (tmp_path / "a" / ".tmp-elsewhere-1-abc.tmp").touch()
        assert remove_leftovers(tmp_path) == 1
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".tmp-elsewhere-1-abc.tmp", "y.json"]
    os.utime(tmp_path / "a" / ".tmp-elsewhere-1-abc.tmp", (0, 0))
    assert remove_leftovers(tmp_path) == 1


def test_a_killed_process_leaves_no_lock_and_a_living_one_keeps_its_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    code = "import sys; from explain2me.run.leftovers import temporary_prefix\n"
    code += "print(temporary_prefix(), flush=True); sys.stdin.read()"
    living, killed, ended = (
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    )
    prefixes = [process.stdout.readline().strip() for process in (living, killed, ended)]
    for prefix in prefixes:
        (tmp_path / f"{prefix}0.tmp").touch()
    killed.kill()
    killed.communicate()
    assert remove_leftovers(tmp_path) == 1
    assert not (tmp_path / f"{prefixes[1]}0.tmp").exists()
    assert sorted(path.suffix for path in (tmp_path / "tmp").iterdir()) == [".ended", ".lock", ".lock"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / f"{prefixes[1]}0.tmp").touch()
    assert remove_leftovers(tmp_path / "elsewhere") == 1
    for path in (tmp_path / "tmp").glob("*.ended"):
        os.utime(path, (0, 0))
    assert remove_leftovers(tmp_path) == 0
    assert [path.suffix for path in (tmp_path / "tmp").iterdir()] == [".lock", ".lock"]
    for process in (living, ended):
        process.communicate()
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("name", ["../outside.parquet", "/outside.parquet", "outside.txt", "packed-0.parquet"])
def test_a_pack_with_members_elsewhere_is_refused_and_deletes_nothing(name: str, tmp_path: Path) -> None:
    table, folder = pa.table({"value": [1]}), tmp_path / "scores"
    write_parquet(table, tmp_path / "outside.parquet")
    write_parquet(table, folder / "loose.parquet")
    members = json.dumps([[name, 0, {}]])
    write_parquet(table.replace_schema_metadata({"members": members}), folder / "packed-0.parquet")
    with pytest.raises(RunFolderError, match="leads elsewhere"):
        pack_folder(folder)
    assert (tmp_path / "outside.parquet").exists()
    assert (folder / "loose.parquet").exists()


def test_a_column_that_the_maps_do_not_have_is_named(finished_run: Run) -> None:
    with pytest.raises(
        ValueError, match=r"expected some of image, condition, .*, got 'logit'; did you mean 'logits'\?"
    ):
        finished_run.maps(columns=["image", "logit"])
    assert finished_run.maps(columns=["image", "run"]).column_names == ["image", "detector", "run"]


def test_a_file_that_is_packed_while_it_is_read_is_read_from_its_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(2):
        write_parquet(pa.table({"x": [i]}), tmp_path / f"{i}.parquet")
    opened = pq.ParquetFile

    def open_after_packing(path: Path, **options: object) -> pq.ParquetFile:
        monkeypatch.setattr(pq, "ParquetFile", opened)
        pack_folder(tmp_path)
        return opened(path, **options)

    monkeypatch.setattr(pq, "ParquetFile", open_after_packing)
    assert read_parquet(tmp_path / "1.parquet").to_pydict() == {"x": [1]}
    assert not (tmp_path / "1.parquet").exists()


def test_the_scores_of_a_detector_are_read_from_its_own_files(compared_run: Run, tmp_path: Path) -> None:
    """Else the files that are opened grow with the square of the detectors."""
    datasets = compared_run.scores_by_detector()
    assert {name: {Path(file).name[:3] for file in dataset.files} for name, dataset in datasets.items()} == {
        "a": {"a__"},
        "b": {"b__"},
    }
    shutil.copytree(compared_run.folder, tmp_path / "run")
    compact_run(open_run(tmp_path / "run"))
    whole = compared_run.scores()
    for name, dataset in open_run(tmp_path / "run").scores_by_detector().items():
        assert (
            dataset.count_rows(filter=pc.field("detector") == name) == pc.sum(pc.equal(whole["detector"], name)).as_py()
        )
