"""A run folder from somebody else: whatever it holds, a command gives one line and touches nothing elsewhere."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzzing.run_folders import GOLDEN, ODD_NAMES, contents
from refused import refused

from explain2me.errors import RunFolderError
from explain2me.run.folder import open_run
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
