"""Chance: the similarity to the map of another image."""

import numpy as np
import pytest
import torch
from image_rows import GROUPS, image_rows

from explain2me.stages.measure import MapReader
from explain2me.statistics.chance import partners


def test_chance_exposes_a_detector_with_one_map_for_each_class(finished_run):
    """It predicts at random and never looks at the image: chance must be 1, whatever the labels."""
    count = len(finished_run.image_table)
    predicted = np.random.default_rng(0).integers(0, 2, count)
    blobs = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(0))
    partner = partners(finished_run.image_table, predicted, seed=1)
    known = partner >= 0
    assert known.sum() > count / 2
    assert torch.equal(blobs[predicted[known]], blobs[predicted[partner[known]]])


def test_chance_reads_the_predictions_of_the_model_whose_map_is_exchanged(finished_run):
    reader = MapReader(finished_run)
    for model in finished_run.models:
        maps = finished_run.maps().to_pandas()
        clean = maps[(maps.run == model.run) & (maps.condition == "clean")].sort_values("image")
        found = reader.partners(model)
        want = partners(finished_run.image_table, clean.predicted.to_numpy(), seed=finished_run.config.seed)
        assert np.array_equal(found, want)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_partners_are_other_images_of_the_same_source_label_and_prediction(seed: int) -> None:
    images = image_rows(GROUPS)
    predicted = np.random.default_rng(seed).integers(0, 2, len(images))
    predicted[7] = -1  # quarantined
    found = partners(images, predicted, seed=seed)
    rows = [
        (*row.values(), wanted)
        for row, wanted in zip(images.select(["label", "source"]).to_pylist(), predicted, strict=True)
    ]
    for i, partner in enumerate(found):
        if rows.count(rows[i]) == 1 or predicted[i] == -1:
            assert partner == -1
        else:
            assert partner != i
            assert rows[i] == rows[partner]
    group = np.flatnonzero(predicted[:30] == 1)
    assert sorted(found[group]) == group.tolist()  # a permutation
