"""What a report is made from: means by image, telling images, mean maps, runs of one class."""

import numpy as np
import pandas as pd
import pytest

from explain2me.report.material import runs_of_one_class
from explain2me.report.summary import headline, main_similarity
from explain2me.statistics.performance import Predictions
from explain2me.statistics.scores import MEASURES


def test_scores_by_image_are_means_over_runs_and_transforms(reported, material):
    rows = reported.scores().to_pandas()
    rows = rows[rows.similarity.isna() | (rows.similarity == "ssim")]
    by_image = material.scores.set_index(["detector", "image"])
    for column in material.tables.columns:
        of_it = rows[(rows.measure == column.measure) & (rows.variant == column.variant)]
        if column.condition is not None:
            of_it = of_it[of_it.condition == column.condition]
        expected = of_it.groupby(["detector", "image"], observed=True)["value"].mean()
        np.testing.assert_allclose(
            by_image[column.key], expected.reindex(by_image.index), atol=1e-12, err_msg=column.key
        )
    kept = rows[(rows.variant == "predicted") & (rows.measure != "stability")].dropna(subset="kept")
    expected = kept.kept.astype(float).groupby([kept.detector.astype(str), kept.image]).mean()
    np.testing.assert_allclose(by_image.kept, expected.reindex(by_image.index), atol=1e-12)
    assert 0 < by_image.kept.min() < 1


def test_telling_images_are_the_extremes(reported, material):
    scores = reported.scores().to_pandas()
    rows = scores[(scores.measure == "entropy") & (scores.variant == "spatial")]
    means = rows.groupby(["image", "detector"], observed=True)["value"].mean().groupby("image").mean()
    lowest = {t.image for t in material.telling if t.score == "entropy" and t.why == "lowest"}
    assert lowest == set(means.nsmallest(2).index)


def test_mean_maps_are_means_of_shares(reported, material):
    maps = reported.maps().to_pandas()
    images = reported.image_table.to_pandas()
    of_source = images[(images.source == "gan_a") & (images.label == "fake")].image
    rows = maps[(maps.detector == "second") & (maps.condition == "clean") & maps.image.isin(of_source)]
    stack = np.stack(rows["map"]).astype(np.float64)
    stack = stack[stack.sum(1) > 1e-12]
    expected = (stack / stack.sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(material.clean["second", "fake", "gan_a"].ravel(), expected, atol=1e-9)


def test_which_runs_predict_one_class():
    labels, classes = ["fake", "fake", "real", None], ("real", "fake")
    runs = ("all", "two", "some", "blind", "none", "unlabelled")
    predicted = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [0, -1, 0, -1], [1, 1, -1, 1], [-1, -1, -1, -1], [1, -1, -1, 1]])
    predictions = Predictions(("clean",), np.empty((6, 1, 4, 2)), predicted[:, None])
    assert runs_of_one_class(runs, labels, classes, predictions) == {"all": "fake", "some": "real"}
    nothing = Predictions((), np.empty((6, 0, 4, 2)), predicted[:, :0])
    assert runs_of_one_class(runs, labels, classes, nothing) == {}


@pytest.mark.parametrize(("levels", "expected"), [("0 0.01 0.05 0.1", "0.05"), ("0 0.2 0.02", "0.02"), ("0", "0")])
def test_the_noise_of_the_headline_is_the_papers(levels, expected):
    (score,) = MEASURES["noise"].scores
    names = [f"salt_pepper@{level}" for level in levels.split()]
    assert headline(names, preferred=score.preferred) == f"salt_pepper@{expected}"


def test_the_main_similarity_is_one_everywhere():
    assert main_similarity(pd.Series(["top_k_iou", None, "spearman"])) == "spearman"
    assert main_similarity(pd.Series(["top_k_iou", "ssim"])) == "ssim"
