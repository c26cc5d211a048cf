"""A run folder that an earlier version wrote stays readable, whole, and gives the same tables."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from explain2me import open_run
from explain2me.run.folder import Run
from explain2me.run.packs import read_parquet
from explain2me.stages.measure import measure_run
from explain2me.stages.summarise import summarise_run
from explain2me.stages.verify import verify_run

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(params=sorted(path.name for path in GOLDEN.iterdir()))
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    shutil.copytree(GOLDEN / request.param, tmp_path / "run")
    return open_run(tmp_path / "run")


def test_it_is_whole(old: Run) -> None:
    assert verify_run(old) == []
    assert len(old.maps()) == 2 * 11 * 16
    assert old.quarantine()["kind"].to_pylist() == ["not_an_image"]


def test_its_scores_are_kept_and_made_again_alike(old: Run) -> None:
    paths = sorted((old.folder / "scores").glob("*.parquet"))
    before = {path: path.stat().st_mtime_ns for path in paths}
    measure_run(old, old.config)
    assert {path: path.stat().st_mtime_ns for path in paths} == before
    for path in paths:
        want = read_parquet(path).to_pandas()
        path.unlink()
        measure_run(old, old.config)
        pd.testing.assert_frame_equal(read_parquet(path).to_pandas(), want, rtol=1e-9, atol=1e-12)


def test_its_tables_are_made_again_alike(old: Run) -> None:
    want = {path.name: pd.read_csv(path) for path in (old.folder / "summary").glob("*.csv")}
    assert len(want) >= 5
    shutil.rmtree(old.folder / "summary")
    summarise_run(old, old.config)
    for name, table in want.items():
        found = pd.read_csv(old.folder / "summary" / name)
        pd.testing.assert_frame_equal(found[list(table.columns)], table, rtol=1e-9, atol=1e-12)
