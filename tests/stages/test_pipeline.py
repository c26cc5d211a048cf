"""The whole run on a tiny real network: images to maps to scores to tables."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from skimage.metrics import structural_similarity
from sklearn.metrics import roc_auc_score

from explain2me import GradCAM, open_run
from explain2me.config.load import load_config, override
from explain2me.detectors.runs import load_model
from explain2me.errors import RunFolderError
from explain2me.images.decode import load_image
from explain2me.images.listing import image_root, resolve
from explain2me.measures import salt_and_pepper
from explain2me.run import plan as shards
from explain2me.run.folder import Run
from explain2me.stages.begin import begin_run
from explain2me.stages.explain import explain_run
from explain2me.stages.measure import measure_run
from explain2me.stages.summarise import summarise_run
from explain2me.stages.verify import verify_run

NUM_IMAGES, NUM_CONDITIONS = 26, 16
RunStages = Callable[..., Run]


@pytest.fixture
def run(compared_run: Run) -> Run:
    return compared_run


def test_every_model_image_and_condition_is_there_once(run: Run) -> None:
    maps = run.maps().to_pandas()
    assert len(maps) == 5 * NUM_IMAGES * NUM_CONDITIONS
    assert not maps.duplicated(["detector", "run", "image", "condition"]).any()
    assert set(maps.condition) >= {"clean", "salt_pepper@0.05", "shift_UR@7", "flip_LR", "rotate_90CW", "focus_salient"}
    assert verify_run(run) == []


def test_maps_are_those_of_grad_cam_for_the_predicted_and_the_fixed_class(run: Run) -> None:
    model = run.models[0]
    detector = load_model(run.config.detectors[0], model.checkpoint, model.seed, 2)
    images = run.image_table
    root = image_root(Path(run.config.data.manifest))
    ids = images["image_id"].to_pylist()
    pixels = torch.stack([load_image(resolve(root, path), (96, 96)) for path in images["path"].to_pylist()])
    noisy = salt_and_pepper(pixels, 0.05, seed=run.config.seed, ids=ids)
    with GradCAM(detector.model) as cam:
        clean_maps, clean_logits = cam(detector.preprocess(pixels))
        labels = torch.tensor([run.classes.index(label) for label in images["label"].to_pylist()])
        true_maps, _ = cam(detector.preprocess(pixels), labels)
        noisy_maps, noisy_logits = cam(detector.preprocess(noisy))
        fixed_maps, _ = cam(detector.preprocess(noisy), clean_logits.argmax(1))
    maps = run.maps().to_pandas()
    maps = maps[(maps.detector == "a") & (maps.run == model.run)].set_index("condition")
    for condition, want, fixed, logits in (
        ("clean", clean_maps, true_maps, clean_logits),
        ("salt_pepper@0.05", noisy_maps, fixed_maps, noisy_logits),
    ):
        rows = maps.loc[condition].sort_values("image")
        got = torch.tensor(np.stack(rows["map"])).reshape(want.shape)
        got_fixed = [a if b is None else b for a, b in zip(rows["map"], rows["map_fixed"], strict=True)]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.tensor(np.stack(got_fixed)).reshape(want.shape), fixed, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.tensor(np.stack(rows["logits"])), logits, rtol=1e-4, atol=1e-5)
        assert (rows["predicted"].to_numpy() == logits.argmax(1).numpy()).all()


def test_scores_are_those_of_scikit_image_on_the_stored_maps(run: Run) -> None:
    maps = run.maps().to_pandas().set_index(["detector", "run", "condition", "image"])["map"]
    scores = run.scores().to_pandas()
    rows = scores[(scores.measure == "noise") & (scores.variant == "predicted") & (scores.similarity == "ssim")]
    assert len(rows) == 5 * NUM_IMAGES
    for row in rows[rows.valid].itertuples():
        pair = [maps[row.detector, row.run, condition, row.image] for condition in ("clean", row.condition)]
        a, b = ((m - m.min()) / (m.max() - m.min()) for m in pair)
        mean_a, mean_b, cov = a.mean(), b.mean(), np.cov(a, b)
        want = (2 * mean_a * mean_b + 1e-4) * (2 * cov[0, 1] + 9e-4)
        want /= (mean_a**2 + mean_b**2 + 1e-4) * (cov[0, 0] + cov[1, 1] + 9e-4)
        assert row.value == pytest.approx(want, abs=1e-5)
    assert structural_similarity(np.eye(7), np.eye(7), win_size=7, data_range=1) == 1


def test_kept_says_whether_the_prediction_stayed(run: Run) -> None:
    maps = run.maps().to_pandas().set_index(["detector", "run", "condition", "image"])["predicted"]
    scores = run.scores().to_pandas()
    rows = scores[scores.measure.isin(["noise", "resilience", "focus"])]
    kept = [
        maps[r.detector, r.run, r.condition, r.image] == maps[r.detector, r.run, "clean", r.image]
        for r in rows.itertuples()
    ]
    assert (rows.kept.astype(bool).to_numpy() == np.array(kept)).all()
    assert 0 < np.mean(kept) < 1
    pairs = scores[scores.measure == "stability"]
    agree = [
        maps[r.detector, r.run, "clean", r.image] == maps[r.detector, r.other_run, "clean", r.image]
        for r in pairs.itertuples()
    ]
    assert (pairs.kept.astype(bool).to_numpy() == np.array(agree)).all()
    assert scores[scores.measure == "entropy"].kept.isna().all()


def test_variants_are_equal_where_the_prediction_was_kept_and_differ_elsewhere(run: Run) -> None:
    scores = run.scores().to_pandas()
    keys = ["detector", "run", "condition", "image"]
    rows = scores[(scores.measure == "noise") & (scores.similarity == "ssim")].set_index(keys)
    predicted, fixed = (rows[rows.variant == variant] for variant in ("predicted", "fixed"))
    same = (predicted.value == fixed.value.reindex(predicted.index)) | predicted.value.isna()
    kept = predicted.kept.astype(bool)
    assert same[kept].all()
    live = predicted.valid & fixed.valid.reindex(predicted.index)
    assert (live & ~kept).sum() > 10
    assert not same[live & ~kept].any()


def test_the_number_of_rows_is_that_of_the_design(run: Run) -> None:
    scores = run.scores().to_pandas()
    models, pairs, similarities, variants = 5, 1 + 3, 2, 2
    want = {
        "entropy": models * 2,
        "noise": models * similarities * variants,
        "resilience": models * similarities * variants * 12,
        "focus": models * similarities * variants * 2,
        "stability": pairs * similarities * variants,
    }
    assert scores.measure.value_counts().to_dict() == {name: count * NUM_IMAGES for name, count in want.items()}
    assert (scores.valid == scores.value.notna()).all()


def test_the_summary_is_that_of_the_scores(run: Run) -> None:
    scores = run.scores().to_pandas()
    images = run.image_table.to_pandas()
    scores = scores.merge(images[["image", "label", "source"]], on="image")
    summary = run.summary().to_pandas()
    for row in summary[(summary.source != "all") & (summary.measure != "resilience")].itertuples():
        some = scores[
            (scores.detector == row.detector) & (scores.measure == row.measure) & (scores.variant == row.variant)
        ]
        some = some[(some.condition == row.condition) & (some.source == row.source) & (some.label == row.label)]
        if row.measure != "entropy":
            some = some[some.similarity == row.similarity]
        values = some.value.dropna()
        assert row.n == row.num_values == len(values)
        assert row.n > 3
        assert row.mean == pytest.approx(values.mean())
        assert row.std == pytest.approx(values.std())
        assert row.num_invalid == (~some.valid).sum()
        assert row.chance == pytest.approx(some.chance.mean(), nan_ok=True)
        if row.measure != "entropy":
            assert row.mean_kept == pytest.approx(some[some.kept.astype(bool)].value.mean(), nan_ok=True)
            assert row.mean_flipped == pytest.approx(some[~some.kept.astype(bool)].value.mean(), nan_ok=True)
            assert row.corrected == pytest.approx((row.mean - row.chance) / (1 - row.chance))
    assert (summary.ci_low <= summary["mean"] + 1e-9).all()
    assert (summary["mean"] <= summary.ci_high + 1e-9).all()
    groups = summary[summary.measure == "resilience"].condition.unique()
    assert {"shifts", "flips", "rotations", "all"} <= set(groups)


def test_chance_is_the_similarity_to_the_map_of_the_partner(run: Run) -> None:
    from explain2me.measures import ssim
    from explain2me.statistics.chance import partners

    maps = run.maps().to_pandas()
    maps = maps[(maps.detector == "b") & (maps.run == "seed1")]
    predicted = maps[maps.condition == "clean"].sort_values("image").predicted.to_numpy()
    partner = partners(run.image_table, predicted, seed=run.config.seed)
    clean, noisy = (
        torch.tensor(np.stack(maps[maps.condition == c].sort_values("image")["map"])).reshape(NUM_IMAGES, 3, 3)
        for c in ("clean", "salt_pepper@0.05")
    )
    want = ssim(clean.double(), noisy[torch.from_numpy(partner)].double()).numpy()
    want[partner < 0] = np.nan
    scores = run.scores().to_pandas()
    rows = scores[(scores.detector == "b") & (scores.run == "seed1") & (scores.measure == "noise")]
    rows = rows[(rows.variant == "predicted") & (rows.similarity == "ssim")].sort_values("image")
    np.testing.assert_allclose(rows.chance, want, atol=1e-12)


def test_auroc_is_that_of_scikit_learn(run: Run) -> None:
    maps = run.maps().to_pandas()
    truth = run.image_table.to_pandas().label == "fake"
    performance = run.summary("performance").to_pandas()
    rows = performance[(performance.positives == "all") & (performance.negatives == "all")]
    for row in rows[rows.run != "all"].itertuples():
        some = maps[(maps.detector == row.detector) & (maps.run == row.run) & (maps.condition == row.condition)]
        some = some.sort_values("image")
        known = some.logits.notna().to_numpy()  # no blur without a live clean map
        assert row.num_invalid == (~known).sum()
        assert known.all() or row.condition.startswith("focus")
        assert known.sum() > 20
        logits = torch.tensor(np.stack(some.logits[known])).double()
        score = logits.softmax(1)[:, 1] if row.score == "softmax" else logits[:, 1].sigmoid()
        assert row.auroc == pytest.approx(roc_auc_score(truth[known], score))
        assert row.accuracy == pytest.approx((logits.argmax(1).numpy() == truth[known]).mean())
    mean = rows[rows.run != "all"].groupby(["detector", "condition", "score"]).auroc.mean()
    for row in rows[rows.run == "all"].itertuples():
        assert row.auroc == pytest.approx(mean[row.detector, row.condition, row.score])
    assert set(performance.positives) == {"all", "gan_a", "gan_b"}
    assert set(performance.negatives) == {"all", "camera"}


def test_the_stability_matrix_is_symmetric_and_averages_to_the_measure(run: Run) -> None:
    matrix = run.summary("stability_matrix").to_pandas()
    some = matrix[(matrix.detector == "b") & (matrix.variant == "predicted") & (matrix.similarity == "ssim")]
    assert len(some) == 3 * 2
    table = some.set_index(["run", "other_run"])["mean"]
    assert all(np.array_equal(table[a, b], table[b, a], equal_nan=True) for a, b in table.index)
    summary = run.summary().to_pandas()
    total = summary[(summary.detector == "b") & (summary.measure == "stability") & (summary.variant == "predicted")]
    total = total[(total.label == "all") & (total.similarity == "ssim")]
    weighted = (some["mean"] * some.n).sum() / some.n.sum()
    assert total["mean"].item() == pytest.approx(weighted)


def test_csv_and_parquet_hold_the_same_numbers(run: Run) -> None:
    for name in ("measures", "differences", "performance", "stability_matrix"):
        table = run.summary(name).to_pandas()
        csv = pd.read_csv(run.folder / "summary" / f"{name}.csv", keep_default_na=True)
        assert list(csv.columns) == list(table.columns)
        for column in table.select_dtypes("number"):
            np.testing.assert_allclose(csv[column].astype(float), table[column].astype(float), rtol=1e-5, atol=1e-6)


def files_of(folder: Path) -> dict[str, bytes]:
    wanted = itertools.chain(*(folder.glob(f"{name}/**/*") for name in ("maps", "scores", "summary", "quarantine")))
    return {str(path.relative_to(folder)): path.read_bytes() for path in wanted if path.is_file()}


def test_a_second_call_does_nothing_and_a_missing_part_comes_back_byte_for_byte(copied_run: Run) -> None:
    run, folder = copied_run, copied_run.folder
    before = files_of(folder)
    done: list[int] = []
    explain_run(run.config, folder, on_done=lambda _, count, __: done.append(count))
    assert done == []
    part = sorted((folder / "maps").glob("*/*"))[1]
    part.unlink()
    for path in (folder / "scores").glob("*"):
        path.unlink()
    assert len(verify_run(open_run(folder))) == 2  # and the scores
    with pytest.raises(RunFolderError, match="1 of 6 part files of maps are missing"):
        measure_run(open_run(folder), run.config)
    again = explain_run(run.config, folder, on_done=lambda _, count, __: done.append(count))
    assert sum(done) == 10
    measure_run(again, run.config)
    summarise_run(again, run.config)
    assert files_of(folder) == before


def test_maps_of_another_version_of_the_results_are_never_mixed_in(
    copied_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = copied_run, copied_run.folder
    num_maps = len(run.maps())
    before = files_of(folder / "maps")
    monkeypatch.setattr("explain2me.run.plan.RESULTS_VERSION", 2)
    shards.plan.cache_clear()
    with pytest.raises(RunFolderError, match=r"not of this run, first 'part-00000-.*give --out another folder"):
        explain_run(run.config, folder)
    assert files_of(folder / "maps") == before
    shutil.rmtree(folder / "maps")
    assert len(explain_run(run.config, folder).maps()) == num_maps
    monkeypatch.undo()
    shards.plan.cache_clear()


def test_two_workers_write_the_same_bytes(
    write_config: Callable[..., Path], run_stages: RunStages, finished_run: Run, tmp_path: Path
) -> None:
    two = run_stages(write_config(), tmp_path / "two", "compute.workers=2")
    assert files_of(finished_run.folder) == files_of(two.folder)


def test_measuring_again_with_another_similarity_touches_no_map(copied_run: Run) -> None:
    copy, folder = copied_run, copied_run.folder
    maps = {path: path.stat().st_mtime_ns for path in folder.glob("maps/*/*")}
    measure_run(copy, override(copy.config, ["measures.similarity=top_k_iou", "measures.entropy=false"]))
    scores = copy.scores().to_pandas()
    assert set(scores.similarity.dropna()) == {"top_k_iou"}
    assert "entropy" not in set(scores.measure)
    assert maps == {path: path.stat().st_mtime_ns for path in folder.glob("maps/*/*")}


def test_without_labels_everything_but_auroc_works(
    write_config: Callable[..., Path], run_stages: RunStages, images: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    for i, path in enumerate(sorted(images.parent.rglob("*.png"))):
        shutil.copy(path, folder / f"{i}.png")
    run = run_stages(write_config(data=f'manifest = "{folder}"'), tmp_path / "run")
    assert run.summary("performance").num_rows == 0
    summary = run.summary().to_pandas()
    assert set(summary.measure) == {"entropy", "noise", "resilience", "focus", "stability"}
    assert set(summary[summary.measure == "stability"].variant) == {"predicted"}
    assert summary["mean"].notna().all()


def test_dead_maps_are_counted_and_never_scored(
    write_config: Callable[..., Path], run_stages: RunStages, weights: Path, tmp_path: Path,
    detector_table: Callable[..., str],
) -> None:  # fmt: skip
    for seed in range(2):  # features after ReLU times weights below zero: no cell supports either class
        state = load_file(weights / f"seed{seed}.safetensors")
        state["fc.weight"] = -state["fc.weight"].abs() - 0.1
        save_file(state, tmp_path / f"dead{seed}.safetensors")
    run = run_stages(write_config(detectors=detector_table("dead", f"{tmp_path}/dead*.safetensors")), tmp_path / "run")
    summary = run.summary().to_pandas()
    assert (summary.n == 0).all()
    assert summary["mean"].isna().all()
    assert (summary.dead_share == 1).all()
    performance = run.summary("performance").to_pandas()
    blurred = performance.condition.str.startswith("focus")
    assert performance[blurred].auroc.isna().all()
    assert performance[~blurred].auroc.notna().all()
    maps = run.maps().to_pandas()
    assert maps[maps.condition.str.startswith("focus")].logits.isna().all()


def test_bfloat16_reports_its_deviation(bfloat16_run: Run) -> None:
    precision = bfloat16_run.summary("precision").to_pandas()
    assert set(precision.measure) == {"entropy", "noise", "resilience", "focus", "stability", "performance"}
    assert (precision.max_difference > 0).any()
    assert (precision.max_difference >= precision.mean_difference).all()
    assert (precision.num_values > 0).all()


def test_a_file_that_vanishes_is_quarantined_and_moves_no_other_row(
    finished_run: Run, write_config: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "images"
    shutil.copytree(images.parent, copy)
    config = load_config(write_config(data=f'manifest = "{copy / "manifest.csv"}"'))
    begin_run(config, tmp_path / "partial")
    (copy / "fake" / "gan_a" / "003.png").unlink()
    partial = explain_run(config, tmp_path / "partial")
    measure_run(partial, config)
    summarise_run(partial, config)
    assert verify_run(partial) == []
    rows = partial.quarantine().to_pandas()
    assert (rows.kind == "missing").all()
    assert (rows.stage == "explain").all()
    assert len(rows) == 2  # one a model
    keys = ["detector", "run", "condition", "image"]
    a, b = (r.maps().to_pandas().set_index(keys) for r in (finished_run, partial))
    assert len(b) == len(a) - 2 * NUM_CONDITIONS
    assert all(np.array_equal(a.loc[key, "map"], b.loc[key, "map"]) for key in b.index[::7])
