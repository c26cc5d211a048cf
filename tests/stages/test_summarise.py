"""The tables of a run: what their numbers are over, and how they are written."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from shown import shown

from explain2me import open_run
from explain2me.run.folder import Run
from explain2me.stages.summarise import summarise_run

NUM_IMAGES = 26
WriteConfig = Callable[..., Path]


OFF = ("measures.entropy=false", "measures.noise=false", "measures.resilience=false", "measures.focus=false")


@pytest.fixture
def run(finished_run: Run) -> Run:
    return finished_run


def test_n_is_the_number_of_values_behind_mean_and_std(run: Run) -> None:
    scores = run.scores().to_pandas()
    scores = scores[(scores.measure == "resilience") & (scores.variant == "fixed")]
    shifts = scores[scores.condition.str.startswith("shift")]
    of_images = shifts.groupby(["run", "image"], observed=True).value.mean().dropna()
    summary = run.summary().to_pandas()
    row = summary[(summary.condition == "shifts") & (summary.variant == "fixed") & (summary.label == "all")].iloc[0]
    assert row.n == len(of_images) == 2 * NUM_IMAGES
    assert row.num_values == shifts.value.notna().sum() > 7 * row.n
    assert row["mean"] == pytest.approx(of_images.mean())
    assert row["std"] == pytest.approx(of_images.std())
    assert row.num_kept + row.num_flipped == row.num_values
    assert "one for each image and run" in " ".join(shown(run).split())


def test_large_counts_are_written_whole_beside_missing_ones(copied_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows(*_: object) -> list[dict[str, object]]:
        return [{"measure": "noise", "num_values": 1234567, "max_difference": 0.5},
                {"measure": "entropy", "num_values": None, "max_difference": 1 / 3}]  # fmt: skip

    monkeypatch.setattr("explain2me.stages.summarise.precision_rows", rows)
    summarise_run(copied_run, copied_run.config)
    cells = pd.read_csv(copied_run.folder / "summary" / "precision.csv", dtype=str, keep_default_na=False)
    assert cells.num_values.to_list() == ["1234567", ""]
    assert cells.max_difference.to_list() == ["0.5", "0.333333"]
    table = copied_run.summary("precision")
    assert table.schema.field("num_values").type == pa.int64()
    assert table["num_values"].to_pylist() == [1234567, None]


@pytest.mark.parametrize("stability", ["true", "false"])
def test_a_run_without_other_measures_gives_auroc(
    call: Callable[..., tuple[int, str, str]], write_config: WriteConfig, stability: str
) -> None:
    sets = [word for change in (*OFF, f"measures.stability={stability}") for word in ("--set", change)]
    code, output, errors = call("run", write_config(), "-o", "run", *sets)
    assert (code, errors) == (0, "")
    run = open_run(Path("run"))
    wanted = {"stability"} if stability == "true" else set()
    assert set(run.summary()["measure"].to_pylist()) == wanted
    assert run.summary("performance").num_rows > 0
    for text in (output, shown(run)):
        assert "AUROC (softmax)" in text
        assert ("No measures" in text) == (not wanted)
        assert ("stability ↑" in text) == bool(wanted)
        assert "Resilience" not in text
