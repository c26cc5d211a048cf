"""Human maps of a training: files beside the images or one average, and clear errors."""

import numpy as np
import pytest
import torch
from small_trainings import SIZE, all_splits, make_config, one

from explain2me.detectors.cards import human_maps_in_words
from explain2me.errors import Explain2MeError
from explain2me.train.data import Examples
from explain2me.train.human_maps import read_human_maps
from explain2me.train.loop import train_detector


@pytest.mark.parametrize("salience", ["manifest", "mean-of"])
def test_human_maps_come_from_files_or_are_one_average(tmp_path, manifest, salience):
    folder = tmp_path / "maps"
    folder.mkdir()
    for i in range(3):
        values = np.zeros((10, 10), np.float32)
        values[i, i] = i + 1
        np.save(folder / f"{i}.npy", values)
    wanted = "manifest" if salience == "manifest" else f"mean-of:{folder}"
    config = make_config(manifest, strategies=[{"name": "guided", "loss": "cyborg", "salience": wanted}])
    splits = all_splits(config)
    maps = read_human_maps(config.training.strategies[0], splits.training, (SIZE, SIZE))
    assert maps is not None
    examples = Examples(splits.training, (SIZE, SIZE), "bilinear", human_maps=maps)
    if salience == "manifest":
        assert examples[0, 0].human_map.isnan().all()  # every fifth has none
        bright = examples[0, 1].image.float().mean(0) == 255
        assert torch.equal(examples[0, 1].human_map == 255, bright)
        assert maps.record["kind"] == "a map for each image"
    else:
        assert torch.equal(examples[0, 0].human_map, examples[0, 7].human_map)
        assert maps.record["kind"].startswith("the mean of 3 maps, the same for every image")


def test_manifest_without_human_maps(tmp_path, manifest):
    bare = manifest.parent / "bare.csv"
    bare.write_text("\n".join(line.rpartition(",")[0] for line in manifest.read_text().splitlines()) + "\n")
    with pytest.raises(Explain2MeError, match="needs human maps, and no image to train on has one"):
        train_detector(one(make_config(bare), tmp_path, 1))


def test_wrong_human_map_is_named_before_training(tmp_path, manifest):
    (manifest.parent / "black.png").write_bytes(b"")
    text = manifest.read_text().replace("map03.png", "black.png").replace("map07.png", "nowhere.png")
    other = manifest.parent / "other.csv"
    other.write_text(text)
    message = (
        r"^2 of the 19 human maps to train on cannot be used, first that of the image '.*/03\.png': salience map "
        r".*black\.png.*empty"
    )
    with pytest.raises(Explain2MeError, match=message) as found:
        train_detector(one(make_config(other), tmp_path, 1))
    hint = "; paths of the column 'salience' are relative to the folder of the manifest"
    assert hint not in str(found.value)
    other.write_text(manifest.read_text().replace("map07.png", "nowhere.png"))
    with pytest.raises(Explain2MeError, match=rf"^1 of the 19 human maps .*nowhere\.png.*{hint}$"):
        train_detector(one(make_config(other), tmp_path, 1))


def test_human_maps_of_a_few_images_are_counted():
    record = {"kind": "a map for each image", "maps": 3, "images": 120, "sha256": "x"}
    assert human_maps_in_words(record) == "a map of its own for 3 of 120 images, the others are trained without one"
    assert human_maps_in_words(record | {"maps": 120}) == "a map of its own for 120 of 120 images"
    assert human_maps_in_words(None) == "none"
