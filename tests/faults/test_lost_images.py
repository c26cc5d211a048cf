"""Images that vanish during a run: no row is mixed up, and no detector takes the others with it."""

import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from explain2me.errors import Explain2MeError
from explain2me.report.terminal import show_run
from explain2me.report.write import write_report
from explain2me.run.folder import Run
from explain2me.run.plan import plan
from explain2me.run.record import Model
from explain2me.stages.begin import begin_run
from explain2me.stages.explain import explain_run
from explain2me.stages.measure import measure_run
from explain2me.stages.shards.commit import commit_shard
from explain2me.stages.summarise import summarise_run
from explain2me.stages.verify import verify_run


def test_a_shard_without_usable_images_is_a_part_without_rows(tmp_path, make_images, small_config):
    manifest = make_images(tmp_path / "images", counts={("fake", "a"): 5, ("real", "b"): 4})
    config = small_config(manifest, shard_size=4)
    last = manifest.parent / "real" / "b" / "003.png"
    vanished = last.read_bytes()

    def on_start(*_):
        last.unlink()

    run = explain_run(config, tmp_path / "run", on_start=on_start)
    for _ in range(2):
        measure_run(run, run.config)
        summarise_run(run, run.config)
    assert verify_run(run) == []
    assert len(run.quarantine()) == 2  # models
    assert len(run.scores().filter(pa.compute.equal(run.scores()["image"], 8))) == 0
    # the file comes back, the part is made anew: its quarantine goes
    last.write_bytes(vanished)
    for shard in plan(run):
        if shard.part == 2:
            shard.path(run.folder).unlink()
    again = explain_run(config, tmp_path / "run")
    assert len(again.quarantine()) == 0
    assert verify_run(again) == []


@pytest.fixture
def compared_without(tmp_path, make_images, small_config, weights, detector_table):
    """Two detectors of two training runs; their images were lost before some models were explained: (is lost) -> run."""

    def make(lost: Callable[[Model], bool]) -> Run:
        manifest = make_images(tmp_path / "images", counts={("fake", "a"): 6, ("real", "b"): 6})
        tables = "".join(detector_table(name, f"{weights}/seed[01].safetensors") for name in ("a", "b"))
        config = small_config(manifest, shard_size=4, detectors=tables, measures="noise = false\nresilience = false")
        run = begin_run(config, tmp_path / "run")
        for shard in plan(run):
            if not lost(shard.model):
                commit_shard(run.folder, shard)
        for path in manifest.parent.rglob("*.png"):
            path.rename(path.with_suffix(".gone"))
        run = explain_run(config, tmp_path / "run")
        measure_run(run, run.config)
        summarise_run(run, run.config)
        return run

    return make


@pytest.mark.usefixtures("no_pdf")
@pytest.mark.parametrize("gone", ["a", "b"], ids=["the first", "the last"])
def test_a_detector_without_usable_images_changes_no_other(compared_without, gone):
    run = compared_without(lambda model: model.detector == gone)
    other = "b" if gone == "a" else "a"
    rows = run.summary("performance").to_pandas()
    assert set(rows.detector) == {other}
    assert not rows[rows.run == "all"].auroc.isna().any()
    differences = run.summary("differences").to_pandas()
    aurocs = differences[differences.measure == "auroc"]
    assert len(aurocs)
    assert aurocs.difference.isna().all()
    assert set(aurocs["num_runs" if gone == "a" else "num_other_runs"]) == {0}
    show_run(run, Console(file=io.StringIO()))
    page = write_report(run, run.config).read_text()
    assert f"There is no AUROC of {gone}: no run of it has finite logits for images of both classes." in page
    assert f"There is no AUROC of {other}" not in page
    assert f"There is no entropy of {gone}" in page


def test_a_run_without_any_usable_image_is_in_no_mean(compared_without):
    run = compared_without(lambda model: (model.detector, model.run) == ("a", "seed0"))
    rows = (
        run.summary("performance").to_pandas().query("detector == 'a' and condition == 'clean' and score == 'softmax'")
    )
    rows = rows[(rows.positives == "all") & (rows.negatives == "all")].set_index("run")
    assert np.isnan(rows.auroc["seed0"])
    for column in ("auroc", "accuracy", "n", "num_positive", "num_invalid", "ci_low", "ci_high"):
        assert rows[column]["all"] == rows[column]["seed1"], column
    differences = run.summary("differences").to_pandas().query("measure == 'auroc' and label == 'all'")
    assert set(zip(differences.num_runs, differences.num_other_runs, strict=True)) == {(1, 2)}
    assert not differences.difference.isna().any()


def test_images_that_are_gone_empty_no_shard(tmp_path, make_images, small_config):
    manifest = make_images(tmp_path / "images", counts={("fake", "a"): 10, ("real", "b"): 10})
    config = small_config(manifest, shard_size=10, measures="resilience = false\nfocus = false")

    def lose(*_):
        for path in manifest.parent.rglob("*.png"):
            path.rename(path.with_suffix(".gone"))

    with pytest.raises(Explain2MeError, match=r"10 of the 10 images of a shard were there .* is their disk there\?"):
        explain_run(config, tmp_path / "run", on_start=lose)
    for path in manifest.parent.rglob("*.gone"):
        path.rename(path.with_suffix(".png"))
    run = explain_run(config, tmp_path / "run")
    measure_run(run, run.config)
    summarise_run(run, run.config)
    assert verify_run(run) == []
    assert len(run.quarantine()) == 0
    assert set(run.maps(["image"])["image"].to_pylist()) == set(range(20))
