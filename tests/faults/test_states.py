"""What was made together is read together: a stop between two files, and two commands on one folder."""

import contextlib
import shutil
import time
import types
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from explain2me.config.load import override
from explain2me.errors import BusyError, RunFolderError
from explain2me.report.summary import Tables
from explain2me.run.files import only_writer
from explain2me.run.folder import Run, open_run
from explain2me.run.packs import committed_in
from explain2me.stages import measure, summarise
from explain2me.stages.compact import compact_run
from explain2me.stages.explain import explain_run
from explain2me.stages.measure import measure_run
from explain2me.stages.summarise import summarise_run
from explain2me.stages.verify import verify_run

PEARSON = 'measures.similarity=["pearson"]'


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stop_at(monkeypatch: pytest.MonkeyPatch, place: object, name: str, count: int) -> None:
    """Let the count-th call of a function end the process, as a kill would, as far as files go."""
    real, calls = getattr(place, name), iter(range(1, 10_000))

    def stopped(*arguments: object, **options: object) -> object:
        if next(calls) == count:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, stopped)


def similarities(run: Run) -> set[str]:
    return set(run.summary("measures").to_pandas().similarity.dropna())


@pytest.mark.parametrize("packed", [False, True])
def test_a_stopped_measure_changes_no_score_and_continues(
    copied_run: Run, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    run = copied_run
    if packed:
        compact_run(run)
    before, tables = files(run.folder / "scores"), files(run.folder / "summary")
    config = override(run.config, [PEARSON])
    with monkeypatch.context() as patch:
        stop_at(patch, measure, "write_parquet", 4)
        with pytest.raises(KeyboardInterrupt):
            measure_run(run, config)
    assert files(run.folder / "scores") == before
    assert verify_run(run) == []
    summarise_run(run, run.config)
    assert files(run.folder / "summary") == tables

    made: list[int] = []
    measure_run(run, config, on_done=lambda done, total: made.append(total))
    assert len(committed_in(run.folder / "scores")) == made[0] + 3
    assert set(made) == {len(made)}
    assert not list(run.folder.glob(".scores-*"))
    summarise_run(run, config)
    assert similarities(run) == {"pearson"}


def test_scores_of_other_settings_that_were_stopped_are_removed(
    copied_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, measure, "write_parquet", 2)
        with pytest.raises(KeyboardInterrupt):
            measure_run(copied_run, override(copied_run.config, [PEARSON]))
    before = files(copied_run.folder / "scores")
    measure_run(copied_run, override(copied_run.config, ['measures.similarity=["spearman"]']))
    measure_run(copied_run, copied_run.config)
    assert not list(copied_run.folder.glob(".scores-*"))
    assert files(copied_run.folder / "scores") == before


def test_a_stopped_summarise_changes_no_table(copied_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(copied_run.config, [PEARSON])
    measure_run(copied_run, config)
    tables = files(copied_run.folder / "summary")
    for count in (1, 2, 5):
        with monkeypatch.context() as patch:
            stop_at(patch, summarise, "_write", count)
            with pytest.raises(KeyboardInterrupt):
                summarise_run(copied_run, config)
        assert files(copied_run.folder / "summary") == tables
    assert not list(copied_run.folder.glob(".tmp-*"))


def test_tables_that_go_with_other_settings_are_gone(copied_run: Run) -> None:
    assert (copied_run.folder / "summary" / "stability_matrix.csv").exists()
    config = override(copied_run.config, ["measures.stability=false"])
    measure_run(copied_run, config)
    summarise_run(copied_run, config)
    assert not len(pd.read_csv(copied_run.folder / "summary" / "stability_matrix.csv"))


def explained_without(config_of: Callable[..., object], manifest: Path, folder: Path, image: Path) -> Run:
    """A run whose image was there for the index, and away when it was to be explained."""
    content = image.read_bytes()
    run = explain_run(config_of(manifest, shard_size=10), folder, on_start=lambda *_: image.unlink())
    image.write_bytes(content)
    return run


@pytest.mark.parametrize("comes_back", [True, False])
def test_scores_follow_the_images_that_the_maps_have(
    tmp_path: Path, make_images: Callable[..., Path], small_config: Callable[..., object], comes_back: bool
) -> None:
    counts = {("real", "camera"): 4, ("fake", "gan"): 4}
    manifest = make_images(tmp_path / "images", counts=counts)
    image = manifest.parent / "fake" / "gan" / "001.png"
    runs = [
        explain_run(small_config(manifest, shard_size=10), tmp_path / "with"),
        explained_without(small_config, manifest, tmp_path / "without", image),
    ]
    for run in runs:
        measure_run(run, run.config)
        summarise_run(run, run.config)
    changed, wanted = (runs[1], runs[0]) if comes_back else (runs[0], runs[1])
    for name in ("maps", "quarantine"):
        shutil.rmtree(changed.folder / name, ignore_errors=True)
    if comes_back:
        explain_run(changed.config, changed.folder)
    else:
        explained_without(small_config, manifest, changed.folder, image)
    again = open_run(changed.folder)
    measure_run(again, again.config)
    summarise_run(again, again.config)
    for name in ("scores", "summary"):
        assert files(again.folder / name) == files(wanted.folder / name)


def test_a_report_is_of_the_scores_that_the_tables_are_of(copied_run: Run) -> None:
    from explain2me.report.write import write_report

    measure_run(copied_run, override(copied_run.config, [PEARSON]))
    with pytest.raises(
        RunFolderError, match="made from other scores than those in scores/; call `explain2me summarise"
    ):
        write_report(copied_run, copied_run.config)
    assert not (copied_run.folder / "report").exists()


def test_tables_that_are_replaced_while_they_are_read_are_not_mixed(copied_run: Run) -> None:
    tables = Tables(copied_run)
    assert len(tables.measures)
    config = override(copied_run.config, [PEARSON])
    measure_run(copied_run, config)
    summarise_run(copied_run, config)
    with pytest.raises(RunFolderError, match="another process replaced the tables"):
        _ = tables.performance


@pytest.mark.parametrize("stage", ["measure", "summarise", "report", "compact"])
def test_a_command_beside_another_one_says_so(
    copied_run: Run, stage: str, call: Callable[..., tuple[int, str, str]]
) -> None:
    before = files(copied_run.folder)
    with only_writer(copied_run.folder):
        code, _, errors = call(stage, copied_run.folder)
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith("explain2me: another process is writing into ")
    assert files(copied_run.folder) == before


def test_the_lock_is_free_after_an_error(copied_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, summarise, "_write", 1)
        with pytest.raises(KeyboardInterrupt):
            summarise_run(copied_run, copied_run.config)
    try:
        summarise_run(copied_run, copied_run.config)
    except BusyError:
        pytest.fail("still locked")


def test_a_run_waits_for_the_process_that_makes_its_tables(
    copied_run: Run,
    write_config: Callable[..., Path],
    call: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.rmtree(copied_run.folder / "summary")
    with contextlib.ExitStack() as other:
        other.enter_context(only_writer(copied_run.folder))
        clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: other.close())
        monkeypatch.setattr("explain2me.cli.run.time", clock)
        code, output, errors = call("run", write_config())
    assert (code, errors) == (0, "")
    assert "waiting for another process that writes into" in output
    assert (copied_run.folder / "summary" / "measures.csv").exists()


def test_verify_says_that_a_writer_is_at_work_instead_of_naming_its_files(copied_run, call):
    next((copied_run.folder / "scores").iterdir()).unlink()
    with only_writer(copied_run.folder):
        code, output, errors = call("verify", copied_run.folder)
    assert (code, output) == (2, "")
    assert "another process is writing into" in errors
    code, output, errors = call("verify", copied_run.folder)
    assert "missing" in output
    assert (code, errors) == (2, "")
