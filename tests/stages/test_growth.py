"""A run grows by what its config names more, keeps every number that is there, and refuses what would change one."""

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from explain2me.config.load import load_config
from explain2me.errors import BusyError, RunFolderError
from explain2me.report.terminal import show_run
from explain2me.run.folder import GROWING, Run, open_run
from explain2me.stages import growth
from explain2me.stages.begin import begin_run
from explain2me.stages.compact import compact_run
from explain2me.stages.explain import explain_run
from explain2me.stages.measure import measure_run
from explain2me.stages.shards import rows
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
    assert said == ["2 models added"]
    assert sum(passes) == 26 * 4  # b seed2 under every condition; b seed1 is a seed1
    assert verify_run(run) == []
    make(study.config(detectors=TWO), tmp_path / "fresh")
    assert results(tmp_path / "run") == results(tmp_path / "fresh")


def test_conditions_are_added_in_the_batches_of_a_fresh_run(study, tmp_path, passes):
    make(study.config(), tmp_path / "run")
    passes.clear()
    said: list[str] = []
    run = make(study.config(measures=MORE), tmp_path / "run", on_grown=said.append)
    assert said == ["1 conditions added"]
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
    close(many, numbers(make(study.config(), tmp_path / "fresh")))
    assert run.image_table.equals(open_run(tmp_path / "fresh").image_table)


def test_what_is_taken_out_stays_on_disk_and_comes_back_for_nothing(study, tmp_path, passes):
    make(study.config(detectors=TWO, measures=MORE), tmp_path / "run")
    before = results(tmp_path / "run")
    passes.clear()
    said: list[str] = []
    fewer = study.config(images=lambda lines: lines[:20])
    run = make(fewer, tmp_path / "run", on_grown=said.append)
    assert said == ["2 models taken out, 6 images taken out, 1 conditions taken out"]
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


@pytest.mark.parametrize("step", range(0, 20, 2))
def test_a_kill_while_the_state_is_switched_loses_nothing(study, tmp_path, monkeypatch, step):
    make(study.config(detectors=TWO), tmp_path / "run")
    target = study.config(measures=MORE, images=lambda lines: lines[:18])
    left = [step]

    def killed(function: Callable[..., Any]) -> Callable[..., Any]:
        def sometimes(*arguments: Any, **named: Any) -> Any:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return function(*arguments, **named)

        return sometimes

    with monkeypatch.context() as patch:
        patch.setattr(growth, "_move", killed(growth._move))
        patch.setattr(growth, "_keep_state", killed(growth._keep_state))
        try:
            begin_run(target, tmp_path / "run")
            pytest.skip("all steps were done")
        except Killed:
            pass
    with pytest.raises(RunFolderError, match="was being changed when a command ended; call `explain2me run`"):
        open_run(tmp_path / "run")
    run = make(study.config(detectors=TWO), tmp_path / "run")  # and back, whatever had happened
    assert verify_run(run) == []
    make(study.config(detectors=TWO), tmp_path / "fresh")
    assert results(tmp_path / "run") == results(tmp_path / "fresh")


def test_tables_of_the_state_before_are_not_shown_as_those_of_the_new_one(study, tmp_path):
    make(study.config(), tmp_path / "run")
    run = explain_run(study.config(detectors=TWO), tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"no scores in .*; call `explain2me measure"):
        summarise_run(run, run.config)
    with pytest.raises(RunFolderError, match="no summary table"):
        show_run(run, Console(file=io.StringIO()))


def test_a_process_of_the_state_before_commits_nothing_into_the_new_one(study, tmp_path):
    from explain2me.run.plan import plan
    from explain2me.stages.shards.commit import commit_shard

    old = begin_run(study.config(), tmp_path / "run")
    shard = plan(old)[0]
    begin_run(study.config(measures=MORE), tmp_path / "run")
    with pytest.raises(RunFolderError, match="another command has changed the run"):
        commit_shard(tmp_path / "run", shard)
    assert not shard.path(tmp_path / "run").exists()


def test_growth_waits_for_nobody(study, tmp_path):
    from explain2me.run.files import only_writer

    make(study.config(), tmp_path / "run")
    with only_writer(tmp_path / "run"), pytest.raises(BusyError):
        begin_run(study.config(detectors=TWO), tmp_path / "run")
    assert json.loads((tmp_path / "run" / GROWING / "run.json").read_text())["models"][2]["detector"] == "b"
    assert len(make(study.config(detectors=TWO), tmp_path / "run").models) == 4
