"""AUROC and accuracy: which images they are over, before and after a change."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from shown import shown
from sklearn.metrics import roc_auc_score

from explain2me import open_run
from explain2me.report.findings.chance import aurocs
from explain2me.report.summary import Tables
from explain2me.run.folder import Run
from explain2me.stages.summarise import summarise_run
from explain2me.statistics import performance
from explain2me.statistics.performance import performance_rows, predictions_of, ranking_score

NUM_IMAGES = 26


@pytest.fixture
def run(finished_run: Run) -> Run:
    return finished_run


def with_logits(run: Run, folder: Path, condition: str, images: Sequence[int], logits: Sequence[float] | None) -> Run:
    """A copy of a run where the second model said something else of some images, or nothing."""
    shutil.copytree(run.folder, folder)
    copy = open_run(folder)
    for path in copy.part_paths(copy.models[1]):
        table = pq.read_table(path, partitioning=None)
        rows = table.select(["condition", "image"]).to_pylist()
        hit = [row["condition"] == condition and row["image"] in images for row in rows]
        values = [logits if h else value for h, value in zip(hit, table["logits"].to_pylist(), strict=True)]
        column = pa.array(values, pa.list_(pa.float32()))
        table = table.set_column(table.schema.get_field_index("logits"), table.schema.field("logits"), column)
        if logits is None:
            predicted = pc.if_else(pa.array(hit), None, table["predicted"])
            table = table.set_column(table.schema.get_field_index("predicted"), "predicted", predicted)
        pq.write_table(table, path)
    return copy


def clean_auroc(run: Run, model: int, without: Sequence[int]) -> float:
    maps = run.maps().to_pandas()
    some = maps[(maps.run == run.models[model].run) & (maps.condition == "clean")].sort_values("image")
    some = some[~some.image.isin(without)]
    truth = run.image_table.to_pandas().label[some.image] == "fake"
    return float(roc_auc_score(truth, torch.tensor(np.stack(some.logits)).double().softmax(1)[:, 1]))


def test_the_auroc_before_is_over_the_images_that_the_blur_left(run: Run, tmp_path: Path) -> None:
    gone = [2, 5, 20]
    copy = with_logits(run, tmp_path / "run", "focus_salient", gone, None)
    summarise_run(copy, copy.config)
    table = copy.summary("performance").to_pandas()
    table = table[(table.positives == "all") & (table.negatives == "all") & (table.score == "softmax")]
    table = table.set_index(["condition", "run"])
    first, second = (model.run for model in copy.models)
    blurred = table.loc["focus_salient"]
    assert blurred.n.to_dict() == {first: NUM_IMAGES, second: NUM_IMAGES - 3, "all": NUM_IMAGES - 3}
    assert blurred.num_invalid.to_dict() == {first: 0, second: 3, "all": 3}
    assert (blurred.num_positive + blurred.num_negative == blurred.n).all()
    want = [clean_auroc(copy, 0, []), clean_auroc(copy, 1, gone)]
    assert want[1] != pytest.approx(clean_auroc(copy, 1, []), abs=0.01)
    assert blurred.auroc_clean[[first, second]].tolist() == pytest.approx(want)
    assert blurred.auroc_clean["all"] == pytest.approx(np.mean(want))
    clean = table.loc["clean"]
    assert (clean.n == NUM_IMAGES).all()
    assert clean.auroc_clean.tolist() == clean.auroc.tolist()
    text = shown(copy)
    assert f"n = 23 to 26, before {np.mean(want):.3f}" in text
    assert "n = 26, before" not in text


def test_the_auroc_table_counts_images_of_a_run_not_of_all_runs(run: Run) -> None:
    table = run.summary("performance").to_pandas()
    assert table[table.positives == "all"].n.unique().tolist() == [NUM_IMAGES]
    lines = [line.split() for line in shown(run).splitlines() if line.split()[:3] == ["a", "all", "all"]]
    assert [line[-1] for line in lines] == [str(NUM_IMAGES)]


@pytest.mark.parametrize("logits", [(float("nan"), 1.0), (float("inf"), 1.0), (float("inf"), float("-inf"))])
def test_logits_that_are_not_finite_are_counted_and_in_no_number(
    run: Run, tmp_path: Path, logits: tuple[float, float]
) -> None:
    copy = with_logits(run, tmp_path / "run", "clean", [0, 25], logits)
    rows = pd.DataFrame(performance_rows(copy, "a", predictions_of(copy, "a"), 10))
    rows = rows[(rows.positives == "all") & (rows.negatives == "all") & (rows.run == copy.models[1].run)]
    assert (rows.num_invalid == 2).all()  # under every condition: there is no clean one to compare with
    assert (rows.n == NUM_IMAGES - 2).all()
    maps = copy.maps().to_pandas()
    maps = maps[(maps.run == copy.models[1].run) & (maps.condition == "clean") & ~maps.image.isin([0, 25])]
    truth = copy.image_table.to_pandas().label[maps.image].map(copy.classes.index)
    clean = rows[(rows.condition == "clean") & (rows.score == "softmax")]
    assert clean.accuracy.item() == pytest.approx((maps.predicted.to_numpy() == truth.to_numpy()).mean())
    assert clean.auroc.item() == pytest.approx(clean_auroc(copy, 1, [0, 25]))
    assert (rows[rows.condition == "clean"].kept_share == 1).all()


def test_auroc_does_not_change_when_the_logits_are_scaled() -> None:
    rng = np.random.default_rng(0)
    logits, positive = rng.normal(size=(200, 2)).astype(np.float32), rng.random(200) < 0.5
    aurocs = [roc_auc_score(positive, ranking_score(logits * scale, 1, "softmax")) for scale in (1, 10, 1000)]
    probability = torch.tensor(logits).double().softmax(1)[:, 1]
    assert aurocs == pytest.approx([roc_auc_score(positive, probability)] * 3, abs=0)


def test_confident_images_do_not_tie() -> None:
    logits = np.array([[-50.0, 50.0], [-60.0, 60.0]], np.float32)
    assert ranking_score(logits, 1, "softmax").tolist() == [100, 120]


def test_tied_pairs_are_counted_and_told(run: Run, tmp_path: Path) -> None:
    copy = with_logits(run, tmp_path / "run", "clean", [0, 1, 2, 25], (0.25, 0.5))
    summarise_run(copy, copy.config)
    labels = copy.image_table["label"].to_pylist()
    tied = [labels[image] == "fake" for image in (0, 1, 2, 25)]
    want = sum(tied) * (4 - sum(tied))
    assert want
    table = copy.summary("performance").to_pandas()
    clean = table[(table.condition == "clean") & (table.positives == "all") & (table.negatives == "all")].set_index(
        "run"
    )
    assert clean.loc[copy.models[0].run, "num_tied_pairs"].tolist() == [0, 0]
    assert clean.loc[copy.models[1].run, "num_tied_pairs"].tolist() == [want, want]
    assert clean.loc["all", "num_tied_pairs"].tolist() == [want, want]
    share = want / (clean.num_positive * clean.num_negative).iloc[0]
    sentences = {
        name: " ".join(found.text for found in aurocs(Tables(each))) for name, each in (("copy", copy), ("run", run))
    }
    assert f"In {share:.1%} of the pairs".replace("%", " %") in sentences["copy"]
    assert "same score" not in sentences["run"]


def test_the_weights_of_the_images_are_drawn_once_for_all_sources(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    real = performance.image_weights
    monkeypatch.setattr(performance, "image_weights", lambda *args, **names: draws.append(0) or real(*args, **names))
    rows, counts = [], []
    for most in (performance.MOST_AREAS, 1):
        monkeypatch.setattr(performance, "MOST_AREAS", most)
        draws.clear()
        rows.append(performance_rows(run, "a", predictions_of(run, "a"), 10))
        counts.append(len(draws))
    pd.testing.assert_frame_equal(*map(pd.DataFrame, rows), check_exact=True)
    assert counts[0] == 2 * len(predictions_of(run, "a").conditions) < counts[1]
