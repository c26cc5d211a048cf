"""Differences between detectors are those of the other tables."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from shown import shown

from explain2me import open_run
from explain2me.errors import RunFolderError
from explain2me.run.folder import Run

WriteConfig = Callable[..., Path]


def test_differences_are_those_of_the_other_tables(
    tmp_path: Path, weights: Path, write_config: WriteConfig, detector_table: Callable[..., str],
    run_stages: Callable[..., Run],
) -> None:  # fmt: skip
    tables = [
        detector_table(name, f"{weights}/seed[{seeds}].safetensors")
        for name, seeds in (("a", "01"), ("b", "1"), ("c", "12"))
    ]
    config = write_config(detectors="".join(tables), summary="bootstrap = 0")
    measures = ["stability=false", "noise=false", "similarity=['ssim', 'pearson']"]
    run = run_stages(config, tmp_path / "run", *(f"measures.{change}" for change in measures))
    found = run.summary("differences").to_pandas()
    keys = ["measure", "variant", "similarity", "condition", "label", "source"]
    measures = run.summary().to_pandas().set_index(["detector", *keys]).sort_index()
    ours = found[found.measure != "auroc"]
    num_pairs, num_detectors = 3, 3
    assert len(ours) == num_pairs * len(measures) / num_detectors
    assert [*ours[["detector", "other_detector"]].drop_duplicates().itertuples(index=False, name=None)] == [
        *itertools.combinations("abc", 2)
    ]
    for column, mean in (("difference", "mean"), ("corrected", "corrected")):
        of_both = [
            measures.loc[list(ours[[name, *keys]].itertuples(index=False, name=None)), mean].to_numpy()
            for name in ("detector", "other_detector")
        ]
        np.testing.assert_allclose(ours[column], of_both[0] - of_both[1], atol=1e-12)
    scores = run.scores().to_pandas()
    valid = scores[scores.valid & (scores.condition == "focus_salient") & (scores.similarity == "ssim")]
    valid = valid[(valid.variant == "fixed")].groupby("detector", observed=True).image.agg(set)
    row = ours[(ours.condition == "focus_salient") & (ours.similarity == "ssim") & (ours.variant == "fixed")]
    row = row[(row.label == "all") & (row.detector == "a") & (row.other_detector == "c")].iloc[0]
    assert row.num_images == len(valid["a"] & valid["c"])
    assert (ours.ci_low <= ours.difference).all()
    assert ours[ours.measure == "entropy"].corrected.isna().all()
    assert found[found.detector == "b"].num_runs.unique() == [1]
    assert found[found.other_detector == "b"].num_other_runs.unique() == [1]

    aurocs = run.summary("performance").to_pandas()
    aurocs = aurocs[(aurocs.run == "all") & (aurocs.condition == "clean")]
    aurocs = aurocs.set_index(["detector", "score", "positives", "negatives"]).auroc
    theirs = found[found.measure == "auroc"]
    assert len(theirs) == num_pairs * len(aurocs) / num_detectors
    for row in theirs.itertuples():
        sides = (row.source, "all") if row.label == "fake" else ("all", row.source)
        wanted = [aurocs[name, row.variant, *sides] for name in (row.detector, row.other_detector)]
        assert row.difference == pytest.approx(wanted[0] - wanted[1], abs=1e-12)

    lines = [line.split() for line in shown(run).split("Differences between detectors")[1].splitlines()]
    row = found[(found.measure == "auroc") & (found.variant == "softmax") & (found.label == "all")].iloc[1]
    assert ["a", "c", "softmax", f"{row.difference:+.3f}", f"[{row.ci_low:+.3f},"] in [line[:5] for line in lines]
    for width in (80, 120):
        text = shown(run, width).split("Differences between detectors", 1)[1]
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text
        assert f"{row.difference:+.3f} [{row.ci_low:+.3f}, {row.ci_high:+.3f}]" in " ".join(text.split())
        assert "predicted" in text
    (run.folder / "summary" / "differences.parquet").unlink()
    with pytest.raises(RunFolderError, match=r"no summary table 'differences' .* call `explain2me summarise"):
        shown(run)


def test_one_detector_has_no_differences_and_needs_no_table_of_them(finished_run: Run, tmp_path: Path) -> None:
    assert len(finished_run.summary("differences")) == 0
    shutil.copytree(finished_run.folder, tmp_path / "old")
    (tmp_path / "old" / "summary" / "differences.parquet").unlink()
    assert "Differences" not in shown(open_run(tmp_path / "old"))
