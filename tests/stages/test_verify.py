"""verify names each kind of damage; compact changes no row."""

import copy
import errno
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from explain2me import open_run
from explain2me.errors import Explain2MeError, RunFolderError
from explain2me.report.material import gather
from explain2me.run.files import write_parquet
from explain2me.run.folder import Run
from explain2me.run.packs import PACKED, files_on_disk, pack_folder, read_parquet
from explain2me.run.plan import plan
from explain2me.run.record import sealed
from explain2me.stages.compact import compact_run
from explain2me.stages.explain import explain_run
from explain2me.stages.measure import measure_run
from explain2me.stages.summarise import summarise_run
from explain2me.stages.verify import _check_precision, verify_run

NUM_PARTS, NUM_SCORES = 2 * 3, 3 * 3
"""Files of two models of three shards, and of their pair."""


@pytest.fixture
def run(copied_run: Run) -> Run:
    return copied_run


def part_of(run: Run, number: int = 0) -> Path:
    return run.part_paths(run.models[0])[number]


def change_json(path: Path, key: str, value: object) -> None:
    record = json.loads(path.read_text())
    record[key] = value
    path.write_text(json.dumps(record))


def change_json_and_seal(path: Path, key: str, value: object) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps(sealed(record | {key: value})))


def flip(path: Path, where: int) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 0x10
    path.write_bytes(data)


def rewrite(path: Path, change: Callable) -> None:
    table = read_parquet(path)
    write_parquet(change(table).replace_schema_metadata(table.schema.metadata), path)


def double_a_row(table):
    import pyarrow as pa

    return pa.concat_tables([table, table.slice(3, 1)]).unify_dictionaries().combine_chunks()


DAMAGE: dict[str, tuple[Callable[[Run], object], str]] = {
    "part gone": (lambda run: part_of(run).unlink(), "missing: maps/"),
    "part cut": (lambda run: part_of(run).write_bytes(part_of(run).read_bytes()[:-30]), "damaged: "),
    "part empty": (lambda run: part_of(run).write_bytes(b""), "damaged: "),
    "row doubled": (lambda run: rewrite(part_of(run), double_a_row), "doubled rows: 1 in maps/"),
    "row lost": (lambda run: rewrite(part_of(run), lambda table: table.slice(1)), "missing rows: 1 in maps/"),
    "part of another model": (
        lambda run: shutil.copy(run.part_paths(run.models[1])[0], part_of(run)),
        "of another shard: maps/",
    ),
    "part of other images": (lambda run: shutil.copy(part_of(run, 1), part_of(run)), "unknown or quarantined rows"),
    "part that nobody asked for": (
        lambda run: shutil.copy(part_of(run), part_of(run).with_name("part-00009-0.parquet")),
        "not in the plan: maps/",
    ),
    "images changed": (lambda run: flip(run.folder / "images.parquet", 300), "images.parquet"),
    "images lost": (
        lambda run: rewrite(run.folder / "images.parquet", lambda table: table.slice(0, 20)),
        "changed: images",
    ),
    "config changed": (
        lambda run: change_json(run.folder / "run.json", "config", run.record["config"] | {"seed": 8}),
        "changed: run.json",
    ),
    "scores gone": (lambda run: min((run.folder / "scores").iterdir()).unlink(), "missing: scores/"),
    "scores cut": (
        lambda run: (path := min((run.folder / "scores").iterdir())).write_bytes(path.read_bytes()[:-9]),
        "damaged: ",
    ),
    "scores of other settings": (
        lambda run: shutil.copy(min((run.folder / "scores").iterdir()), run.folder / "scores" / "x.parquet"),
        "not in the plan: scores/x.parquet",
    ),
    "summary changed": (lambda run: flip(run.folder / "summary" / "measures.parquet", 900), "damaged: "),
    "quarantine damaged": (
        lambda run: ((run.folder / "quarantine").mkdir(), (run.folder / "quarantine" / "a.parquet").write_bytes(b"no")),
        "damaged: ",
    ),
    "all scores gone": (lambda run: shutil.rmtree(run.folder / "scores"), "missing: scores/, from which"),
    "an image of the manifest is nowhere": (
        lambda run: change_json_and_seal(run.folder / "run.json", "num_listed", run.record["num_listed"] + 1),
        "missing: 1 images of the manifest",
    ),
    "left over": (lambda run: part_of(run).with_name(".tmp-x.tmp").touch(), "left over: maps/"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_each_kind_of_damage_is_named(run: Run, name: str) -> None:
    damage, message = DAMAGE[name]
    damage(run)
    problems = verify_run(open_run(run.folder))
    assert problems
    assert any(problem.startswith(message) or message in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


@pytest.mark.parametrize(("key", "value"), [("schema", 99), ("config", {"name": "x"})])
def test_a_record_of_another_version_is_refused(run: Run, key: str, value: object) -> None:
    change_json(run.folder / "run.json", key, value)
    with pytest.raises(Explain2MeError):
        open_run(run.folder)


@pytest.mark.parametrize("where", ["maps", "scores"])
def test_no_changed_byte_escapes(run: Run, where: str) -> None:
    path = min((run.folder / where).rglob("*.parquet"))
    whole = path.read_bytes()
    for place in random.Random(7).sample(range(len(whole)), 20):
        flip(path, place)
        assert verify_run(open_run(run.folder)), f"byte {place} of {path.name}"
        path.write_bytes(whole)
    assert verify_run(open_run(run.folder)) == []


def test_images_that_changed_are_found_on_demand(run: Run, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images.parent, tmp_path / "images")
    data = run.record["config"]["data"] | {"manifest": str(tmp_path / "images" / "manifest.csv")}
    change_json_and_seal(run.folder / "run.json", "config", run.record["config"] | {"data": data})
    run = open_run(run.folder)
    image = tmp_path / "images" / "fake" / "gan_a" / "003.png"
    flip(image, image.stat().st_size // 2)
    assert verify_run(run) == []
    assert verify_run(run, images=True) == [
        "image changed: fake/gan_a/003.png is not the file that the run was made from"
    ]
    image.unlink()
    assert verify_run(run, images=True)[0].startswith("image missing: fake/gan_a/003.png")


def frame_of(run: Run, table: str) -> pd.DataFrame:
    frame = (run.maps() if table == "maps" else run.scores()).to_pandas()
    if table == "maps":
        frame = frame.assign(map=[None if m is None else tuple(m) for m in frame["map"]])
    keys = [
        name
        for name in ("detector", "run", "other_run", "measure", "variant", "similarity", "condition", "image")
        if name in frame
    ]
    return frame.astype({name: str for name in keys if name != "image"}).sort_values(keys, ignore_index=True)


def test_a_packed_run_is_the_same_run(run: Run) -> None:
    before = {name: frame_of(run, name) for name in ("maps", "scores")}
    summary = {path.name: path.read_bytes() for path in (run.folder / "summary").iterdir()}
    done = compact_run(run)
    assert sum(old for old, _ in done.values()) == NUM_PARTS + NUM_SCORES
    assert [new for _, new in done.values()] == [1, 1, 1]
    again = open_run(run.folder)
    assert verify_run(again) == []
    for name in ("maps", "scores"):
        columns = [column for column in before[name] if column not in ("logits", "map_fixed")]
        pd.testing.assert_frame_equal(frame_of(again, name)[columns], before[name][columns])
    assert again.scores_dataset().count_rows() == len(before["scores"])
    packs = {path: path.stat().st_mtime_ns for path in run.folder.rglob(f"{PACKED}*")}
    explain_run(run.config, run.folder)
    measure_run(again, again.config)
    summarise_run(again, again.config)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob(f"{PACKED}*")} == packs  # nothing was made again
    assert {path.name: path.read_bytes() for path in (run.folder / "summary").iterdir()} == summary
    assert compact_run(again) == {}
    assert gather(again, images_per_measure=1)


def test_a_kill_between_pack_and_delete_doubles_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = len(run.scores())
    folder = run.folder / "scores"

    def killed(path: Path, **_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        pack_folder(folder)
    for path in folder.glob(".tmp-*"):
        path.unlink()
    assert len(list(folder.glob("*.parquet"))) == NUM_SCORES + 1
    again = open_run(run.folder)
    assert len(again.scores()) == again.scores_dataset().count_rows() == rows
    pack_folder(folder)
    assert len(files_on_disk(folder)) == len(list(folder.glob("*.parquet"))) == 1
    assert verify_run(open_run(run.folder)) == []


def test_packed_scores_of_other_settings_are_made_again(run: Run) -> None:
    compact_run(run)
    config = run.config.model_copy(
        update={"measures": run.config.measures.model_copy(update={"similarity": ("pearson",)})}
    )
    measure_run(run, config)
    assert set(run.scores()["similarity"].to_pylist()) == {"pearson", None}


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_damaged_pack_is_named(run: Run, where: str) -> None:
    compact_run(run)
    pack = min((run.folder / "maps").rglob(f"{PACKED}*"))
    size = pack.stat().st_size
    flip(pack, {"first": 1, "middle": size // 2, "last": size - 6}[where])
    problems = verify_run(open_run(run.folder))
    assert any(pack.name in problem for problem in problems)
    pack.unlink()
    assert (
        len([problem for problem in verify_run(open_run(run.folder)) if problem.startswith("missing: maps/")])
        == NUM_PARTS // 2
    )
    explain_run(run.config, run.folder)
    assert verify_run(open_run(run.folder)) == []


def test_what_is_missing_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is missing"):
        read_parquet(tmp_path / "part.parquet")


def test_a_file_that_the_machine_fails_to_read_is_not_called_damaged(run, monkeypatch):
    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("explain2me.stages.verify._was_changed", fail)
    found = verify_run(run)
    assert f"cannot be read: {part_of(run).relative_to(run.folder)}: [Errno 24] Too many open files" in found
    assert not [line for line in found if line.startswith("damaged")]


def test_a_lost_file_of_precision_is_named_without_asking_to_delete(run):
    compute = run.config.compute.model_copy(update={"precision": "bfloat16"})
    other = copy.copy(run)
    other.config = run.config.model_copy(update={"compute": compute})
    found = list(_check_precision(other, plan(run)))
    assert len(found) == 2
    assert all(line.endswith("; call the same command to have it made") for line in found)
