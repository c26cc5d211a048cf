"""A run folder from somebody else: whatever it holds, a command gives one line and touches nothing elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing.run_folders import GOLDEN, ODD_NAMES, bomb, contents
from refused import refused

from explain2me.errors import RunFolderError
from explain2me.run.files import write_parquet
from explain2me.run.folder import open_run
from explain2me.run.packs import read_parquet
from explain2me.run.parts import read_part
from explain2me.run.schema import IMAGES, SCORES
from explain2me.stages.compact import compact_run
from explain2me.stages.refusals import open_existing
from explain2me.workers import Engine

Call = Callable[..., tuple[int, str, str]]
COMMANDS = ("show", "verify", "summarise", "measure", "compact", "report")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN, tmp_path / "run")
    return tmp_path / "run"


def change_record(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((run / "run.json").read_text())
    change(record)
    (run / "run.json").write_text(json.dumps(record))


RECORDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no config": (lambda r: r.pop("config"), "config is missing"),
    "classes of numbers": (lambda r: r.update(classes=[1, 2]), "classes.0: input should be a valid string, got 1"),
    "a class twice": (lambda r: r.update(classes=["a", "a"]), "expected different classes, got 'a' twice"),
    "too few classes": (lambda r: r.update(classes=["a"]), "expected a name for each class"),
    "no model": (lambda r: r.update(models=[]), "models"),
    "a model without a side": (lambda r: r["models"][0].update(input_size=[96]), "models.0.input_size"),
    "a model twice": (lambda r: r["models"][1].update(run="seed0"), "expected different models, got 'a__seed0' twice"),
    "a model of no detector": (lambda r: r["models"][1].update(detector="b"), "got none or no detector 'b'"),
    "a detector that leads out": (lambda r: r["models"][0].update(detector="../../a"), "without '/'"),
    "a run that leads out": (lambda r: r["models"][0].update(run="x/../../../a"), "without '/'"),
    "a run of dots": (lambda r: r["models"][0].update(run=".."), "without a leading dot"),
    "a run with NUL": (lambda r: r["models"][0].update(run="a\0"), "without '/'"),
    "a long run": (lambda r: r["models"][0].update(run="a" * 300), "at most 255 bytes"),
    "versions of numbers": (lambda r: r.update(versions={"torch": 2}), "versions.torch"),
    "a number of images of words": (lambda r: r.update(num_listed="many"), "num_listed"),
    "a wrong config": (lambda r: r["config"]["compute"].update(shard_size=0), "compute.shard_size"),
    "trainings of words": (lambda r: r.update(trained={"x": "y"}), "trained.x"),
    "1,002 models": (
        lambda r: r.update(models=[m | {"run": f"{m['run']}-{i}"} for m in r["models"] for i in range(501)]),
        "at most 1000 models of a detector",
    ),
    "100,000 models": (lambda r: r.update(models=r["models"] * 50_000), "at most 16777216 bytes"),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_wrong_record_is_one_line(run: Path, call: Call, kind: str) -> None:
    change, message = RECORDS[kind]
    change_record(run, change)
    refused(call("verify", run), "run.json is not as it was written: ", message, "; put back a copy of it")


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 900, "[]", "null", '{"schema": 1}', "1" * 5000, "\0", "", "{"])
def test_a_record_that_is_no_record_is_one_line(run: Path, call: Call, text: str) -> None:
    (run / "run.json").write_text(text)
    refused(call("show", run), "run.json")


PLACES = sorted({path.relative_to(GOLDEN).as_posix() for path in GOLDEN.rglob("*")})


@pytest.mark.parametrize("name", [*PLACES[:6], PLACES[-1], "maps", "scores", "summary", "quarantine", *ODD_NAMES])
def test_a_link_in_a_run_is_named_and_not_followed(run: Path, name: str) -> None:
    elsewhere, path = run.with_name("elsewhere"), run / name
    shutil.copytree(run, elsewhere)
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True) if path.is_file() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(elsewhere / name)
    with pytest.raises(RunFolderError, match=r"is a link, and commands on a run or study follow none; put the file or"):
        open_run(run)
    (run / "run.json").unlink()
    with pytest.raises(RunFolderError, match="is a link"):  # a run that is to begin
        open_existing(run)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_links(run: Path, call: Call, command: str) -> None:
    elsewhere = run.with_name("elsewhere")
    shutil.move(run / "scores", elsewhere)
    before = contents(elsewhere)
    (run / "scores").symlink_to(elsewhere)
    refused(call(command, run), f"{str(run / 'scores')!r} is a link")
    assert contents(elsewhere) == before


def test_the_path_of_a_run_may_be_a_link(run: Path) -> None:
    run.with_name("link").symlink_to(run)
    assert open_run(run.with_name("link")).models


@pytest.mark.parametrize("name", [".lock", "events.jsonl", "events-1-of-2.jsonl"])
def test_a_second_name_of_a_file_that_is_written_in_place_is_refused(run: Path, call: Call, name: str) -> None:
    outside = run.with_name("outside")
    outside.write_text("precious")
    (run / name).unlink(missing_ok=True)
    (run / name).hardlink_to(outside)
    refused(call("measure", run), "has a second name (a hard link)")
    assert outside.read_text() == "precious"


def test_pipes_and_endless_folders_are_refused(run: Path) -> None:
    os.mkfifo(run / "maps" / "pipe")
    with pytest.raises(RunFolderError, match="is a pipe or a device"):
        open_run(run)
    (run / "maps" / "pipe").unlink()
    (run / "report" / "/".join("d" * 50)).mkdir(parents=True)
    with pytest.raises(RunFolderError, match="folders deep in a run; expected at most 32"):
        open_run(run)


def test_a_study_refuses_links_among_its_trainings_but_those_of_wandb(tmp_path: Path) -> None:
    from fuzzing.configs import EVERY_FIELD

    from explain2me.config.load import load_config
    from explain2me.train.study import plan_study

    (tmp_path / "config.toml").write_text(EVERY_FIELD)
    config = load_config(tmp_path / "config.toml")
    training = tmp_path / "study" / "training" / "a" / "run00"
    (training / "wandb").mkdir(parents=True)
    (training / "wandb" / "latest-run").symlink_to(tmp_path)
    (tmp_path / "study" / "data").symlink_to(tmp_path)
    plan_study(config, tmp_path / "study")
    (training / "resume.ckpt").symlink_to(tmp_path)
    with pytest.raises(RunFolderError, match=r"resume\.ckpt' is a link"):
        plan_study(config, tmp_path / "study")
    shutil.move(tmp_path / "study" / "training", tmp_path / "moved")
    (tmp_path / "study" / "training").symlink_to(tmp_path / "moved")
    with pytest.raises(RunFolderError, match="training' is a link"):
        plan_study(config, tmp_path / "study")


def test_a_report_list_of_hostile_names_is_only_compared(copied_run, call: Call, no_pdf: None) -> None:
    run = copied_run.folder
    outside = run.parent / "outside"
    outside.write_text("precious")
    (run / "report").mkdir()
    (run / "report" / "mine.txt").write_text("mine")
    (run / "report" / ".written").write_bytes(b"../../outside\n../run.json\n\xff\xfe\n")
    assert call("report", run)[0] == 0
    assert (outside.read_text(), (run / "report" / "mine.txt").read_text()) == ("precious", "mine")
    assert (run / "run.json").exists()


# -------------------------------------------------------------------------------------------------------------- tables

TABLES = {
    "dropped": (lambda table: table.drop_columns(["path"]), "expected the columns image, image_id, path, label"),
    "renamed": (lambda table: table.rename_columns([f"{name}x" for name in IMAGES.names]), "got 'imagex'"),
    "retyped": (lambda table: table.set_column(5, "width", table["width"].cast(pa.int64())), "width of type int32, got int64"),
    "emptied": (lambda table: table.set_column(3, "label", table["label"]).set_column(2, "path", pa.nulls(11, pa.string())), "column 'path' is empty in 11 rows"),
    "unhashed": (lambda table: table.set_column(7, "sha256", pa.nulls(11, pa.string())), "column 'sha256' is empty"),
    "moved": (lambda table: table.take([1, 0, *range(2, 11)]), "its images are not numbered from 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
def test_another_table_of_images_is_one_line(run: Path, call: Call, kind: str) -> None:
    change, message = TABLES[kind]
    pq.write_table(change(pq.read_table(run / "images.parquet")), run / "images.parquet")
    refused(call("measure", run), "images.parquet cannot be read (", message)


@pytest.mark.parametrize("table", ["maps", "scores", "summary", "quarantine"])
def test_a_lost_column_of_any_other_table_is_one_line(run: Path, call: Call, table: str) -> None:
    for path in (run / table).rglob("*.parquet"):
        columns = pq.read_table(path, partitioning=None)
        pq.write_table(columns.drop_columns([columns.column_names[-1]]), path)
    command = {"maps": "summarise", "quarantine": "measure"}.get(table, "report")
    refused(call(command, run), f"{run / table}", "expected the columns ")


class Chosen:
    """Chooses one of the two bombs."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number

    def choice(self, values: list[str]) -> str:
        return values[-1]


@pytest.mark.parametrize(("name", "kind"), [("images.parquet", "rows"), ("images.parquet", "text")])
def test_a_small_file_of_gigabytes_is_refused_before_it_is_read(run: Path, name: str, kind: str) -> None:
    table = bomb(pq.read_table(run / name), Chosen({"rows": 0.0, "text": 1.0}[kind]))
    pq.write_table(table, run / name)
    assert (run / name).stat().st_size < 2 * 10**6
    before = pa.total_allocated_bytes()
    with pytest.raises(RunFolderError, match=r"take \d+ bytes of memory"):
        read_parquet(run / name, schema=IMAGES)
    assert pa.total_allocated_bytes() - before < 2**28


def test_a_file_of_very_many_row_groups_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": range(5000)}), tmp_path / "x.parquet", row_group_size=1)
    with pytest.raises(RunFolderError, match="5000 row groups, expected at most 4096"):
        read_parquet(tmp_path / "x.parquet")


def test_a_footer_that_contradicts_itself_does_not_abort_the_process(run: Path) -> None:
    path = run / "scores" / "a__stability-part-00000-0b68817e7a905e0b.parquet"
    data = bytearray(path.read_bytes())
    data[1445], data[4082] = 6, 16  # a histogram of levels of another size
    path.write_bytes(data)
    command = [sys.executable, "-m", "explain2me", "verify", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert f"damaged: scores/{path.name}" in done.stdout


@pytest.mark.parametrize("members", ["[]]", "{}", '[["a.parquet", 7, {}]]', '[["a.parquet", -1, {}]]', '[["a.parquet", "0", {}]]', '[["a.parquet", 0]]', "[" * 10**5])  # fmt: skip
def test_a_pack_of_wrong_members_is_one_line(run: Path, call: Call, members: str) -> None:
    compact_run(open_run(run))
    pack = next((run / "scores").glob("packed-*"))
    table = pq.read_table(pack, schema=SCORES).replace_schema_metadata({"members": members})
    pq.write_table(table, pack)
    refused(call("measure", run), f"{pack.name} cannot be read")


def test_maps_of_two_sizes_and_of_unknown_images_are_refused(run: Path, call: Call) -> None:
    path = next((run / "maps" / "model=a__seed1").glob("*.parquet"))
    table = pq.read_table(path, partitioning=None)
    for name in ("map", "map_fixed"):
        cells = pa.array([[1.0] * 4] * len(table), pa.list_(pa.float32(), 4))
        table = table.set_column(table.column_names.index(name), name, cells)
    metadata = table.schema.metadata
    pq.write_table(table.replace_schema_metadata({**metadata, b"map_size": "2x2"}), path)
    shutil.rmtree(run / "scores")
    refused(call("measure", run), "differ in size or conditions from others of 'a'")
    pq.write_table(table.replace_schema_metadata({**metadata, b"map_size": "3x3"}), path)
    with pytest.raises(RunFolderError, match="expected the size of its maps"):
        read_part(path)
    table = table.set_column(0, "image", pa.array([10**6] * len(table), pa.int32()))
    pq.write_table(table.replace_schema_metadata({**metadata, b"map_size": "2x2"}), path)
    with pytest.raises(RunFolderError, match="expected images 0 to 10, got 1000000"):
        read_part(path, 11)


@pytest.mark.parametrize(("table", "rows"), [("measures", [0, 0, 1, 2]), ("performance", [])])
def test_doubled_and_missing_rows_of_a_summary_are_one_line(run: Path, call: Call, table: str, rows: list[int]) -> None:
    path = run / "summary" / f"{table}.parquet"
    some = pq.read_table(path)
    if table == "performance":
        rows = [i for i, condition in enumerate(some["condition"].to_pylist()) if condition != "clean"]
    pq.write_table(some.take(rows), path)
    refused(call("show", run), f"{table}.parquet are not those that were written", "call `explain2me summarise")


# -------------------------------------------------------------------------------------------------------------- engine


def test_the_cluster_and_processes_in_a_record_are_not_used(
    run: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[Engine] = []
    engine = {"executor": "ray", "ray_address": "ray://evil:1", "workers": 64, "device": "cuda:7"}
    change_record(run, lambda record: record["config"]["compute"].update(engine, gpus_per_worker=2.0))

    def run_tasks(work: object, tasks: list[str], engine: Engine) -> tuple[()]:
        engines.append(engine)
        return ()

    monkeypatch.setattr("explain2me.stages.measure.missing_of", lambda *_: [])
    monkeypatch.setattr("explain2me.stages.measure.run_tasks", run_tasks)
    monkeypatch.setattr("explain2me.stages.measure.FILES_FOR_WORKERS", 0)
    assert call("measure", run, "--set", "measures.entropy=false")[0] == 0
    here = ("--set", "compute.executor=ray", "--set", "compute.ray_address=ray://mine:1", "--set", "compute.workers=2")
    assert call("measure", run, *here)[0] == 0
    assert engines == [Engine(threads=1), Engine("ray", 2, 1, "ray://mine:1")]


def test_models_without_scores_take_no_memory(run: Path, call: Call) -> None:
    change_record(run, lambda r: r["models"].extend(r["models"][0] | {"run": f"x{i}"} for i in range(500)))
    refused(
        call("summarise", run), "lacks most scores of stability for the 502 models of 'a'; call `explain2me measure"
    )


@pytest.mark.parametrize(
    "change", [{"measures": {"noise": []}}, {"measures": {"noise": [{"kind": "gaussian", "levels": [0.1]}]}}]
)
def test_scores_of_conditions_that_a_record_does_not_name_are_one_line(run: Path, call: Call, change: dict) -> None:
    record = json.loads((run / "run.json").read_text())
    record["config"]["measures"] |= change["measures"]
    (run / "run.json").write_text(json.dumps(record))
    refused(call("summarise", run), "holds scores of noise", "call `explain2me measure")


def test_a_table_of_very_many_regular_names_is_read(tmp_path: Path) -> None:
    count = 700_000
    names = [f"images/of/a/long/list/real/{i:07d}.jpg" for i in range(count)]
    hashes = [f"{i * 0x9E3779B97F4A7C15 % 2**64:016x}" * 4 for i in range(count)]
    columns = {"image": range(count), "image_id": names, "path": names, "label": ["real"] * count}
    columns |= {"source": ["camera"] * count, "width": [224] * count, "height": [224] * count, "sha256": hashes}
    write_parquet(pa.table(columns).cast(IMAGES), tmp_path / "images.parquet")
    assert len(read_parquet(tmp_path / "images.parquet", schema=IMAGES)) == count
