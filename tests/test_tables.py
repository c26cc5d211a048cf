"""The tables of a run, in files and on the terminal: what their numbers are over, and what they say of it."""

import io
import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score

from explain2me import open_run
from explain2me.config.load import load_config, override
from explain2me.errors import RunFolderError
from explain2me.measures import ssim
from explain2me.report.findings import TAGS, Finding
from explain2me.report.formats import mean_std
from explain2me.report.terminal import MOST_FINDINGS, show_findings, show_run
from explain2me.run.folder import Run
from explain2me.run.parts import read_part
from explain2me.stages.explain import explain_run
from explain2me.stages.measure import measure_run
from explain2me.stages.summarise import _write, summarise_run
from explain2me.statistics.performance import performance_rows, predictions_of
from explain2me.text import printable

NUM_IMAGES = 26
OFF = ("measures.entropy=false", "measures.noise=false", "measures.resilience=false", "measures.focus=false")
EVIL = "\x1b[2J\x1b]0;evil\x07\x9b31m"
WriteConfig = Callable[..., Path]


def run_all(config_file: Path, folder: Path, *sets: str) -> Run:
    run = explain_run(load_config(config_file, sets), folder)
    measure_run(run, run.config)
    summarise_run(run, run.config)
    return run


def shown(run: Run, width: int = 200) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False, color_system=None)
    show_run(run, console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, images: Path, weights: Path, detector_table: Callable[..., str]
) -> Run:
    folder = tmp_path_factory.mktemp("tables")
    config = folder / "config.toml"
    text = f'name = "tiny"\n{detector_table("a", f"{weights}/seed[01].safetensors")}[data]\nmanifest = "{images}"\n'
    config.write_text(text + '[summary]\nbootstrap = 20\n[compute]\ndevice = "cpu"\nbatch_size = 8\nshard_size = 10\n')
    return run_all(config, folder / "run")


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


# ------------------------------------------------------------------------------------------------ AUROC


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
    rows = pd.DataFrame(performance_rows(copy, "a", predictions_of(copy, "a"), copy.config))
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


# ------------------------------------------------------------------------------------------------ measures


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


def test_large_counts_are_written_whole_beside_missing_ones(tmp_path: Path) -> None:
    rows = [{"measure": "noise", "n": 1234567, "mean": 0.5}, {"measure": "entropy", "n": None, "mean": 1 / 3}]
    _write(SimpleNamespace(folder=tmp_path), "some", rows, ("measure", "n", "mean"))
    assert (tmp_path / "summary" / "some.csv").read_text() == "measure,n,mean\nnoise,1234567,0.5\nentropy,,0.333333\n"
    table = pq.read_table(tmp_path / "summary" / "some.parquet")
    assert table.schema.field("n").type == pa.int64()
    assert table["n"].to_pylist() == [1234567, None]


@pytest.mark.parametrize("stability", ["true", "false"])
def test_a_run_without_other_measures_goes_through(write_config: WriteConfig, tmp_path: Path, stability: str) -> None:
    run = run_all(write_config(), tmp_path / "run", *OFF, f"measures.stability={stability}")
    wanted = {"stability"} if stability == "true" else set()
    assert set(run.summary()["measure"].to_pylist()) == wanted
    assert run.summary("performance").num_rows > 0
    text = shown(run)
    assert "AUROC (softmax)" in text
    assert ("No measures" in text) == (not wanted)
    assert ("stability ↑" in text) == bool(wanted)
    assert "Resilience" not in text


# ------------------------------------------------------------------------------------------------ precision


@pytest.fixture(scope="module")
def coarse(
    tmp_path_factory: pytest.TempPathFactory, images: Path, weights: Path, detector_table: Callable[..., str]
) -> Run:
    folder = tmp_path_factory.mktemp("coarse")
    config = folder / "config.toml"
    text = f'name = "tiny"\n{detector_table("a", f"{weights}/seed[012].safetensors")}[data]\nmanifest = "{images}"\n'
    text += "[measures]\nnoise = false\nresilience = false\n[summary]\nbootstrap = 0\n"
    config.write_text(text + '[compute]\ndevice = "cpu"\nbatch_size = 8\nprecision = "bfloat16"\n')
    return run_all(config, folder / "run")


def exact_paths(run: Run) -> list[Path]:
    return [next((run.folder / "precision" / f"model={model.name}").glob("*.parquet")) for model in run.models]


def test_the_precision_table_holds_stability_and_auroc(coarse: Run) -> None:
    table = coarse.summary("precision").to_pandas().set_index(["measure", "variant"])
    exact = [read_part(path) for path in exact_paths(coarse)]
    ours = [read_part(path) for model in coarse.models for path in coarse.part_paths(model)]
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
    truth = coarse.image_table.to_pandas().label == "fake"
    want = []
    for path, model in zip(exact_paths(coarse), coarse.models, strict=True):
        frames = [pq.read_table(p, partitioning=None).to_pandas() for p in (path, *coarse.part_paths(model))]
        for condition in ("clean", "focus_salient", "focus_nonsalient"):
            aurocs = []
            for frame in frames:
                some = frame[(frame.condition == condition) & frame.logits.notna()]
                score = torch.tensor(np.stack(some.logits)).double().softmax(1)[:, 1]
                aurocs.append(roc_auc_score(truth[some.image], score))
            want.append(abs(aurocs[0] - aurocs[1]))
    row = table.loc["performance", "softmax"]
    assert row.num_values == 9
    assert row.max_difference == pytest.approx(max(want))
    assert row.mean_difference == pytest.approx(np.mean(want))


def test_values_of_one_precision_only_are_counted(coarse: Run, tmp_path: Path) -> None:
    before = coarse.summary("precision").to_pandas().set_index(["measure", "variant"])
    shutil.copytree(coarse.folder, tmp_path / "run")
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


def test_the_precision_is_that_of_the_measures_that_were_scored(coarse: Run, tmp_path: Path) -> None:
    shutil.copytree(coarse.folder, tmp_path / "run")
    copy = open_run(tmp_path / "run")
    changed = override(copy.config, ["measures.similarity=pearson", "measures.entropy=false"])
    measure_run(copy, changed)
    summarise_run(copy, copy.config)
    table = copy.summary("precision").to_pandas()
    assert set(table.measure) == {"focus", "stability", "performance"}
    assert set(table.similarity.dropna()) == {"pearson"}


# ------------------------------------------------------------------------------------------------ terminal


def test_a_source_of_one_image_and_one_run_is_shown_without_std(
    write_config: WriteConfig, make_images: Callable[..., Path], weights: Path, detector_table: Callable[..., str],
    tmp_path: Path,
) -> None:  # fmt: skip
    manifest = make_images(tmp_path / "few", counts={("real", "camera"): 3, ("fake", "gan"): 1})
    config = write_config(
        data=f'manifest = "{manifest}"', detectors=detector_table("solo", f"{weights}/seed0.safetensors")
    )
    run = run_all(config, tmp_path / "run", "measures.stability=false", "measures.focus=false")
    summary = run.summary().to_pandas()
    row = summary[(summary.source == "gan") & (summary.condition == "all") & (summary.variant == "predicted")].iloc[0]
    assert (row.n, row.num_values) == (1, 12)
    assert np.isnan(row["std"])
    assert "gan" in shown(run)
    assert mean_std(0.5, None) == "0.500"


def test_every_cell_by_source_has_its_chance_level_and_share_of_dead_maps(run: Run) -> None:
    summary = run.summary().to_pandas()
    row = summary[(summary.measure == "noise") & (summary.variant == "predicted") & (summary.source == "gan_a")].iloc[0]
    text = shown(run)
    below = text[text.index("By source") : text.index("Resilience by transform")].splitlines()
    at = next(i for i, line in enumerate(below) if line.strip().startswith("noise"))
    assert f"{row['mean']:.3f} ± {row['std']:.3f}" in below[at]
    assert below[at + 1].split()[:2] == ["chance,", "dead"]
    assert f"{row.chance:.3f}, " in below[at + 1]
    assert below[at + 1].count(" %") == 5
    entropy = next(i for i, line in enumerate(below) if line.strip().startswith("entropy"))
    assert below[entropy + 1].split()[0] == "dead"
    table = text[text.index("Resilience by transform") : text.index("AUROC (softmax)")]
    group = summary[(summary.condition == "flips") & (summary.variant == "predicted") & (summary.label == "all")]
    assert f"{group.chance.item():.3f}, " in table


@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_number_is_cut_at_any_width(run: Run, width: int) -> None:
    text = shown(run, width)
    by_source = text[text.index("By source") : text.index("Resilience by transform")]
    assert "…" not in text[: text.index("AUROC (softmax)")]
    assert max(map(len, text.splitlines())) <= width
    summary = run.summary().to_pandas()
    for row in summary[(summary.source == "gan_b") & (summary.measure == "focus")].itertuples():
        assert f"{row.mean:.3f} ± {row.std:.3f}" in by_source


def test_no_control_character_reaches_the_terminal(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    for path in [tmp_path / "run" / "images.parquet", *(tmp_path / "run" / "summary").glob("*.parquet")]:
        table = pq.read_table(path, partitioning=None)
        for name in {"source", "label", "detector", "positives", "negatives", "run"} & set(table.column_names):
            words = [word if word in ("all", None) else f"{word}{EVIL}" for word in table[name].to_pylist()]
            index = table.schema.get_field_index(name)
            table = table.set_column(index, table.schema.field(index), pa.array(words, table.schema.field(index).type))
        pq.write_table(table, path)
    rows = [{"stage": f"x{EVIL}", "kind": EVIL, "num_images": 1}]
    _write(SimpleNamespace(folder=tmp_path / "run"), "quarantine", rows, ("stage", "kind", "num_images"))
    text = shown(open_run(tmp_path / "run"))
    assert [char for char in text if not char.isprintable() and char != "\n"] == []
    assert "\\x1b[2J\\x1b]0;evil\\x07\\x9b31m" in text
    assert printable("a\x1b\x9b\u202e\nb") == "a\\x1b\\x9b\\u202e\\nb"


# ------------------------------------------------------------------------------------------------ differences


def test_differences_are_those_of_the_other_tables(
    tmp_path: Path, images: Path, weights: Path, detector_table: Callable[..., str]
) -> None:
    text = f'name = "three"\n[data]\nmanifest = "{images}"\n[summary]\nbootstrap = 0\n[compute]\ndevice = "cpu"\n'
    for name, seeds in (("a", "01"), ("b", "1"), ("c", "12")):
        text += detector_table(name, f"{weights}/seed[{seeds}].safetensors")
    config = tmp_path / "config.toml"
    config.write_text(text)
    run = run_all(config, tmp_path / "run", "measures.stability=false", "measures.similarity=['ssim', 'pearson']")
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


def test_one_detector_has_no_differences_and_needs_no_table_of_them(run: Run, tmp_path: Path) -> None:
    assert len(run.summary("differences")) == 0
    shutil.copytree(run.folder, tmp_path / "old")
    (tmp_path / "old" / "summary" / "differences.parquet").unlink()
    assert "Differences" not in shown(open_run(tmp_path / "old"))


def test_findings_are_printed_most_decisive_first_and_not_without_end():
    def shown(found):
        console = Console(file=io.StringIO(), width=80)
        show_findings(found, console)
        return [line.rstrip() for line in console.file.getvalue().splitlines()]

    assert shown([]) == ["What the numbers say", "  Nothing stands out."]
    kinds = list(TAGS)
    found = [Finding(kinds[i % len(kinds)], f"number {i} of [red]x[/red] \x1b[2J") for i in range(MOST_FINDINGS)]
    lines = shown(found)
    assert lines[1] == r"  no reason to choose: number 0 of [red]x[/red] \x1b[2J"
    assert len(lines) == MOST_FINDINGS + 1
    assert shown([*found, *found[:3]]) == [*lines, "  and 3 more, in the report"]
    assert {line[:2] for line in shown([Finding("note", "word " * 40)])[1:]} == {"  "}
