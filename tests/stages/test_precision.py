"""The table of what a lower precision changes."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from shown import shown
from sklearn.metrics import roc_auc_score

from explain2me import open_run
from explain2me.config.load import override
from explain2me.measures import ssim
from explain2me.run.folder import Run
from explain2me.run.parts import read_part
from explain2me.stages.measure import measure_run
from explain2me.stages.summarise import summarise_run

NUM_IMAGES, NUM_CONDITIONS = 26, 16


def exact_paths(run: Run) -> list[Path]:
    return [next((run.folder / "precision" / f"model={model.name}").glob("*.parquet")) for model in run.models]


def test_the_precision_table_holds_stability_and_auroc(bfloat16_run: Run) -> None:
    table = bfloat16_run.summary("precision").to_pandas().set_index(["measure", "variant"])
    exact = [read_part(path) for path in exact_paths(bfloat16_run)]
    ours = [read_part(path) for model in bfloat16_run.models for path in bfloat16_run.part_paths(model)]
    differences = []
    for a, b in itertools.combinations(range(3), 2):
        values = []
        for parts in (exact, ours):
            maps = [torch.from_numpy(parts[i].maps[parts[i].of("clean")]).double() for i in (a, b)]
            values.append(ssim(*maps))
        differences.append((values[0] - values[1]).abs())
    row = table.loc["stability", "predicted"]
    assert row.num_values == 3 * NUM_IMAGES - row.num_one_sided
    assert row.max_difference == pytest.approx(np.nanmax(torch.cat(differences)))
    assert row.mean_difference == pytest.approx(np.nanmean(torch.cat(differences)))
    assert row.max_difference > 0
    truth = bfloat16_run.image_table.to_pandas().label == "fake"
    want = []
    for path, model in zip(exact_paths(bfloat16_run), bfloat16_run.models, strict=True):
        frames = [pq.read_table(p, partitioning=None).to_pandas() for p in (path, *bfloat16_run.part_paths(model))]
        for condition in sorted(set(frames[0].condition)):
            aurocs = []
            for frame in frames:
                some = frame[(frame.condition == condition) & frame.logits.notna()]
                score = torch.tensor(np.stack(some.logits)).double().softmax(1)[:, 1]
                aurocs.append(roc_auc_score(truth[some.image], score))
            want.append(abs(aurocs[0] - aurocs[1]))
    row = table.loc["performance", "softmax"]
    assert row.num_values == len(want) == 3 * NUM_CONDITIONS
    assert row.max_difference == pytest.approx(max(want))
    assert row.mean_difference == pytest.approx(np.mean(want))


def test_values_of_one_precision_only_are_counted(bfloat16_run: Run, tmp_path: Path) -> None:
    before = bfloat16_run.summary("precision").to_pandas().set_index(["measure", "variant"])
    shutil.copytree(bfloat16_run.folder, tmp_path / "run")
    copy = open_run(tmp_path / "run")
    path = exact_paths(copy)[0]
    table = pq.read_table(path, partitioning=None)
    maps = table["map"].to_pylist()
    images = table["image"].to_pylist()
    maps = [[0.0] * len(m) if m and image in (3, 8) else m for image, m in zip(images, maps, strict=True)]
    column = pa.array(maps, table.schema.field("map").type)
    pq.write_table(table.set_column(table.schema.get_field_index("map"), table.schema.field("map"), column), path)
    summarise_run(copy, copy.config)
    after = copy.summary("precision").to_pandas().set_index(["measure", "variant"])
    assert before.num_one_sided["entropy", "spatial"] == 0
    assert after.num_one_sided["entropy", "spatial"] == 2
    assert after.num_values["entropy", "spatial"] == before.num_values["entropy", "spatial"] - 2
    assert after.num_one_sided["stability", "predicted"] == before.num_one_sided["stability", "predicted"] + 2 * 2
    assert "values in one only" in shown(copy)


def test_the_precision_is_that_of_the_measures_that_were_scored(bfloat16_run: Run, tmp_path: Path) -> None:
    shutil.copytree(bfloat16_run.folder, tmp_path / "run")
    copy = open_run(tmp_path / "run")
    changed = override(copy.config, ["measures.similarity=pearson", "measures.entropy=false"])
    measure_run(copy, changed)
    summarise_run(copy, copy.config)
    table = copy.summary("precision").to_pandas()
    assert set(table.measure) == {"noise", "resilience", "focus", "stability", "performance"}
    assert set(table.similarity.dropna()) == {"pearson"}
