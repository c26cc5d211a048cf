"""Sentences about pairs of detectors, chance and decisions, from rows made by hand."""

from explain2me.report.findings.chance import against_chance
from explain2me.report.findings.comparisons import compare
from explain2me.report.findings.decisions import against_fixed
from explain2me.report.summary import RunScore

UP = RunScore("x", "x", "noise", "predicted", None, True)
DOWN = UP._replace(higher_is_better=False)
UNKNOWN = float("nan")


def row(mean, low, high, **more):
    unknown = {"corrected": float("nan"), "corrected_high": float("nan")}
    return {"mean": mean, "ci_low": low, "ci_high": high, "kept_share": 0.8} | unknown | more


def texts(sentences):
    return [finding.text for finding in sentences]


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


def test_detectors_differ_where_the_interval_of_their_difference_excludes_0():
    assert texts(compare(UP, MEANS, pair(0.4, 0.3), {})) == [
        "a is better than b in x (higher is better): 0.600 against 0.200, a difference of +0.400 [+0.100, +0.700]."
    ]
    assert texts(compare(DOWN, MEANS, pair(0.4, 0.3), {})) == [
        "b is better than a in x (lower is better): 0.200 against 0.600, a difference of -0.400 [-0.700, -0.100]."
    ]
    assert texts(compare(UP, MEANS, pair(0.4, 0.4, above=(0.3, 0.4)), {})) == [
        "Not significantly different in x: a and b."
    ]
    assert texts(compare(UP, MEANS, pair(0.4, UNKNOWN), {})) == [
        "Too few images or training runs with a value to compare in x: a and b."
    ]
    assert texts(compare(UP, MEANS, pair(UNKNOWN, UNKNOWN), {})) == []


def test_a_difference_over_single_runs_is_of_these_trainings_only():
    sentences = texts(compare(UP, MEANS, pair(0.4, 0.1, runs=1), {}))[0]
    assert sentences.endswith(
        "This difference does not generalise to other training runs, because a and b have one run."
    )
    stability = UP._replace(measure="stability")
    sentences = texts(compare(stability, MEANS, pair(0.4, 0.1, runs=2, measure="stability"), {}))[0]
    assert sentences.endswith(
        "This difference does not generalise to other training runs, because a and b have one pair of runs."
    )
    assert "generalise" not in texts(compare(UP, MEANS, pair(0.4, 0.1, runs=2), {}))[0]
    assert "generalise" not in texts(compare(stability, MEANS, pair(0.4, 0.1, runs=3, measure="stability"), {}))[0]
    (names, one), *_ = pair(0.4, 0.1).items()
    assert (
        "other training runs, because b has one run."
        in texts(compare(UP, MEANS, {names: one | {"num_other_runs": 1}}, {}))[0]
    )


def test_a_difference_that_chance_explains_is_called_so():
    sentences = texts(compare(UP, MEANS, pair(0.4, 0.1, above=(0.2, 0.3)), {}))[0]
    assert sentences.endswith("Above chance, not significantly different (+0.200 [-0.100, +0.500]).")
    sentences = texts(compare(UP, MEANS, pair(0.4, 0.1, above=(-0.2, 0.1)), {}))[0]
    assert sentences.endswith("Above chance, the difference is reversed (-0.200 [-0.300, -0.100]).")
    assert "chance" not in texts(compare(UP, MEANS, pair(0.4, 0.1, above=(UNKNOWN, UNKNOWN)), {}))[0]
    assert "chance" not in texts(compare(DOWN, MEANS, pair(0.4, 0.1, above=(0.2, 0.3)), {}))[0]
    hidden = compare(UP, MEANS, pair(0.1, 0.4, above=(-0.2, 0.1)), {})
    assert texts(hidden) == [
        "In x, b and a are not significantly different, but above chance b is better (+0.200 [+0.100, +0.300]).",
        "Not significantly different in x: a and b.",
    ]
    assert len(texts(compare(DOWN, MEANS, pair(0.1, 0.4, above=(-0.2, 0.1)), {}))) == 1


def test_a_difference_between_means_over_different_images_comes_with_a_warning():
    dead = {"a": row(0.6, 0.5, 0.7, dead_share=0.7), "b": row(0.2, 0.1, 0.3, dead_share=0.02)}
    expected = "Caution: 70.0 % and 2.0 % of their pairs of maps hold a dead one and are in no mean, so the two values are over different images."
    assert texts(compare(UP, dead, pair(0.4, 0.1), {}))[0].endswith(expected)
    assert "Caution" not in texts(compare(UP, dead | {"a": row(0.6, 0.5, 0.7, dead_share=0.04)}, pair(0.4, 0.1), {}))[0]


def test_a_difference_of_decisions_is_called_one():
    def sentences(fixed):
        return texts(compare(UP, MEANS, pair(0.4, 0.3), fixed))[0]

    expected = (
        "With the class held fixed, not significantly different (+0.100 [-0.100, +0.300]): a difference in decisions."
    )
    assert sentences(pair(0.1, 0.2)).endswith(expected)
    assert sentences(pair(-0.3, 0.2)).endswith(
        "With the class held fixed, the difference is reversed (-0.300 [-0.500, -0.100])."
    )
    assert "fixed" not in sentences(pair(0.2, 0.1))
    assert "fixed" not in sentences(pair(0.2, UNKNOWN))


def test_a_difference_that_is_gone_only_above_chance_and_held_fixed_is_reported():
    def sentences(fixed, score=UP, of=None):
        return texts(compare(score, MEANS, of or pair(0.4, 0.1, above=(0.3, 0.1)), fixed))[0]

    both = "Above chance and with the class held fixed together, "
    assert sentences(pair(0.2, 0.1, above=(0.1, 0.2))).endswith(
        f"{both}not significantly different (+0.100 [-0.100, +0.300])."
    )
    assert sentences(pair(0.2, 0.1, above=(-0.2, 0.1))).endswith(
        f"{both}the difference is reversed (-0.200 [-0.300, -0.100])."
    )
    assert "together" not in sentences(pair(0.2, 0.1, above=(0.2, 0.1)))
    assert "together" not in sentences(pair(0.2, 0.1, above=(UNKNOWN, UNKNOWN)))
    assert "together" not in sentences(pair(0.2, 0.1, above=(0.1, 0.2)), DOWN)
    assert "together" not in sentences(pair(0.1, 0.2, above=(0.1, 0.2)))  # reported already
    assert "together" not in sentences(pair(0.2, 0.1, above=(0.1, 0.2)), of=pair(0.4, 0.1, above=(0.1, 0.2)))
    stability = UP._replace(measure="stability")
    of_runs = pair(0.4, 0.1, above=(0.3, 0.1), measure="stability")
    assert "with the true class explained together" in sentences(pair(0.2, 0.1, above=(0.1, 0.2)), stability, of_runs)


def test_no_better_than_chance_is_stuck_or_unlike_anything():
    stuck = {"a": row(0.9, 0.8, 1.0, chance=0.9, corrected_low=-0.1)}
    unlike = {"a": row(0.03, 0.0, 0.1, chance=0.02, corrected_low=-0.1, corrected=0.01, corrected_high=0.12)}
    better = {"a": row(0.9, 0.8, 1.0, chance=0.9, corrected_low=0.01)}
    sentences = texts(against_chance(UP, unlike))[0]
    assert (
        "0.030, where maps of other images of the same class reach 0.020 (above chance 0.010 [-0.100, 0.120]). Its"
        in sentences
    )
    assert "It looks at the same place in every image." in texts(against_chance(UP, stuck))[0]
    assert "do not agree significantly more than maps of unrelated images" in texts(against_chance(UP, unlike))[0]
    assert texts(against_chance(UP, better)) == []
    assert texts(against_chance(DOWN, stuck)) == []
    one_map = {"a": row(1.0, 1.0, 1.0, chance=1.0, corrected_low=float("nan"))}
    assert "above" not in texts(against_chance(UP, one_map))[0]
    assert "It looks at the same place in every image." in texts(against_chance(UP, one_map))[0]


def test_variants_that_disagree_are_reported():
    predicted, fixed = (
        {"a": row(0.494, 0.373, 0.639)},
        {"a": row(0.699, 0.579, 0.873)},
    )  # means outside, intervals overlap
    focus = UP._replace(name="y")
    near = (UP._replace(name="z"), predicted, {"a": row(0.6, 0.5, 0.7)})
    (finding,) = against_fixed([(UP, predicted, fixed), near, (focus, predicted, {"a": row(0.7, 0.6, 0.9)})])
    assert (finding.kind, finding.detectors) == ("decision", ("a",))
    assert finding.text.endswith(
        "not only because it looks elsewhere. Predicted class against the class predicted for the clean image: x 0.494 against 0.699 (20.0 % of the "
        "decisions changed); y 0.494 against 0.700 (20.0 % of the decisions changed)."
    )
    assert list(against_fixed([near])) == []
    some = {"a": row(0.699, 0.579, 0.873, dead_share=0.39)}
    beside = "0.699 (20.0 % of the decisions changed; the two values are over different images, because 39.0 % of the maps of one are dead)."
    assert texts(against_fixed([(UP, predicted, some)]))[0].endswith(beside)
    few = {"a": row(0.699, 0.579, 0.873, dead_share=0.04)}
    assert "dead" not in texts(against_fixed([(UP, predicted, few)]))[0]
    stability = texts(against_fixed([(UP._replace(measure="stability"), predicted, fixed)]))
    assert stability[0].endswith("0.699 for the true class. 20.0 % of the pairs of runs disagree.")
    assert "decisions" not in stability[0]
