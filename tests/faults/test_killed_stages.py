"""A stage on a finished run that is killed at any moment leaves what was there before, or all that is new."""

import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from explain2me.config.load import override
from explain2me.report.write import write_report
from explain2me.run.folder import Run, open_run
from explain2me.run.leftovers import remove_leftovers
from explain2me.stages.compact import compact_run
from explain2me.stages.measure import measure_run
from explain2me.stages.summarise import summarise_run
from explain2me.stages.verify import verify_run

FORK = multiprocessing.get_context("fork")  # at once, and with what is patched here


def with_pearson(run: Run) -> None:
    measure_run(run, override(run.config, ['measures.similarity=["pearson"]']))


def with_more_resamples(run: Run) -> None:
    summarise_run(run, override(run.config, ["summary.bootstrap=60"]))


def with_one_image(run: Run) -> None:
    write_report(run, override(run.config, ["report.images=1"]))


def with_two_images(run: Run) -> None:
    write_report(run, override(run.config, ["report.images=2"]))


STAGES: dict[str, tuple[str, Callable[[Run], object], Callable[[Run], object]]] = {
    "measure": ("scores", lambda run: None, with_pearson),
    "summarise": ("summary", lambda run: None, with_more_resamples),
    "compact": ("maps", lambda run: None, compact_run),
    "report": ("report", with_one_image, with_two_images),
}
"""The folder that a stage writes, what comes before it, and the stage."""


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check_state(run: Run, stage: str, before: dict[str, bytes], after: dict[str, bytes], maps: pa.Table) -> None:
    if stage == "compact":  # packs its folders one after another
        assert open_run(run.folder).maps(["image", "condition", "predicted"]).to_pydict() == maps.to_pydict()
    else:
        assert files(run.folder / STAGES[stage][0]) in (before, after)


@pytest.mark.usefixtures("no_pdf")
@pytest.mark.parametrize(
    ("stage", "kills"),
    [
        ("measure", 3),
        ("summarise", 3),
        ("compact", 3),
        *(pytest.param(stage, 20, marks=pytest.mark.slow) for stage in STAGES),
    ],
)
def test_kills_at_random_moments(copied_run: Run, tmp_path: Path, stage: str, kills: int) -> None:
    place, prepare, work = STAGES[stage]
    prepare(copied_run)
    shutil.copytree(copied_run.folder, tmp_path / "reference")
    reference = open_run(tmp_path / "reference")
    before, maps = files(reference.folder / place), reference.maps(["image", "condition", "predicted"])
    started = time.monotonic()
    work(reference)
    seconds = time.monotonic() - started
    after = files(reference.folder / place)
    assert before != after

    rng, killed = random.Random(kills), 0
    for _ in range(kills):
        process = FORK.Process(target=work, args=(copied_run,))
        process.start()
        process.join(rng.random() * seconds * 1.2)
        killed += process.is_alive()
        process.kill()
        process.join()
        check_state(copied_run, stage, before, after, maps)
        if files(copied_run.folder / place) == after:  # it got through: begin anew
            shutil.rmtree(copied_run.folder)
            shutil.copytree(tmp_path / "reference", copied_run.folder)
            shutil.rmtree(copied_run.folder / place)
            for name, data in before.items():
                (copied_run.folder / place / name).parent.mkdir(parents=True, exist_ok=True)
                (copied_run.folder / place / name).write_bytes(data)
    print(f"{killed} of {kills} processes were killed at work")
    work(copied_run)
    remove_leftovers(copied_run.folder)
    assert files(copied_run.folder / place) == after
    assert not [path for path in copied_run.folder.iterdir() if path.name.startswith((".tmp-", ".scores-"))]
    if stage in ("measure", "compact"):
        assert [line for line in verify_run(open_run(copied_run.folder)) if "scores/" not in line] == []
