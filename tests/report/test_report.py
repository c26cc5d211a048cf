"""The report of small runs: one set of numbers everywhere, hostile names as text, parts that are absent said to be."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from matplotlib.figure import Figure

from explain2me import open_run
from explain2me.config.load import override
from explain2me.errors import Explain2MeError
from explain2me.report import Plots, write_report
from explain2me.report.figures import all_figures
from explain2me.report.figures.drawing import safe, wrapped
from explain2me.report.figures.plots import radar_values
from explain2me.report.findings import against_chance, against_fixed, compare, findings
from explain2me.report.material import AUROC, Score, _of_one_class, gather, main_similarity
from explain2me.report.notebook import as_html
from explain2me.report.page import _cells, _json, render, viewer_data
from explain2me.report.tables import auroc, by_pair, latex
from explain2me.report.terminal import show_run
from explain2me.run.parts import read_part
from explain2me.stages.measure import measure_run
from explain2me.stages.summarise import summarise_run
from explain2me.statistics.performance import Predictions


def test_every_kind_of_file_is_there(reported):
    folder = reported.folder / "report"
    names = {path.stem for path in (folder / "figures").iterdir()}
    wanted = "fig2-entropy fig3-noise fig4-noise fig5-transforms fig6-runs fig7-focus fig8-samples fig9-roc fig10-radar"
    wanted += (
        " stability-matrix chance mean-maps scatter violin-entropy violin-noise violin-resilience violin-stability"
    )
    assert set(wanted.split()) <= names
    for name in names:
        for kind, start in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
            assert (folder / "figures" / f"{name}.{kind}").read_bytes().startswith(start)
    assert (folder / "model-cards" / "second" / "model-card.md").exists()
    assert (folder / "tables" / "table1-noise.tex").exists()


def test_the_page_loads_nothing_and_says_so_in_its_policy(reported):
    page = (reported.folder / "report" / "index.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src &#39;none&#39;; img-src data:")
    assert "unsafe" not in policy[1]
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert not re.search(r"\son\w+=", re.sub(r"<script.*?</script>", "", page, flags=re.S))
    assert not re.search(r'\sstyle="', page)


def test_numbers_are_those_of_the_summary_everywhere(reported, capsys):
    from rich.console import Console

    rows = reported.summary().to_pandas()
    rows = rows[(rows.measure == "noise") & (rows.variant == "predicted") & (rows.similarity == "ssim")]
    rows = rows[(rows.condition == "salt_pepper@0.05") & (rows.label == "all") & (rows.source == "all")]
    page = (reported.folder / "report" / "index.html").read_text()
    console = Console(record=True, width=300)
    show_run(reported, console)
    terminal = console.export_text()
    with (reported.folder / "report" / "tables" / "table1-noise.csv").open() as file:
        table = list(csv.DictReader(file))
    card = {
        name: (reported.folder / "report" / "model-cards" / name / "model-card.md").read_text()
        for name in ("first-detector", "second")
    }
    assert len(rows) == 2
    for row in rows.to_dict("records"):
        cell = f"{row['mean']:.3f} ± {row['std']:.3f}"
        found = [r for r in table if r["detector"] == row["detector"] and r["variant"] == "predicted"]
        assert found[0]["total"] == cell
        assert cell in page
        assert cell in terminal
        assert f"{row['mean']:.3f}</strong>" in page
        assert str(round(row["mean"], 6)) in card[row["detector"]]
        tex = (reported.folder / "report" / "tables" / "table1-noise.tex").read_text()
        assert cell.replace("±", "$\\pm$") in tex
    auroc = reported.summary("performance").to_pandas()
    auroc = auroc[(auroc.run == "all") & (auroc.score == "softmax") & (auroc.condition == "clean")]
    for row in auroc[(auroc.positives == "all") & (auroc.negatives == "all")].to_dict("records"):
        assert f"{row['auroc']:.3f}</strong>" in page


def test_the_viewer_has_the_maps_that_the_run_has(reported):
    import base64

    page = (reported.folder / "report" / "index.html").read_text()
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', page, re.S)[1])
    assert data["detectors"] == ["first-detector", "second"]
    assert len(data["images"]["id"]) == 26
    item = data["shown"][0]
    maps = reported.maps().to_pandas()
    model = reported.models_of("second")[0]
    rows = maps[(maps.detector == "second") & (maps.run == model.run) & (maps.image == item["image"])]
    found = item["maps"][1][0]
    cells = np.frombuffer(base64.b64decode(found["cells"]), np.uint8).reshape(len(data["conditions"]), -1)
    assert len(cells) == len(rows)
    for quantised, row in zip(cells, rows["map"], strict=True):
        if row is not None and row.max() > 0:
            scaled = (row - row.min()) / max(np.ptp(row), 1e-12)
            assert np.abs((quantised - 1) / 254 - scaled).max() < 0.01


def test_scores_by_image_are_means_over_runs_and_transforms(reported):
    material = gather(reported, images_per_measure=1)
    rows = reported.scores().to_pandas()
    rows = rows[rows.similarity.isna() | (rows.similarity == "ssim")]
    found = material.scores.set_index(["detector", "image"])
    for column in material.columns:
        of_it = rows[(rows.measure == column.measure) & (rows.variant == column.variant)]
        if column.condition is not None:
            of_it = of_it[of_it.condition == column.condition]
        wanted = of_it.groupby(["detector", "image"], observed=True)["value"].mean()
        np.testing.assert_allclose(found[column.key], wanted.reindex(found.index), atol=1e-12, err_msg=column.key)
    kept = rows[(rows.variant == "predicted") & (rows.measure != "stability")].dropna(subset="kept")
    wanted = kept.kept.astype(float).groupby([kept.detector.astype(str), kept.image]).mean()
    np.testing.assert_allclose(found.kept, wanted.reindex(found.index), atol=1e-12)
    assert 0 < found.kept.min() < 1


def test_an_image_beyond_the_table_keeps_its_name_in_the_viewer(reported, monkeypatch):
    monkeypatch.setattr("explain2me.report.page.MOST_ROWS", 2)
    material = gather(reported, images_per_measure=1)
    data = viewer_data(material, matplotlib.colormaps["viridis"])
    assert len(data["images"]["id"]) == 2
    assert max(item["image"] for item in data["shown"]) >= 2
    for item in data["shown"]:
        row = reported.image_table.slice(item["image"], 1).to_pylist()[0]
        assert (item["id"], item["label"], item["source"]) == (row["image_id"], row["label"], row["source"])


def test_the_deviation_of_each_similarity_is_named(reported, monkeypatch):
    material = gather(reported, images_per_measure=1)
    row = {"detector": "second", "measure": "noise", "variant": "predicted", "max_difference": 0.25}
    row |= {"mean_difference": 0.125, "num_one_sided": 3}
    rows = [row | {"similarity": "ssim"}, row | {"similarity": "pearson"}]
    rows.append(row | {"measure": "auroc", "variant": None, "similarity": None})
    material.precision = pd.DataFrame(rows)
    page = render(material, {}, [], [], matplotlib.colormaps["viridis"])
    for measure, variant, similarity in (
        ("noise", "predicted", "ssim"),
        ("noise", "predicted", "pearson"),
        ("auroc", "-", "-"),
    ):
        cells = f'<td>{measure}</td><td>{variant}</td><td>{similarity}</td><td class="n">0.250</td><td class="n">0.125</td><td class="n">3</td>'
        assert cells in page


@pytest.mark.usefixtures("no_pdf")
def test_a_report_made_again_leaves_nothing_of_the_one_before(tmp_path, make_run, images, weights, detector_table):
    text = f'name = "again"\n{detector_table("a", f"{weights}/seed[01].safetensors")}[data]\nmanifest = "{images}"\n'
    text += "[summary]\nbootstrap = 10\n[report]\nimages = 1\n[measures]\nnoise = false\nresilience = false\nfocus = false\n"
    run = make_run(tmp_path, text + '[compute]\ndevice = "cpu"\nbatch_size = 8\n')
    folder = run.folder / "report"
    before = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert "tables/table1-entropy.csv" in before
    (folder / "tables" / "mine.csv").write_text("not ours")
    (folder / ".written").write_text((folder / ".written").read_text() + "../run.json\n")
    config = override(run.config, ["measures.entropy=false"])
    measure_run(run, config)
    summarise_run(run, config)
    write_report(run, config)
    after = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in after if "entropy" in name]
    assert {"tables/mine.csv", "index.html", "figures/fig9-roc.svg"} <= after
    assert (run.folder / "run.json").exists()


def test_telling_images_are_the_extremes(reported):
    material = gather(reported, images_per_measure=2)
    scores = reported.scores().to_pandas()
    rows = scores[(scores.measure == "entropy") & (scores.variant == "spatial")]
    means = rows.groupby(["image", "detector"], observed=True)["value"].mean().groupby("image").mean()
    lowest = {t.image for t in material.telling if t.score == "entropy" and t.why == "lowest"}
    assert lowest == set(means.nsmallest(2).index)


def test_mean_maps_are_means_of_shares(reported):
    material = gather(reported, images_per_measure=1)
    maps = reported.maps().to_pandas()
    images = reported.image_table.to_pandas()
    of_source = images[(images.source == "gan_a") & (images.label == "fake")].image
    rows = maps[(maps.detector == "second") & (maps.condition == "clean") & maps.image.isin(of_source)]
    stack = np.stack(rows["map"]).astype(np.float64)
    stack = stack[stack.sum(1) > 1e-12]
    wanted = (stack / stack.sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(material.clean["second", "fake", "gan_a"].ravel(), wanted, atol=1e-9)


def test_radar_turns_every_axis_so_that_the_rim_is_good(reported):
    material = gather(reported, images_per_measure=1)
    values = radar_values(material)["second"]
    entropy = material.totals("entropy", "spatial", "clean")["second"]["mean"]
    focus = [
        material.totals("focus", "predicted", name)["second"]["mean"] for name in ("focus_salient", "focus_nonsalient")
    ]
    assert values["1 - entropy"] == pytest.approx(1 - entropy)
    assert values["focus"] == pytest.approx((1 - focus[0] + focus[1]) / 2)
    assert list(values) == ["1 - entropy", "noise", "resilience", "focus", "stability"]


UP = Score("x", "x", "noise", "predicted", None, True)
DOWN = UP._replace(higher_is_better=False)


def row(mean, low, high, **more):
    unknown = {"corrected": float("nan"), "corrected_high": float("nan")}
    return {"mean": mean, "ci_low": low, "ci_high": high, "kept_share": 0.8} | unknown | more


def texts(found):
    return [finding.text for finding in found]


def pair(value, half, *, above=(0.3, 0.1), runs=3, measure="x"):
    """The row of the difference a - b, and of that above chance."""
    row = {
        "detector": "a",
        "other_detector": "b",
        "measure": measure,
        "num_runs": runs,
        "num_other_runs": runs,
        "difference": value,
    }
    row |= {"ci_low": value - half, "ci_high": value + half, "corrected": above[0]}
    return {("a", "b"): row | {"corrected_low": above[0] - above[1], "corrected_high": above[0] + above[1]}}


MEANS = {"a": row(0.6, 0.5, 0.7), "b": row(0.2, 0.1, 0.3)}
UNKNOWN = float("nan")


def test_detectors_differ_where_the_interval_of_their_difference_excludes_0():
    assert texts(compare(UP, MEANS, pair(0.4, 0.3), {})) == [
        "a does better than b in x (higher is better): 0.600 against 0.200, a difference of +0.400 [+0.100, +0.700]."
    ]
    assert texts(compare(DOWN, MEANS, pair(0.4, 0.3), {})) == [
        "b does better than a in x (lower is better): 0.200 against 0.600, a difference of -0.400 [-0.700, -0.100]."
    ]
    assert texts(compare(UP, MEANS, pair(0.4, 0.4, above=(0.3, 0.4)), {})) == ["Not told apart in x: a and b."]
    assert texts(compare(UP, MEANS, pair(0.4, UNKNOWN), {})) == [
        "Too few images or training runs with a value to compare in x: a and b."
    ]
    assert texts(compare(UP, MEANS, pair(UNKNOWN, UNKNOWN), {})) == []


def test_a_difference_over_single_runs_is_of_these_trainings_only():
    said = texts(compare(UP, MEANS, pair(0.4, 0.1, runs=1), {}))[0]
    assert said.endswith("Nothing is known of other trainings of a and b, of which there is one run.")
    stability = UP._replace(measure="stability")
    said = texts(compare(stability, MEANS, pair(0.4, 0.1, runs=2, measure="stability"), {}))[0]
    assert said.endswith("Nothing is known of other trainings of a and b, of which there is one pair of runs.")
    assert "Nothing" not in texts(compare(UP, MEANS, pair(0.4, 0.1, runs=2), {}))[0]
    assert "Nothing" not in texts(compare(stability, MEANS, pair(0.4, 0.1, runs=3, measure="stability"), {}))[0]
    (names, one), *_ = pair(0.4, 0.1).items()
    assert "other trainings of b, of which" in texts(compare(UP, MEANS, {names: one | {"num_other_runs": 1}}, {}))[0]


def test_a_difference_that_chance_explains_is_called_so():
    said = texts(compare(UP, MEANS, pair(0.4, 0.1, above=(0.2, 0.3)), {}))[0]
    assert said.endswith("Above chance, not told apart (+0.200 [-0.100, +0.500]).")
    said = texts(compare(UP, MEANS, pair(0.4, 0.1, above=(-0.2, 0.1)), {}))[0]
    assert said.endswith("Above chance, the other way round (-0.200 [-0.300, -0.100]).")
    assert "chance" not in texts(compare(UP, MEANS, pair(0.4, 0.1, above=(UNKNOWN, UNKNOWN)), {}))[0]
    assert "chance" not in texts(compare(DOWN, MEANS, pair(0.4, 0.1, above=(0.2, 0.3)), {}))[0]
    hidden = compare(UP, MEANS, pair(0.1, 0.4, above=(-0.2, 0.1)), {})
    assert texts(hidden) == [
        "In x, b and a are not told apart; above chance b does better (+0.200 [+0.100, +0.300]).",
        "Not told apart in x: a and b.",
    ]
    assert len(texts(compare(DOWN, MEANS, pair(0.1, 0.4, above=(-0.2, 0.1)), {}))) == 1


def test_a_difference_between_means_over_different_images_comes_with_a_warning():
    dead = {"a": row(0.6, 0.5, 0.7, dead_share=0.7), "b": row(0.2, 0.1, 0.3, dead_share=0.02)}
    wanted = "Beware: 70.0% and 2.0% of their maps are dead and in no mean, so the two are of different images."
    assert texts(compare(UP, dead, pair(0.4, 0.1), {}))[0].endswith(wanted)
    assert "Beware" not in texts(compare(UP, dead | {"a": row(0.6, 0.5, 0.7, dead_share=0.04)}, pair(0.4, 0.1), {}))[0]


def test_comparisons_are_counted(reported):
    material = gather(reported, images_per_measure=1)
    pairs = [material.pairs(score, score.variant) for score in (AUROC, *material.columns)]
    assert sum(not np.isnan(row["ci_low"]) for rows in pairs for row in rows.values()) == 7
    apart = material.differences.condition == "focus_salient"
    material.differences = material.differences.assign(ci_low=np.where(apart, 0.1, -1.0), ci_high=1.0)
    wanted = (  # two runs are one pair
        "1 of 6 comparisons over images and training runs came out as different (1 over single runs or pairs of runs not counted); "
        "were all detectors alike, about 0.3 would."
    )
    assert wanted in texts(findings(material))
    material.differences = material.differences.assign(num_other_runs=1)
    assert not any("comparisons" in text for text in texts(findings(material)))
    material.differences = material.differences.assign(ci_low=-1.0, num_other_runs=2)
    assert not any("comparisons" in text for text in texts(findings(material)))


def test_the_table_of_differences_has_every_pair_and_score(reported):
    material = gather(reported, images_per_measure=1)
    sheet = by_pair(material)
    assert [line[:3] for line in sheet.rows] == [
        (score.name, *material.detectors) for score in (AUROC, *material.columns)
    ]
    found = reported.summary("differences").to_pandas()
    row = found[(found.condition == "focus_salient") & (found.label == "all") & (found.similarity == "ssim")]
    row = row.set_index("variant")
    line = next(line for line in sheet.rows if line[0].startswith("focus, salient"))
    assert line[3] == str(row.num_images["predicted"])
    assert line[4] == f"{row.difference['predicted']:.3f}"
    assert line[7] == f"{row.difference['fixed']:.3f}"
    assert line[9] == f"{row.corrected['predicted']:.3f}"
    assert sheet.rows[0][3] == str(len(reported.image_table))  # AUROC
    marked = {line[0]: line[5].endswith("]*") for line in sheet.rows}
    assert marked == {name: name == "stability" for name in marked}  # two runs are one pair
    assert "Differences between detectors" in (reported.folder / "report" / "index.html").read_text()


def test_scores_of_few_images_are_told(reported):
    material = gather(reported, images_per_measure=1)
    name, total = material.detectors[0], len(material.run.image_table)
    assert not any("the only ones that" in text or "after blurring" in text for text in texts(findings(material)))
    labelled = material.performance.n.max() - 3  # as where some images have no label
    material.performance.loc[material.performance.condition == "clean", "n"] = labelled
    of_it = (material.measures.detector == name) & (material.measures.measure == "stability")
    material.measures.loc[of_it, "num_images"] = 2
    blurred = (material.performance.detector == name) & (material.performance.condition == "focus_salient")
    material.performance.loc[blurred & (material.performance.run != "all"), "n"] = 3
    said = {finding.text: finding.detectors for finding in findings(material) if finding.kind == "dead"}
    (few,) = (text for text in said if text.startswith("The stability"))
    assert f"is that of 2 of {total} images, the only ones that have a value" in few
    (auroc,) = (text for text in said if text.startswith(f"The AUROC of {name} after blurring"))
    assert f"in one run that of 3 of {labelled} images" in auroc
    assert said[few] == said[auroc] == (name,)


def test_an_auroc_over_runs_with_other_images_says_how_many(reported):
    material = gather(reported, images_per_measure=1)
    name, total = material.detectors[0], len(material.run.image_table)
    table = material.performance
    of_it = (table.detector == name) & (table.condition == "focus_salient") & (table.positives == table.negatives)
    first, second = (model.run for model in material.run.models_of(name))
    table.loc[of_it & (table.run == first), "n"] = 3
    table.loc[of_it & (table.run == "all"), "n"] = 3

    def counts():
        return {line[:2]: line[7] for line in auroc(material).rows if line[2:4] == ("all", "all")}

    assert counts()[name, "salient region blurred"] == f"3 to {total}"
    assert counts()[name, "as they are"] == str(total)
    table.loc[of_it & (table.run == second), "auroc"] = np.nan  # which is in no mean
    assert counts()[name, "salient region blurred"] == "3"


def test_scores_that_tell_the_same_pairs_not_apart_are_one_sentence(reported):
    material = gather(reported, images_per_measure=1)
    first, second = material.detectors
    material.differences = material.differences.assign(ci_low=-1.0, ci_high=1.0)
    (alike,) = (finding for finding in findings(material) if finding.kind == "alike")
    names = "; ".join(score.name for score in (AUROC, *material.columns))
    assert alike.text == f"Not told apart in {names}: {first} and {second}."
    assert alike.detectors == (first, second)


def test_dead_maps_are_told_by_run(reported):
    material = gather(reported, images_per_measure=1)
    name = material.detectors[0]
    assert sum(material.dead_of_runs[name].values()) == material.dead[name].sum()
    assert list(material.dead_of_runs[name]) == [model.run for model in material.run.models_of(name)]
    material.dead[name][:3] = 1
    material.dead[name][3:] = 0
    material.dead_of_runs[name] = {"r0": 3, "r1": 0}
    assert any(
        f"3 of {name}'s 52 clean maps (5.8%) are dead, by run: r0 3, r1 0: nothing" in text
        for text in texts(findings(material))
    )


def test_a_detector_of_one_class_is_told(reported):
    material = gather(reported, images_per_measure=1)
    first, second = material.detectors
    runs = [model.run for model in material.run.models_of(first)]
    material.one_class = {first: {runs[0]: "fake"}, second: dict.fromkeys(runs, "real")}
    said = {finding.text: finding for finding in findings(material)}
    one = f"{first} takes every image for 'fake' in 1 of its 2 runs ({runs[0]}): it tells no two apart there"
    both = f"{second} takes every image for 'real' in 2 of its 2 runs ({', '.join(runs)}): it tells no two apart there"
    for text, name in ((one, first), (both, second)):
        finding = said[f"{text}; its AUROC tells only how it ranks the images."]
        assert (finding.kind, finding.detectors) == ("chance", (name,))
    material.performance = material.performance.assign(auroc=np.nan)
    assert {f"{one}.", f"{both}."} <= set(texts(findings(material)))


def test_which_runs_predict_one_class():
    labels = ["fake", "fake", "real", None]
    models = [SimpleNamespace(run=name) for name in ("all", "two", "some", "blind", "none", "unlabelled")]
    run = SimpleNamespace(
        image_table=pa.table({"label": labels}), classes=("real", "fake"), models_of=lambda detector: models
    )
    predicted = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [0, -1, 0, -1], [1, 1, -1, 1], [-1, -1, -1, -1], [1, -1, -1, 1]])
    predictions = Predictions(("clean",), np.empty((6, 1, 4, 2)), predicted[:, None])
    assert _of_one_class(run, "d", predictions) == {"all": "fake", "some": "real"}
    assert _of_one_class(run, "d", Predictions((), np.empty((6, 0, 4, 2)), predicted[:, :0])) == {}


@pytest.mark.parametrize(
    ("intervals", "said"),
    [
        ([(0.4, 0.6), (0.45, 0.98)], True),
        ([(0.4, 0.6), (0.51, 0.7)], False),
        ([(0.4, 0.6), (0.01, 0.06)], False),  # its classes are swapped: it tells them apart very well
        ([(0.4, 0.6), (np.nan, np.nan)], False),
    ],
)
def test_that_auroc_gives_no_reason_to_choose_is_said(reported, intervals, said):
    material = gather(reported, images_per_measure=1)
    text = (
        "No detector's AUROC over all images together is told from chance (0.5): it gives no reason to choose one of them. A single source "
        "may still be told apart; see AUROC."
    )
    clean = (material.performance.condition == "clean") & (material.performance.run == "all")
    for name, interval in zip(material.detectors, intervals, strict=True):
        material.performance.loc[clean & (material.performance.detector == name), ["ci_low", "ci_high"]] = interval
    assert (text in texts(findings(material))) == said
    assert (findings(material)[0].text == text) == said
    if said:
        material.performance.loc[clean & (material.performance.detector == name), "auroc"] = np.nan
        assert text not in texts(findings(material))


def wrong_ways(material):
    return {f.text.split(" of ")[0] for f in findings(material) if "wrong way" in f.text}, {
        f.detectors for f in findings(material) if "wrong way" in f.text
    }


def test_focus_that_goes_the_wrong_way_is_told(reported):
    material = gather(reported, images_per_measure=1)
    name, _ = material.detectors
    measures, performance = material.measures, material.performance
    measures["dead_share"] = 0.0
    performance.loc[performance.condition == "clean", "ci_low"] = 0.6
    for table in (measures, performance):
        table.loc[table.condition == "focus_salient", ["ci_low", "ci_high"]] = 0.2, 0.3
        table.loc[table.condition == "focus_nonsalient", ["ci_low", "ci_high"]] = 0.25, 0.4
    assert wrong_ways(material) == (set(), set())
    for table in (measures, performance):
        wrong = (table.detector == name) & (table.condition == "focus_salient")
        table.loc[wrong, ["ci_low", "ci_high"]] = 0.41, 0.5
    assert wrong_ways(material) == ({"The AUROC", "The focus"}, {(name,)})
    fixed = (measures.variant == "fixed") & (measures.condition == "focus_salient")
    measures.loc[fixed, "ci_low"] = 0.3  # a difference of decisions
    assert wrong_ways(material) == ({"The AUROC"}, {(name,)})
    measures.loc[fixed, "ci_low"] = 0.41
    measures.loc[measures.condition == "focus_salient", "dead_share"] = 0.05  # maps that changed most are in no mean
    assert wrong_ways(material) == ({"The AUROC"}, {(name,)})
    performance.loc[performance.condition == "clean", "ci_low"] = 0.5  # it ranks nothing as it is
    assert wrong_ways(material) == (set(), set())


def test_maps_of_a_few_cells_are_told(reported):
    material = gather(reported, images_per_measure=1)
    first, second = material.detectors
    assert material.map_sizes == dict.fromkeys(
        material.detectors, read_part(material.run.part_paths(material.run.models[0])[0]).maps.shape[2:]
    )
    material.map_sizes = {first: (4, 6), second: (5, 5)}
    (few,) = (finding for finding in findings(material) if "cells" in finding.text)
    assert f"The maps of {first} have 4 x 6 cells" in few.text
    assert "that of 24 numbers" in few.text
    assert few.detectors == (first,)


def test_cards_hold_whole_sentences(reported):
    text = next((reported.folder / "report" / "model-cards").rglob("model-card.md")).read_text()
    (line,) = (line for line in text.splitlines() if "the interval of a score draws these anew" in line)
    assert line.endswith(".")


def test_an_auroc_at_chance_and_a_score_that_is_not_there_are_told_of_their_detector(reported):
    material = gather(reported, images_per_measure=1)
    name = material.detectors[0]
    material.performance = material.performance.assign(ci_low=0.4, ci_high=0.6)
    material.measures.loc[(material.measures.detector == name) & (material.measures.measure == "entropy"), "mean"] = (
        np.nan
    )
    said = {finding.text: finding.detectors for finding in findings(material)}
    assert next(of for text, of in said.items() if text.startswith(f"The AUROC of {name} is not told from chance")) == (
        name,
    )
    assert said[f"There is no entropy of {name}: all of its maps are dead."] == (name,)
    assert sum(text.startswith("There is no ") for text in said) == 1


def test_few_training_runs_are_told(reported, monkeypatch):
    material = gather(reported, images_per_measure=1)
    first, second = material.detectors
    said = [finding for finding in findings(material) if finding.kind == "runs"]
    assert [finding.detectors for finding in said] == [(first, second)]
    assert said[0].text.startswith("2 training runs of each detector: the interval of a score draws these anew")
    assert "draws these anew; that of stability draws none." in said[0].text
    assert "50 % of such intervals" in said[0].text
    assert said[0].text.endswith("allow for it but for stability.")
    assert said[0].kind == "runs"
    counts = {first: [None] * 3, second: [None] * 10}
    monkeypatch.setattr(type(material.run), "models_of", lambda self, name: counts[name])
    (three,) = (finding.text for finding in findings(material) if finding.kind == "runs")
    assert three.startswith(f"3 training runs of {first}: the interval of a score draws these anew. So few")
    assert "75 % of such intervals (50 % of those of stability)" in three
    assert three.endswith("The intervals of differences between detectors allow for it.")
    counts = {first: [None] * 10, second: [None]}
    monkeypatch.setattr(type(material.run), "models_of", lambda self, name: counts[name])
    said = [finding for finding in findings(material) if finding.kind == "runs"]
    assert [(finding.text[:29], finding.detectors) for finding in said] == [
        ("1 training run of second: the", (second,))
    ]


def test_a_difference_of_decisions_is_called_one():
    def said(fixed):
        return texts(compare(UP, MEANS, pair(0.4, 0.3), fixed))[0]

    wanted = "Not told apart once the class is held fixed (+0.100 [-0.100, +0.300]): a difference of decisions."
    assert said(pair(0.1, 0.2)).endswith(wanted)
    assert said(pair(-0.3, 0.2)).endswith("The other way round once the class is held fixed (-0.300 [-0.500, -0.100]).")
    assert "fixed" not in said(pair(0.2, 0.1))
    assert "fixed" not in said(pair(0.2, UNKNOWN))


def test_a_difference_that_is_gone_only_above_chance_and_held_fixed_is_told():
    def said(fixed, score=UP, of=None):
        return texts(compare(score, MEANS, of or pair(0.4, 0.1, above=(0.3, 0.1)), fixed))[0]

    both = "Above chance and with the class held fixed together, "
    assert said(pair(0.2, 0.1, above=(0.1, 0.2))).endswith(f"{both}not told apart (+0.100 [-0.100, +0.300]).")
    assert said(pair(0.2, 0.1, above=(-0.2, 0.1))).endswith(f"{both}the other way round (-0.200 [-0.300, -0.100]).")
    assert "together" not in said(pair(0.2, 0.1, above=(0.2, 0.1)))
    assert "together" not in said(pair(0.2, 0.1, above=(UNKNOWN, UNKNOWN)))
    assert "together" not in said(pair(0.2, 0.1, above=(0.1, 0.2)), DOWN)
    assert "together" not in said(pair(0.1, 0.2, above=(0.1, 0.2)))  # told already
    assert "together" not in said(pair(0.2, 0.1, above=(0.1, 0.2)), of=pair(0.4, 0.1, above=(0.1, 0.2)))
    stability = UP._replace(measure="stability")
    of_runs = pair(0.4, 0.1, above=(0.3, 0.1), measure="stability")
    assert "with the true class explained together" in said(pair(0.2, 0.1, above=(0.1, 0.2)), stability, of_runs)


def test_no_better_than_chance_is_stuck_or_unlike_anything():
    stuck = {"a": row(0.9, 0.8, 1.0, chance=0.9, corrected_low=-0.1)}
    unlike = {"a": row(0.03, 0.0, 0.1, chance=0.02, corrected_low=-0.1, corrected=0.01, corrected_high=0.12)}
    better = {"a": row(0.9, 0.8, 1.0, chance=0.9, corrected_low=0.01)}
    said = texts(against_chance(UP, unlike))[0]
    assert (
        "0.030 where maps of other images of the same class reach 0.020 (above chance 0.010 [-0.100, 0.120]). Its"
        in said
    )
    assert "It looks at the same place whatever the image." in texts(against_chance(UP, stuck))[0]
    assert "not shown to agree more than those of unrelated images" in texts(against_chance(UP, unlike))[0]
    assert texts(against_chance(UP, better)) == []
    assert texts(against_chance(DOWN, stuck)) == []
    one_map = {"a": row(1.0, 1.0, 1.0, chance=1.0, corrected_low=float("nan"))}
    assert "above" not in texts(against_chance(UP, one_map))[0]
    assert "It looks at the same place whatever the image." in texts(against_chance(UP, one_map))[0]


def test_variants_that_disagree_are_told():
    predicted, fixed = (
        {"a": row(0.494, 0.373, 0.639)},
        {"a": row(0.699, 0.579, 0.873)},
    )  # means outside, intervals overlap
    focus = UP._replace(name="y")
    near = (UP._replace(name="z"), predicted, {"a": row(0.6, 0.5, 0.7)})
    (found,) = against_fixed([(UP, predicted, fixed), near, (focus, predicted, {"a": row(0.7, 0.6, 0.9)})])
    assert (found.kind, found.detectors) == ("decision", ("a",))
    assert found.text.endswith(
        "not only its focus. For the predicted class against the class predicted on the clean image: x 0.494 against 0.699 (20% of the "
        "decisions changed); y 0.494 against 0.700 (20% of the decisions changed)."
    )
    assert list(against_fixed([near])) == []
    some = {"a": row(0.699, 0.579, 0.873, dead_share=0.39)}
    beside = (
        "0.699 (20% of the decisions changed; the two are of different images, as 39% of the maps of one are dead)."
    )
    assert texts(against_fixed([(UP, predicted, some)]))[0].endswith(beside)
    few = {"a": row(0.699, 0.579, 0.873, dead_share=0.04)}
    assert "dead" not in texts(against_fixed([(UP, predicted, few)]))[0]
    stability = texts(against_fixed([(UP._replace(measure="stability"), predicted, fixed)]))
    assert stability[0].endswith("0.699 for the true class. 20% of the pairs of runs disagree.")
    assert "decisions" not in stability[0]


@pytest.mark.usefixtures("no_pdf")
def test_dead_maps_are_counted_from_the_maps(tmp_path, make_run, make_images, weights, detector_table):
    from safetensors.torch import load_file, save_file

    for i in range(2):
        state = load_file(weights / f"seed{i}.safetensors")
        if i == 0:
            state["fc.weight"] = -state["fc.weight"].abs()
        save_file(state, tmp_path / f"run{i}.safetensors")
    manifest = make_images(tmp_path / "images", counts={("fake", "a"): 5, ("real", "b"): 4})
    text = f'name = "dead"\n{detector_table("d", f"{tmp_path}/run*.safetensors")}[data]\nmanifest = "{manifest}"\n[measures]\n'
    text += 'entropy = false\n[summary]\nbootstrap = 10\n[report]\nimages = 1\n[compute]\ndevice = "cpu"\n'
    run = make_run(tmp_path, text)
    maps = run.maps().to_pandas()
    clean = maps[maps.condition == "clean"]
    dead = sum(one is None or one.sum() <= 1e-12 for one in clean["map"])
    assert dead >= 9
    said = [t for t in texts(findings(gather(run, images_per_measure=1))) if "clean maps" in t]
    assert said[0].startswith(f"{dead} of d's 18 clean maps")


@pytest.mark.parametrize(
    ("levels", "wanted"), [("[0.0, 0.01, 0.05, 0.1]", "0.05"), ("[0.0, 0.02, 0.2]", "0.02"), ("[0.0]", "0")]
)
def test_the_noise_of_the_headline_is_the_papers(tmp_path, levels, wanted):
    from explain2me.config.load import parse_config
    from explain2me.report.material import _main_noise

    table = {"name": "d", "architecture": "timm:x", "random_runs": 1}
    config = parse_config(
        {
            "name": "x",
            "data": {"manifest": "m"},
            "detectors": [table],
            "measures": {"noise": {"levels": json.loads(levels)}},
        }
    )
    assert (
        _main_noise(SimpleNamespace(config=config, models=[SimpleNamespace(input_size=(64, 64))]))
        == f"salt_pepper@{wanted}"
    )


def test_the_main_similarity_is_one_everywhere():
    import pandas as pd

    assert main_similarity(pd.Series(["top_k_iou", None, "spearman"])) == "spearman"
    assert main_similarity(pd.Series(["top_k_iou", "ssim"])) == "ssim"


def test_detectors_of_two_input_sizes_and_a_source_of_two_labels(
    tmp_path, make_run, make_images, weights, detector_table
):
    manifest = make_images(tmp_path / "images", counts={("fake", "a"): 5, ("real", "a"): 5})
    text = f'name = "sizes"\n{detector_table("NAME", f"{weights}/seed[01].safetensors")}'.replace("NAME", "[small] 😀")
    text += detector_table("large", f"{weights}/seed[12].safetensors", size=128)
    text += (
        f'[data]\nmanifest = "{manifest}"\n[summary]\nbootstrap = 10\n[report]\nimages = 1\n[compute]\ndevice = "cpu"\n'
    )
    run = make_run(tmp_path, text)
    folder = run.folder / "report"
    with (folder / "tables" / "table2-transforms.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["shift_DR"] for row in rows}.isdisjoint({"-"})
    with (folder / "tables" / "table1-entropy.csv").open() as file:
        assert {"fake a", "real a"} <= set(next(csv.reader(file)))
    tex = (folder / "tables" / "table2-transforms.tex").read_text()
    assert "\\\\relax\n[small]" in tex
    differences = run.summary("differences").to_pandas()
    assert {"shift_DR@7"} == set(differences.condition[differences.condition.str.startswith("shift_DR")])
    assert differences[differences.condition == "shift_DR@7"].ci_low.notna().any()
    assert set(differences.label[differences.source == "a"]) == {"fake", "real"}
    card = (folder / "model-cards" / "[small] 😀" / "model-card.md").read_text()
    assert "😀" in card.split("---")[1]
    assert "large" not in card.split("## What to know")[1].split("## Data")[0].replace(
        "does better than large", ""
    ).replace("large does", "").replace("and large", "")


def test_hostile_names_are_text_everywhere(hostile):
    folder = hostile.folder / "report"
    page = (folder / "index.html").read_text()
    assert "<img src=x" not in page
    assert page.count("<script") == 2
    assert page.count("</script") == 2
    assert "&lt;img src=x onerror=evil()&gt;" in page
    for path in (folder / "tables").glob("*.csv"):
        with path.open(newline="") as file:
            assert not any(cell.startswith(("=", "+", "@")) for row in csv.reader(file) for cell in row)
    for path in (folder / "tables").glob("*.tex"):
        assert "a$b$" not in path.read_text()
    card = next((folder / "model-cards").glob("*/model-card.md")).read_text()
    body = card.split("---", 2)[2]
    assert "<img" not in body
    head = card.split("---")[1]
    for line in head.strip().splitlines():
        json.loads(line.partition(": ")[2])  # YAML that is JSON: nothing can break out of it


def test_json_cannot_end_its_element():
    text = _json({"a": "</script><!-- & \u2028"})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": "</script><!-- & \u2028"}


@pytest.mark.usefixtures("no_pdf")
@pytest.mark.parametrize(
    ("what", "absent", "present"),
    [
        ("one measure", ["Not measured in this run: noise, resilience, focus, stability"], ["Entropy"]),
        ("one detector", ["There is one detector, so nothing is compared"], ["Resilience to transforms"]),
        ("no labels", ["The images have no labels"], ["Stability across training runs"]),
        ("one source", ["All images come from one source"], ["Focus"]),
        ("nothing but AUROC", ["Not measured in this run: entropy, noise"], ["AUROC"]),
    ],
)
def test_a_partial_run_has_a_whole_report(
    tmp_path, make_run, make_images, weights, detector_table, what, absent, present
):
    counts = {("fake", "a"): 6, ("real", "b"): 6}
    manifest = make_images(tmp_path / "images", counts={("x", "a"): 8} if what == "one source" else counts)
    if what in ("no labels", "one source"):
        lines = [line.split(",") for line in manifest.read_text().splitlines()]
        manifest.write_text(
            "\n".join(f"{path},{source if what == 'no labels' else 's'}" for path, _, source, _ in lines).replace(
                "path,s\n", "path,source\n"
            )
            + "\n"
        )
    text = f'name = "part"\n{detector_table("a", f"{weights}/seed[01].safetensors")}'
    if what != "one detector":
        text += detector_table("b", f"{weights}/seed[12].safetensors")
    text += (
        f'[data]\nmanifest = "{manifest}"\n[summary]\nbootstrap = 20\n[report]\nimages = 1\n[compute]\ndevice = "cpu"\n'
    )
    if what in ("one measure", "nothing but AUROC"):
        off = "noise = false\nresilience = false\nfocus = false\nstability = false\n"
        text += "[measures]\n" + off + ("entropy = false\n" if what == "nothing but AUROC" else "")
    if what in ("no labels", "one source"):
        text = text.replace("[data]\n", '[data]\npositive = "1"\n')
    run = make_run(tmp_path, text)
    page = (run.folder / "report" / "index.html").read_text()
    for words in (*absent, *present):
        assert words in page, words


@pytest.mark.usefixtures("no_pdf")
def test_a_vanished_image_leaves_a_report_without_its_picture(tmp_path, make_run, make_images, weights, detector_table):
    manifest = make_images(tmp_path / "images", counts={("fake", "a"): 4, ("real", "b"): 4})
    text = f'name = "gone"\n{detector_table("a", f"{weights}/seed[01].safetensors")}[data]\nmanifest = "{manifest}"\n'
    text += '[summary]\nbootstrap = 10\n[report]\nimages = 1\n[compute]\ndevice = "cpu"\n'
    run = make_run(tmp_path, text, report=False)
    for path in manifest.parent.rglob("*.png"):
        path.unlink()
    page = write_report(run, run.config)
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', page.read_text(), re.S)[1])
    assert all(item["picture"] is None for item in data["shown"])


def test_without_a_summary_the_error_says_what_to_do(reported, tmp_path):
    import shutil

    shutil.copytree(reported.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "summary")
    with pytest.raises(Explain2MeError, match="call `explain2me summarise"):
        write_report(open_run(tmp_path / "run"), reported.config)


def test_figures_for_notebooks(reported):
    plots = Plots(reported)
    assert isinstance(plots.radar(), Figure)
    assert isinstance(plots.roc(), Figure)
    assert "mean_maps" in dir(plots)
    with pytest.raises(AttributeError, match="no figure 'raddar'"):
        plots.raddar()


def test_a_run_in_a_notebook(reported, monkeypatch):
    shown = {}

    class Shell:
        class display_formatter:
            formatters = {"text/html": SimpleNamespace(for_type=shown.__setitem__)}

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=Shell))
    run = open_run(reported.folder)
    summary = run.summary()
    assert isinstance(summary, pa.Table)
    assert summary.equals(reported.summary())
    html = shown[pa.Table](summary)
    assert 10 < html.count("<tr>") < len(summary)
    assert shown[pa.Table](run.scores()) is None
    assert isinstance(run.plot.radar(), Figure)


def test_a_hostile_run_in_a_notebook(hostile):
    html = as_html(open_run(hostile.folder).summary())
    assert html is not None
    assert "<img" not in html


def test_every_figure_is_told_in_words(reported):
    material = gather(reported, images_per_measure=2)
    import matplotlib

    for _, draw in all_figures(material):
        drawn = draw(material, matplotlib.colormaps["viridis"])
        assert drawn is not None
        assert len(drawn.text) > 30
        assert "nan" not in drawn.text


def test_cells_of_a_dead_map_are_zero_and_large_maps_are_averaged():
    assert _cells(np.zeros((3, 3)))[0] == bytes(9)
    assert _cells(np.full((3, 3), np.nan))[0] == bytes(9)
    data, size = _cells(np.random.default_rng(0).random((56, 28)))
    assert size == (14, 14)
    assert min(data) == 1
    assert max(data) == 255


def test_names_in_figures_are_no_formulas():
    assert "\\$" in safe("a$b$")
    assert wrapped("resnet50-cross-entropy-guided") == "resnet50-cross-\nentropy-guided"
    assert latex("<0.001 | >2") == "\\textless{}0.001 \\textbar{} \\textgreater{}2"
    assert latex("\\input{x}") == "\\textbackslash{}input\\{x\\}"


@pytest.mark.slow
def test_latex_compiles_where_there_is_one(reported, tmp_path):
    import shutil

    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex here")
    table = reported.folder / "report" / "tables" / "table1-noise.tex"
    (tmp_path / "a.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}" + table.read_text() + "\\end{document}"
    )
    subprocess.run(["pdflatex", "-halt-on-error", "a.tex"], cwd=tmp_path, check=True, capture_output=True)


def test_torch_is_left_alone(reported):
    state = torch.get_rng_state()
    gather(reported, images_per_measure=1)
    assert torch.equal(state, torch.get_rng_state())
    assert Path(reported.folder / "report" / "index.html").stat().st_size < 5_000_000
