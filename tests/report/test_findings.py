"""Sentences about a whole run."""

import numpy as np
import pytest

from explain2me.report.findings import findings
from explain2me.report.material import gather
from explain2me.report.summary import AUROC
from explain2me.run.parts import read_part


def texts(sentences):
    return [finding.text for finding in sentences]


def test_comparisons_are_counted(material):
    pairs = [material.tables.pairs(score) for score in (AUROC, *material.tables.columns)]
    assert sum(not np.isnan(row["ci_low"]) for rows in pairs for row in rows.values()) == 7
    apart = material.tables.differences.condition == "focus_salient"
    material.tables.differences = material.tables.differences.assign(ci_low=np.where(apart, 0.1, -1.0), ci_high=1.0)
    expected = (  # two runs are one pair
        "1 of 6 comparisons over images and training runs are significant (1 over single runs or single pairs of runs not counted). "
        "With no true differences, about 0.3 of 6 would be significant by chance."
    )
    assert expected in texts(findings(material))
    material.tables.differences = material.tables.differences.assign(num_other_runs=1)
    assert not any("comparisons" in text for text in texts(findings(material)))
    material.tables.differences = material.tables.differences.assign(ci_low=-1.0, num_other_runs=2)
    assert not any("comparisons" in text for text in texts(findings(material)))


def test_scores_of_few_images_are_reported(material):
    name, total = material.tables.detectors[0], len(material.run.image_table)
    assert not any(
        "the others have no value" in text or "on perturbed images" in text for text in texts(findings(material))
    )
    labelled = material.tables.performance.n.max() - 3  # as where some images have no label
    material.tables.performance.loc[material.tables.performance.condition == "clean", "n"] = labelled
    of_it = (material.tables.measures.detector == name) & (material.tables.measures.measure == "stability")
    material.tables.measures.loc[of_it, "num_images"] = 2
    blurred = (material.tables.performance.detector == name) & (
        material.tables.performance.condition == "focus_salient"
    )
    material.tables.performance.loc[blurred & (material.tables.performance.run != "all"), "n"] = 3
    sentences = {finding.text: finding.detectors for finding in findings(material) if finding.kind == "dead"}
    (few,) = (text for text in sentences if text.startswith("The stability"))
    assert f"is over 2 of {total} images, because the others have no value" in few
    (auroc,) = (text for text in sentences if text.startswith(f"The AUROC of {name} on perturbed images"))
    assert f"is over 3 of {labelled} images in one run" in auroc
    assert sentences[few] == sentences[auroc] == (name,)


def test_scores_in_which_the_same_pairs_do_not_differ_are_one_sentence(material):
    first, second = material.tables.detectors
    material.tables.differences = material.tables.differences.assign(ci_low=-1.0, ci_high=1.0)
    (alike,) = (finding for finding in findings(material) if finding.kind == "alike")
    names = "; ".join(score.name for score in (AUROC, *material.tables.columns))
    assert alike.text == f"Not significantly different in {names}: {first} and {second}."
    assert alike.detectors == (first, second)


def test_dead_maps_are_reported_by_run(material):
    name = material.tables.detectors[0]
    assert sum(material.dead_of_runs[name].values()) == material.dead[name].sum()
    assert list(material.dead_of_runs[name]) == [model.run for model in material.run.models_of(name)]
    material.dead[name][:3] = 1
    material.dead[name][3:] = 0
    material.dead_of_runs[name] = {"r0": 3, "r1": 0}
    assert any(
        f"3 of 52 clean maps of {name} (5.8 %) are dead, by run: r0 3, r1 0. They show no evidence" in text
        for text in texts(findings(material))
    )


def test_a_detector_of_one_class_is_reported(material):
    first, second = material.tables.detectors
    runs = [model.run for model in material.run.models_of(first)]
    material.one_class = {first: {runs[0]: "fake"}, second: dict.fromkeys(runs, "real")}
    sentences = {finding.text: finding for finding in findings(material)}
    one = f"{first} predicts 'fake' for every image in 1 of its 2 runs ({runs[0]})."
    both = f"{second} predicts 'real' for every image in 2 of its 2 runs ({', '.join(runs)})."
    for text, name in ((one, first), (both, second)):
        finding = sentences[f"{text} Its AUROC shows only how it ranks the images."]
        assert (finding.kind, finding.detectors) == ("chance", (name,))
    material.tables.performance = material.tables.performance.assign(auroc=np.nan)
    assert {one, both} <= set(texts(findings(material)))


@pytest.mark.parametrize(
    ("intervals", "sentences"),
    [
        ([(0.4, 0.6), (0.45, 0.98)], True),
        ([(0.4, 0.6), (0.51, 0.7)], False),
        ([(0.4, 0.6), (0.01, 0.06)], False),  # its classes are swapped: it ranks them very well
        ([(0.4, 0.6), (np.nan, np.nan)], False),
    ],
)
def test_that_auroc_gives_no_reason_to_choose_is_said(material, intervals, sentences):
    text = (
        "No detector has an AUROC over all images that is better than chance (0.5), so AUROC gives no reason to choose one of them. "
        "AUROC on a single source may still be above chance; see the tables of AUROC."
    )
    clean = (material.tables.performance.condition == "clean") & (material.tables.performance.run == "all")
    for name, interval in zip(material.tables.detectors, intervals, strict=True):
        material.tables.performance.loc[
            clean & (material.tables.performance.detector == name), ["ci_low", "ci_high"]
        ] = interval
    assert (text in texts(findings(material))) == sentences
    assert (findings(material)[0].text == text) == sentences
    if sentences:
        material.tables.performance.loc[clean & (material.tables.performance.detector == name), "auroc"] = np.nan
        assert text not in texts(findings(material))


def wrong_ways(material):
    return {f.text.split(" of ")[0] for f in findings(material) if "wrong way" in f.text}, {
        f.detectors for f in findings(material) if "wrong way" in f.text
    }


def test_focus_that_goes_the_wrong_way_is_reported(material):
    name, _ = material.tables.detectors
    measures, performance = material.tables.measures, material.tables.performance
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


def test_maps_of_a_few_cells_are_reported(material):
    first, second = material.tables.detectors
    assert material.map_sizes == dict.fromkeys(
        material.tables.detectors, read_part(material.run.part_paths(material.run.models[0])[0]).maps.shape[2:]
    )
    material.map_sizes = {first: (4, 6), second: (5, 5)}
    (few,) = (finding for finding in findings(material) if "cells" in finding.text)
    assert f"The maps of {first} have 4 x 6 cells" in few.text
    assert "is over 24 numbers" in few.text
    assert few.detectors == (first,)


def test_an_auroc_at_chance_and_a_score_that_is_not_there_are_reported_for_their_detector(material):
    name = material.tables.detectors[0]
    material.tables.performance = material.tables.performance.assign(ci_low=0.4, ci_high=0.6)
    material.tables.measures.loc[
        (material.tables.measures.detector == name) & (material.tables.measures.measure == "entropy"), "mean"
    ] = np.nan
    sentences = {finding.text: finding.detectors for finding in findings(material)}
    assert next(
        of for text, of in sentences.items() if text.startswith(f"The AUROC of {name} is no better than chance")
    ) == (name,)
    assert sentences[f"There is no entropy of {name}: all of its maps are dead."] == (name,)
    assert sum(text.startswith("There is no ") for text in sentences) == 1


def test_few_training_runs_are_reported(material, monkeypatch):
    first, second = material.tables.detectors
    sentences = [finding for finding in findings(material) if finding.kind == "runs"]
    assert [finding.detectors for finding in sentences] == [(first, second)]
    assert sentences[0].text.startswith(
        "2 training runs of each detector: so few runs make the interval of a score too narrow."
    )
    assert (
        "50 % of such intervals would contain the true mean, not 95 %; those of stability are over images only."
        in sentences[0].text
    )
    assert sentences[0].text.endswith("take this into account, except those of stability.")
    assert sentences[0].kind == "runs"
    counts = {first: [None] * 3, second: [None] * 10}
    monkeypatch.setattr(type(material.run), "models_of", lambda self, name: counts[name])
    (three,) = (finding.text for finding in findings(material) if finding.kind == "runs")
    assert three.startswith(f"3 training runs of {first}: so few runs make")
    assert "75 % of such intervals would contain the true mean, not 95 % (50 % of those of stability)." in three
    assert three.endswith("The intervals of differences between detectors take this into account.")
    counts = {first: [None] * 10, second: [None]}
    monkeypatch.setattr(type(material.run), "models_of", lambda self, name: counts[name])
    sentences = [finding for finding in findings(material) if finding.kind == "runs"]
    assert [(finding.text[:29], finding.detectors) for finding in sentences] == [
        ("1 training run of second: its", (second,))
    ]


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
    text += 'noise = false\nresilience = false\nfocus = false\n[summary]\nbootstrap = 10\n[report]\nimages = 1\n[compute]\ndevice = "cpu"\n'
    run = make_run(tmp_path, text, report=False)
    maps = run.maps().to_pandas()
    clean = maps[maps.condition == "clean"]
    dead = sum(one is None or one.sum() <= 1e-12 for one in clean["map"])
    assert dead >= 9
    sentences = [t for t in texts(findings(gather(run, images_per_measure=1))) if "clean maps" in t]
    assert sentences[0].startswith(f"{dead} of 18 clean maps of d ")
