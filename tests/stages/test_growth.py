"""A run grows by what its config names more, keeps every number that is there, and refuses what would change one."""

import contextlib
import io
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from explain2me.config.load import load_config
from explain2me.errors import BusyError, RunFolderError
from explain2me.report.terminal import show_run
from explain2me.report.write import write_report
from explain2me.run.files import only_writer
from explain2me.run.folder import GROWING, Run, open_run
from explain2me.run.plan import plan
from explain2me.stages import growth
from explain2me.stages.begin import begin_run
from explain2me.stages.compact import compact_run
from explain2me.stages.explain import explain_run
from explain2me.stages.measure import measure_run
from explain2me.stages.shards import commit, rows
from explain2me.stages.shards.commit import commit_shard
from explain2me.stages.summarise import summarise_run
from explain2me.stages.verify import verify_run

LESS = 'noise = {kind = "salt_pepper", levels = [0.05]}\nresilience = false\nfocus = true'
MORE = 'noise = {kind = "salt_pepper", levels = [0.05, 0.2]}\nresilience = false\nfocus = true\nentropy = true'
COMPUTE = 'device = "cpu"\nbatch_size = 4\nshard_size = 8\nthreads = 1'


class Study:
    """Configs over copies of the images and weights, that tests change; and the passes that explaining them takes."""

    def __init__(self, folder: Path, write_config: Callable[..., Path], detector_table: Callable[..., str]) -> None:
        self.folder, self._write, self._table = folder, write_config, detector_table
        self.manifest = folder / "images" / "manifest.csv"
        self.lines = self.manifest.read_text().splitlines()

    def config(
        self, *, detectors: Sequence[tuple[str, str]] = (("a", "seed[01]"),), measures: str = LESS, images: Any = None,
        sets: Sequence[str] = (),
    ) -> Any:  # fmt: skip
        head, *lines = self.lines
        self.manifest.write_text("\n".join([head, *(lines if images is None else images(lines))]) + "\n")
        tables = "".join(self._table(name, f"{self.folder}/weights/{files}.safetensors") for name, files in detectors)
        path = self._write(
            detectors=tables, data=f'manifest = "{self.manifest}"', measures=measures, compute=COMPUTE,
            summary="bootstrap = 10",
        )  # fmt: skip
        return load_config(path, sets)


@pytest.fixture
def study(tmp_path: Path, images: Path, weights: Path, write_config, detector_table) -> Study:
    shutil.copytree(images.parent, tmp_path / "images")
    shutil.copytree(weights, tmp_path / "weights")
    return Study(tmp_path, write_config, detector_table)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of images of every forward pass."""
    seen: list[int] = []
    explain = rows._explain

    def count(*arguments: Any) -> Any:
        seen.append(len(arguments[4]))
        return explain(*arguments)

    monkeypatch.setattr(rows, "_explain", count)
    return seen


def make(config: Any, folder: Path, **options: Any) -> Run:
    run = explain_run(config, folder, **options)
    measure_run(run, run.config)
    summarise_run(run, run.config)
    return run


def results(folder: Path) -> dict[str, bytes]:
    """Every file of a run but the notes of what happened."""
    kinds = ("maps", "scores", "summary", "quarantine", "precision")
    files = [path for kind in kinds for path in sorted((folder / kind).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in [*files, folder / "images.parquet"]}


def numbers(run: Run) -> pd.DataFrame:
    """The map and logits of each image id, model and condition."""
    frame = run.maps().to_pandas()
    frame["id"] = np.array(run.image_table["image_id"].to_pylist())[frame["image"]]
    return frame.set_index(["detector", "run", "id", "condition"]).drop(columns="image").sort_index()


def same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def close(a: pd.DataFrame, b: pd.DataFrame) -> None:
    assert list(a.index) == list(b.index)
    for name in ("map", "logits"):
        for mine, theirs in zip(a[name], b[name], strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                np.testing.assert_allclose(mine, theirs, atol=1e-5)


TWO = (("a", "seed[01]"), ("b", "seed[12]"))


def test_detectors_and_runs_are_added(study, tmp_path, passes):
    make(study.config(), tmp_path / "run")
    said: list[str] = []
    passes.clear()
    run = make(study.config(detectors=TWO), tmp_path / "run", on_grown=said.append)
    assert said == ["2 models added (b seed1, ...)"]
    assert sum(passes) == 26 * 4  # b seed2 under every condition; b seed1 is a seed1
    assert verify_run(run) == []
    make(study.config(detectors=TWO), tmp_path / "fresh")
    assert results(tmp_path / "run") == results(tmp_path / "fresh")


def test_conditions_are_added_in_the_batches_of_a_fresh_run(study, tmp_path, passes):
    make(study.config(), tmp_path / "run")
    passes.clear()
    said: list[str] = []
    run = make(study.config(measures=MORE), tmp_path / "run", on_grown=said.append)
    assert said == ["1 condition added (salt_pepper@0.2)"]
    assert sum(passes) == 26 * 2 * 2  # the clean pass, which says the class to explain, and the new condition
    assert verify_run(run) == []
    make(study.config(measures=MORE), tmp_path / "fresh")
    assert results(tmp_path / "run") == results(tmp_path / "fresh")


def test_images_are_added_and_every_number_that_was_there_stays(study, tmp_path, passes):
    few = numbers(make(study.config(images=lambda lines: lines[::2]), tmp_path / "run"))
    passes.clear()
    run = make(study.config(), tmp_path / "run")
    assert sum(passes) == 13 * 4 * 2
    assert verify_run(run) == []
    many = numbers(run)
    same(many.loc[few.index], few)
    fresh = make(study.config(), tmp_path / "fresh")
    close(many, numbers(fresh))
    assert run.image_table.equals(fresh.image_table)
    for name in ("measures", "performance"):  # chance levels and pairs depend on every image
        mine, theirs = (each.summary(name).to_pandas() for each in (run, fresh))
        pd.testing.assert_frame_equal(mine, theirs, rtol=1e-3, atol=1e-4)


def test_chance_levels_follow_every_image_of_a_run(study, tmp_path):
    make(study.config(images=lambda lines: lines[:18] + lines[21:]), tmp_path / "run")  # the first shard stays
    run, fresh = make(study.config(), tmp_path / "run"), make(study.config(), tmp_path / "fresh")
    columns = ["detector", "run", "measure", "variant", "condition", "image", "chance"]
    mine, theirs = (each.scores().to_pandas()[columns].sort_values(columns[:-1]) for each in (run, fresh))
    np.testing.assert_allclose(mine["chance"], theirs["chance"], atol=1e-4)


def test_what_is_taken_out_stays_on_disk_and_comes_back_for_nothing(study, tmp_path, passes):
    make(study.config(detectors=TWO, measures=MORE), tmp_path / "run")
    before = results(tmp_path / "run")
    passes.clear()
    said: list[str] = []
    fewer = study.config(images=lambda lines: lines[:20])
    run = make(fewer, tmp_path / "run", on_grown=said.append)
    assert said[0].startswith("2 models taken out (b seed1, ...); 6 images taken out (")
    assert said[0].endswith("; 1 condition taken out (salt_pepper@0.2)")
    assert verify_run(run) == []
    assert set(run.summary().to_pandas().detector) == {"a"}
    assert "salt_pepper@0.2" not in run.maps()["condition"].to_pylist()
    assert set(run.maps()["detector"].to_pylist()) == {"a"}
    make(study.config(detectors=TWO, measures=MORE), tmp_path / "run")
    assert passes == []
    assert results(tmp_path / "run") == before


def test_a_packed_run_grows(study, tmp_path):
    compact_run(make(study.config(), tmp_path / "run"))
    make(study.config(measures=MORE), tmp_path / "run")
    make(study.config(measures=MORE), tmp_path / "fresh")
    assert results(tmp_path / "run") == results(tmp_path / "fresh")
    assert verify_run(open_run(tmp_path / "run")) == []


def test_another_folder_takes_equal_maps(study, tmp_path, passes):
    make(study.config(detectors=TWO), tmp_path / "one")
    passes.clear()
    make(study.config(), tmp_path / "two", reuse=[tmp_path / "one"])
    assert passes == []
    make(study.config(), tmp_path / "fresh")
    assert results(tmp_path / "two") == results(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["seed=8"], "this run can take no map of it: seed was 7, is 8; leave the option out"),
        (["compute.batch_size=8"], "compute.batch_size was 4, is 8"),
    ],
)
def test_maps_of_other_settings_are_not_taken(study, tmp_path, sets, message):
    explain_run(study.config(), tmp_path / "one")
    with pytest.raises(RunFolderError, match=message):
        explain_run(study.config(sets=sets), tmp_path / "two", reuse=[tmp_path / "one"])
    assert not (tmp_path / "two").exists()


def test_maps_of_other_models_are_not_taken(study, tmp_path):
    explain_run(study.config(), tmp_path / "one")
    with pytest.raises(RunFolderError, match="it has no model of this run"):
        explain_run(study.config(detectors=[("c", "seed2")], measures="stability = false"), tmp_path / "two", reuse=[tmp_path / "one"])  # fmt: skip


def change_label(lines: list[str]) -> list[str]:
    return [lines[0].replace("real,", "fake,", 1), *lines[1:]]


def change_source(lines: list[str]) -> list[str]:
    return [lines[0].replace("camera", "phone").replace("real/phone", "real/camera"), *lines[1:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sets": ["seed=8"]}, "seed was 7, is 8"),
        ({"sets": ["compute.batch_size=8"]}, "compute.batch_size was 4, is 8"),
        ({"sets": ["data.positive=real"]}, "data.positive was 'fake', is 'real'"),
        ({"sets": ["salience.target=fake"]}, "salience.target was 'predicted', is 'fake'"),
        ({"sets": ["detectors.0.layer=layer1"]}, "layer of 'a' run 'seed0' was"),
        ({"images": change_label}, "label of image .* was 'real', is 'fake'"),
        ({"images": change_source}, "source of image .* was 'camera', is 'phone'"),
        ({"images": lambda lines: [line for line in lines if "real" not in line], "sets": ["data.classes=['fake']"]}, "data.classes|data.positive|the classes were"),
    ],
)  # fmt: skip
def test_what_would_change_a_number_is_refused_and_named(study, tmp_path, changes, message):
    make(study.config(), tmp_path / "run")
    before = results(tmp_path / "run")
    with pytest.raises(Exception, match=message):
        explain_run(study.config(**changes), tmp_path / "run")
    assert results(tmp_path / "run") == before
    assert not (tmp_path / "run" / GROWING).exists()
    assert explain_run(study.config(), tmp_path / "run").models == open_run(tmp_path / "run").models


def test_other_weights_or_bytes_of_the_same_name_are_refused(study, tmp_path):
    make(study.config(images=lambda lines: lines[:20]), tmp_path / "run")
    image = study.folder / "images" / "real" / "camera" / "000.png"
    data = image.read_bytes()
    shutil.copy(image.with_name("001.png"), image)
    with pytest.raises(RunFolderError, match=r"sha256 of image .*000.png' was"):
        explain_run(study.config(), tmp_path / "run")
    image.unlink()
    with pytest.raises(RunFolderError, match=r"image .*000.png' could be read and cannot now"):
        explain_run(study.config(), tmp_path / "run")
    image.write_bytes(data)
    shutil.copy(study.folder / "weights" / "seed2.safetensors", study.folder / "weights" / "seed1.safetensors")
    with pytest.raises(RunFolderError, match="weights_sha256 of 'a' run 'seed1' was"):
        explain_run(study.config(), tmp_path / "run")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("every", [pytest.param(True, marks=pytest.mark.slow), False], ids=["every", "few"])
def test_a_kill_at_any_step_of_the_switch_loses_nothing(study, tmp_path, monkeypatch, every):
    target = {"measures": MORE, "images": lambda lines: lines[:18]}
    make(study.config(detectors=TWO), tmp_path / "whole")
    reference = results(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "through")
    num_steps = steps_until(10**9, lambda: begin_run(study.config(**target), tmp_path / "through"), monkeypatch)
    run = make(study.config(**target), tmp_path / "through")
    assert verify_run(run) == []
    assert len(run.image_table) == 18
    for step in range(num_steps) if every else (num_steps // 2, num_steps - 3, num_steps - 2):
        folder = tmp_path / f"run{step}"
        shutil.copytree(tmp_path / "whole", folder)
        assert steps_until(step, lambda folder=folder: begin_run(study.config(**target), folder), monkeypatch) == step
        if (folder / GROWING / "run.json").exists():
            with pytest.raises(RunFolderError, match="was being changed when a command ended; call `explain2me run`"):
                open_run(folder)
        run = make(study.config(detectors=TWO), folder)  # and back, whatever had happened
        assert verify_run(run) == []
        assert results(folder) == reference


def steps_until(kill: int, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Number of moves, copies and deletions that some work makes; it is ended before that of number ``kill``."""
    num_steps = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            nonlocal num_steps
            if num_steps == kill:
                raise Killed
            num_steps += 1
            return function(*arguments, **named)

        return step

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        for name in ("_move", "_keep_state", "atomic_path"):
            patch.setattr(growth, name, counted(getattr(growth, name)))
        patch.setattr(growth.shutil, "rmtree", counted(growth.shutil.rmtree))
        work()
    return num_steps


def test_tables_of_the_state_before_are_not_shown_as_those_of_the_new_one(study, tmp_path):
    make(study.config(), tmp_path / "run")
    run = explain_run(study.config(detectors=TWO), tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"no scores in .*; call `explain2me measure"):
        summarise_run(run, run.config)
    with pytest.raises(RunFolderError, match="no summary table"):
        show_run(run, Console(file=io.StringIO()))


def test_a_process_of_the_state_before_commits_nothing_into_the_new_one(study, tmp_path):
    old = begin_run(study.config(), tmp_path / "run")
    shard = plan(old)[0]
    begin_run(study.config(measures=MORE), tmp_path / "run")
    with pytest.raises(RunFolderError, match="another command has changed the run"):
        commit_shard(tmp_path / "run", shard)
    assert not shard.path(tmp_path / "run").exists()


def test_growth_says_that_another_process_writes(study, tmp_path):
    make(study.config(), tmp_path / "run")
    with only_writer(tmp_path / "run"), pytest.raises(BusyError):
        begin_run(study.config(detectors=TWO), tmp_path / "run")
    assert not (tmp_path / "run" / GROWING).exists()
    assert len(make(study.config(detectors=TWO), tmp_path / "run").models) == 4


@pytest.mark.parametrize("way", ["place", "limit"])
def test_the_same_list_of_other_pictures_is_looked_at(study, tmp_path, way):
    make(study.config(), tmp_path / "run")
    if way == "limit":
        with pytest.raises(RunFolderError, match="could be read and cannot now"):
            explain_run(study.config(sets=["data.max_pixels=100"]), tmp_path / "run")
        return
    shutil.copytree(study.manifest.parent, tmp_path / "others")
    path = tmp_path / "others" / "real" / "camera" / "000.png"
    shutil.copy(path.with_name("001.png"), path)
    other = study.config(sets=[f"data.manifest={tmp_path}/others/manifest.csv"])
    with pytest.raises(RunFolderError, match=r"sha256 of image .*000.png' was"):
        explain_run(other, tmp_path / "run")


def test_the_folder_of_the_images_may_move(study, tmp_path, passes):
    make(study.config(), tmp_path / "run")
    before = results(tmp_path / "run")
    passes.clear()
    shutil.move(study.manifest.parent, tmp_path / "moved")
    study.manifest = tmp_path / "moved" / "manifest.csv"
    said: list[str] = []
    make(study.config(), tmp_path / "run", on_grown=said.append)
    assert (passes, said) == ([], ["no model, image or condition added or taken out"])
    assert results(tmp_path / "run") == before


@pytest.mark.parametrize("again", [True, False], ids=["reused", "explained"])
def test_pieces_are_of_what_was_to_be_explained_then(study, tmp_path, monkeypatch, again):
    make(study.config(images=lambda lines: lines[::3]), tmp_path / "one")
    monkeypatch.setattr(commit, "PIECE_SECONDS", 0.0)
    run = begin_run(study.config(), tmp_path / "two")
    shard = plan(run)[0]
    with monkeypatch.context() as patch:  # stopped after a piece
        patch.setattr(commit, "joined", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            commit_shard(run.folder, shard, (tmp_path / "one",))
    commit_shard(run.folder, shard, (tmp_path / "one",) if again else ())
    images = run.maps(["image", "condition"]).to_pandas()
    assert sorted(images[images.condition == "clean"].image) == list(range(8))
    assert not images.duplicated().any()


def test_the_sample_in_float32_follows_the_images(study, tmp_path):
    low = ["compute.precision=bfloat16"]
    make(study.config(sets=low), tmp_path / "run")
    for images in (lambda lines: lines[:20], None):
        run = make(study.config(sets=low, images=images), tmp_path / "run")
        assert verify_run(run) == []
        fresh = make(study.config(sets=low, images=images), tmp_path / f"fresh{len(run.image_table)}")
        pd.testing.assert_frame_equal(
            run.summary("precision").to_pandas(), fresh.summary("precision").to_pandas(), rtol=1e-3, atol=1e-4
        )


def test_a_stray_part_of_a_state_before_is_set_aside(study, tmp_path):
    old = make(study.config(), tmp_path / "run")
    path = plan(old)[0].path(tmp_path / "run")
    data = path.read_bytes()
    make(study.config(measures=MORE), tmp_path / "run")
    path.write_bytes(data)  # by a process that had begun before
    run = make(study.config(measures=MORE), tmp_path / "run")
    assert not path.exists()
    assert verify_run(run) == []


def test_a_second_machine_does_not_grow_a_run_again(study, tmp_path, monkeypatch):
    from explain2me.stages import begin

    make(study.config(), tmp_path / "run")
    config, check = study.config(detectors=TWO), begin.check

    def slow(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(begin, "check", check)
            make(config, tmp_path / "run")
        return check(*arguments)

    monkeypatch.setattr(begin, "check", slow)
    with pytest.raises(BusyError, match="another command has changed the run"):
        begin_run(config, tmp_path / "run")
    assert len(open_run(tmp_path / "run").summary()) > 0


def test_the_versions_that_made_a_run_stay_in_it(study, tmp_path, monkeypatch):
    monkeypatch.setattr("explain2me.run.provenance.versions", lambda *_: {"torch": "1"})
    make(study.config(), tmp_path / "run")
    monkeypatch.undo()
    run = make(study.config(detectors=TWO), tmp_path / "run")
    assert run.record["versions"] == {"torch": "1"}
    assert len(run.record["later_versions"]) == 1


@pytest.mark.parametrize("what", ["metadata", "doubled", "logits", "size"])
def test_a_part_to_reuse_is_checked_first(study, tmp_path, what):
    run = make(study.config(), tmp_path / "one")
    path = plan(run)[0].path(tmp_path / "one")
    table = pq.read_table(path, partitioning=None)
    if what == "metadata":
        table = table.replace_schema_metadata(None)
    elif what == "doubled":
        table = table.take(np.repeat(np.arange(len(table)), 2))
    elif what == "logits":
        table = table.set_column(
            2, table.schema.field("logits"), pa.array([[0.0] * 4] * len(table), pa.list_(pa.float32()))
        )
    else:
        table = table.replace_schema_metadata(table.schema.metadata | {b"map_size": b"1xq"})
    pq.write_table(table, path)
    with pytest.raises(RunFolderError, match="cannot be read"):
        explain_run(study.config(), tmp_path / "two", reuse=[tmp_path / "one"])


def test_what_is_no_run_is_refused_before_the_images_are_read(study, tmp_path):
    with pytest.raises(RunFolderError, match="is not a run folder"):
        explain_run(study.config(), tmp_path / "two", reuse=[tmp_path / "images"])
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_an_image_that_is_mended_is_read_again(study, tmp_path, fault):
    image = study.folder / "images" / "real" / "camera" / "000.png"
    data = image.read_bytes()
    image.unlink() if fault == "missing" else image.write_bytes(data[:100])
    run = make(study.config(), tmp_path / "run")
    assert run.quarantine()["kind"].to_pylist() == [fault]
    assert run.mended_images() == []
    image.write_bytes(data)
    os.utime(image, (time.time() + 5, time.time() + 5))
    said: list[str] = []
    run = make(study.config(), tmp_path / "run", on_grown=said.append)
    assert said[0].startswith("1 image added (")
    assert len(run.quarantine()) == 0
    assert verify_run(run) == []


def test_no_stage_works_on_a_run_that_another_command_has_changed(study, tmp_path):
    run = explain_run(study.config(), tmp_path / "run")
    make(study.config(detectors=TWO), tmp_path / "run")
    for stage in (measure_run, summarise_run, write_report):
        with pytest.raises(RunFolderError, match="another command has changed the run"):
            stage(run, run.config)
