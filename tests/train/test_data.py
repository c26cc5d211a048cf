"""Images, labels and their order: what a config trains on, the human map beside its image, and clear errors."""

import itertools
import os
import re
import shutil

import numpy as np
import pytest
import torch
from small_trainings import SIZE, all_splits, make_config, one, opened_files

from explain2me.config.training import AugmentationConfig
from explain2me.errors import Explain2MeError
from explain2me.images.augment import Move, draw_move, move_image, move_map
from explain2me.train.data import EpochSampler, Examples, class_weights
from explain2me.train.human_maps import read_human_maps
from explain2me.train.loop import train_detector
from explain2me.train.study import plan_study, train_missing

LINES = "path,label,source,split,salience\n"
PLAIN = [{"name": "plain"}]


def test_labels_that_are_misspelt_among_those_to_train_on(tmp_path, manifest):
    lines = manifest.read_text().splitlines()
    fakes = [i for i, line in enumerate(lines) if ",fake,camera,train" in line]
    for count, message in (
        (1, r"got 1 of 'fakee' \(the label of '01\.png'; is 'fake' meant\?\)"),
        (2, r"got none of 'fakee' \(the label of '01\.png'; is 'fake' meant\?\)"),
        (
            len(fakes),
            r"one of the labels 'fakee', 'real' of '.*spelt\.csv', split 'train', got 'fake'; did you mean 'fakee'",
        ),
    ):
        changed = [line.replace(",fake,", ",fakee,") if i in fakes[:count] else line for i, line in enumerate(lines)]
        (manifest.parent / "spelt.csv").write_text("\n".join(changed))
        config = make_config(manifest.parent / "spelt.csv", monitor="auroc")
        with pytest.raises(Explain2MeError, match=message):
            all_splits(config)
    absent = config.model_copy(
        update={"data": make_config(manifest).data.model_copy(update={"classes": ("real", "fake", "fakes")})}
    )
    with pytest.raises(Explain2MeError, match="to train on, got none of 'fakes'; add some"):  # in no row at all
        all_splits(absent)
    kept = [line for i, line in enumerate(lines) if i not in fakes]
    (manifest.parent / "spelt.csv").write_text("\n".join(kept))
    with pytest.raises(
        Explain2MeError, match=r"split 'train': .* got only 'real'; add images of another label to train on"
    ):
        all_splits(config)


def test_a_share_can_be_held_out_for_validation(manifest):
    config = make_config(manifest, validation_split=None, validation_share=0.25)
    splits = all_splits(config)
    assert splits.validation is not None
    assert (len(splits.training.files), len(splits.validation.files)) == (18, 6)
    assert not set(splits.training.files) & set(splits.validation.files)
    assert splits.validation.labels.bincount().tolist() == [3, 3]


def test_each_example_has_the_human_map_of_what_it_shows(manifest):
    config = make_config(manifest, augmentation={"flip": True, "crop": 0.5, "shift": 0.1})
    splits = all_splits(config)
    maps = read_human_maps(config.training.strategies[1], splits.training, (SIZE, SIZE))
    examples = Examples(
        splits.training, (SIZE, SIZE), "bilinear", human_maps=maps, augmentation=config.training.augmentation, seed=1
    )
    seen = set()
    for epoch, position in itertools.product(range(4), range(len(examples))):
        image, label, human_map = examples[epoch, position]
        if splits.classes[label] == "fake" and not human_map.isnan().any():  # a white square, which its map marks
            assert image[:, human_map > 250].min() > 200
            assert image.amin(0)[human_map < 5].max() < 200
            seen.add(human_map.numpy().tobytes())
    assert len(seen) > 30


def test_the_human_map_follows_the_image():
    config = AugmentationConfig(flip=True, crop=0.4, shift=0.1)
    image = torch.zeros(3, 96, 96, dtype=torch.uint8)
    image[:, 20:50, 60:80] = 200
    changed = 0
    for seed in range(20):
        move = draw_move(config, np.random.default_rng(seed))
        moved, human = move_image(image, move), move_map(image[0].float(), move)
        assert (moved[0].float() - human).abs().max() <= 1
        changed += not torch.equal(moved, image)
    assert changed == 20


def test_augmentation_by_hand():
    image = torch.arange(16).reshape(1, 4, 4).repeat(3, 1, 1).to(torch.uint8)
    still = Move(False, 0, 0, 1, 1, 0, 0)
    assert torch.equal(move_image(image, still), image)
    assert move_image(image, still._replace(flip=True))[0, 0].tolist() == [3, 2, 1, 0]
    assert move_image(image, still._replace(right=0.25))[0, 0].tolist() == [0, 0, 1, 2]
    assert move_image(image, still._replace(down=-0.25))[0, :, 0].tolist() == [4, 8, 12, 12]
    assert draw_move(AugmentationConfig(), np.random.default_rng(0)) == still


def test_a_crop_without_the_salience_guides_nothing():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    human_map = torch.exp(-((y - 8) ** 2 + (x - 8) ** 2) / 2 / 4**2)
    seen, tail = (Move(False, place, place, 0.5, 0.5, 0, 0) for place in (0.0, 0.5))
    assert move_map(human_map, seen).max() > 0.9
    assert not move_map(human_map, tail).any()
    assert human_map[32:, 32:].any()  # the tail of the Gaussian, which scaling would make a map of its own
    assert move_map(torch.full((64, 64), torch.nan), tail).isnan().all()  # an image without one


@pytest.mark.parametrize("crop", [0.5, 0.9, 0.99])
def test_crops_keep_the_share_that_was_asked_for(crop):
    for seed in range(200):
        move = draw_move(AugmentationConfig(crop=crop), np.random.default_rng(seed))
        assert crop - 1e-9 <= move.height * move.width <= 1
        assert 3 / 4 - 1e-9 <= move.width / move.height <= 4 / 3 + 1e-9
        assert move.top + move.height <= 1 + 1e-9
        assert move.left + move.width <= 1 + 1e-9


def test_order_depends_on_seed_and_epoch_and_ranks_share_it():
    sampler = EpochSampler(10, seed=1)
    first = list(sampler)
    assert first == list(EpochSampler(10, seed=1))
    sampler.set_epoch(1)
    assert [i for _, i in sampler] != [i for _, i in first]
    assert sorted(i for _, i in sampler) == list(range(10))
    ranks = [[i for _, i in EpochSampler(11, seed=1, rank=rank, world=2)] for rank in (0, 1)]
    assert [len(rank) for rank in ranks] == [5, 5]
    assert not set(ranks[0]) & set(ranks[1])
    held = [[i for _, i in EpochSampler(11, 0, shuffle=False, rank=rank, world=2)] for rank in (0, 1)]
    assert sorted(held[0] + held[1]) == list(range(11))


def test_class_balance_draws_classes_alike():
    labels = torch.tensor([0] * 90 + [1] * 10)
    drawn = [int(labels[i]) for epoch in range(20) for _, i in EpochSampler(100, 1, class_of=labels, epoch=epoch)]
    assert 0.45 < np.mean(drawn) < 0.55
    weights = class_weights(labels, 3)
    assert (weights[:2] * torch.tensor([90, 10])).tolist() == pytest.approx([50, 50])
    assert weights[2] == 0


def test_a_class_of_one_or_no_image_is_refused(tmp_path, manifest):
    lines = manifest.read_text().splitlines()
    train = [line for line in lines[1:] if ",train," in line]
    tests = [line for line in lines[1:] if ",test," in line]
    config = make_config(manifest, split="train", validation_split=None, validation_share=0.25)

    def splits_of(more: list[str], **data: object):
        odd = tmp_path / "odd.csv"
        odd.write_text("\n".join([lines[0], *(f"{manifest.parent}/{line}" for line in [*more, *tests])]) + "\n")
        changed = config.data.model_copy(update={"manifest": str(odd)} | data)
        return all_splits(config.model_copy(update={"data": changed}))

    with pytest.raises(
        Explain2MeError, match="expected at least 2 images of every class to train on, got 1 of 'other'"
    ):
        splits_of([*train, "24.png,other,camera,train,"])
    both = splits_of([*train, "24.png,other,camera,train,", "25.png,other,camera,train,"])
    assert both.training.labels.bincount().tolist() == [9, 1, 9]  # one of two is held out
    with pytest.raises(Explain2MeError, match="got none of 'fake'"):
        splits_of([line for line in train if ",real," in line], classes=("real", "fake"))


def test_what_cannot_be_held_out_or_validated_with(tmp_path, manifest):
    lines = [f"{manifest.parent}/{line}" for line in manifest.read_text().splitlines()[1:]]
    odd = tmp_path / "odd.csv"

    def splits_of(lines: list[str], **training: object):
        odd.write_text(LINES + "\n".join(lines) + "\n")
        config = make_config(manifest, **training)
        changed = config.training.model_copy(update={"manifest": str(odd)})
        return all_splits(config.model_copy(update={"training": changed}))

    alone = [line.replace("camera", f"camera{i}") for i, line in enumerate(lines)]
    with pytest.raises(Explain2MeError, match="nothing can be held out"):
        splits_of(alone, validation_split=None, validation_share=0.25)
    unlabelled = [re.sub(",(real|fake),camera,val", ",,camera,val", line) for line in lines]
    with pytest.raises(Explain2MeError, match=r"odd\.csv': validating needs labels, and its rows have none"):
        splits_of(unlabelled)
    with pytest.raises(
        Explain2MeError, match=r"odd\.csv', split 'train': expected images of at least two labels, got only 'fake'"
    ):
        splits_of([line for line in lines if ",fake," in line])


def test_an_image_that_cannot_be_read_is_named_with_its_use(tmp_path, manifest):
    (manifest.parent / "empty.png").write_bytes(b"")
    for old, use in (("00.png,", "to train on"), ("25.png,", "to validate with")):
        (manifest.parent / "unreadable.csv").write_text(manifest.read_text().replace(f"\n{old}", "\nempty.png,"))
        config = make_config(manifest.parent / "unreadable.csv")
        with pytest.raises(Explain2MeError, match=rf"1 of \d+ images {use} cannot be used, first 'empty\.png'"):
            all_splits(config)


@pytest.fixture
def images(manifest, tmp_path):
    """A copy of the images that a test may change."""
    shutil.copytree(manifest.parent, tmp_path / "data")
    return tmp_path / "data"


def test_a_study_opens_each_image_and_human_map_once_before_its_trainings(tmp_path, images):
    config = make_config(images / "manifest.csv", epochs=2)
    with opened_files(images) as counts:
        assert train_missing(plan_study(config, tmp_path / "out")) == []
    training = {f"{i:02d}.png" for i in range(24)}
    maps = {f"map{i:02d}.png" for i in range(24) if i % 5}
    assert {counts[name] for name in training} == {1 + 2}  # the index, and each of the two trainings
    assert {counts[name] for name in maps} == {1 + 1}  # the check, and the guided training
    more = make_config(images / "manifest.csv", epochs=2, runs=2)
    with opened_files(images) as counts:
        assert train_missing(plan_study(more, tmp_path / "out")) == []
    assert {counts[name] for name in training} == {2}  # two more trainings, which trust the index
    assert {counts[name] for name in maps} == {1}
    with opened_files(images) as counts:
        assert train_missing(plan_study(more, tmp_path / "out")) == []
    assert not {name for name in counts if name.endswith("png")}


def test_maps_to_average_are_read_once_for_all_trainings(tmp_path, images):
    averaged = {"loss": "cyborg", "salience": f"mean-of:{images / 'maps'}"}
    config = make_config(images / "manifest.csv", epochs=1, runs=2, strategies=[{"name": "averaged"} | averaged])
    with opened_files(images) as counts:
        assert train_missing(plan_study(config, tmp_path / "out")) == []
    assert counts["maps/a.npy"] == 1


def test_the_index_of_a_study_is_that_of_its_images(tmp_path, images):
    config = make_config(images / "manifest.csv")
    before = all_splits(config, tmp_path / "index").training
    with opened_files(images) as counts:
        again = all_splits(config, tmp_path / "index").training
    assert "00.png" not in counts
    assert (again.sha256, again.sizes, again.files) == (before.sha256, before.sizes, before.files)
    assert torch.equal(again.labels, before.labels)
    shutil.copy(images / "02.png", images / "00.png")
    after = all_splits(config, tmp_path / "index").training
    assert after.sha256 == [before.sha256[2], *before.sha256[1:]] == all_splits(config).training.sha256


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("01.png", "00.png", r"the same picture with the labels 'real' and 'fake'; keep the right one"),
        ("00.png", "24.png", r"the same picture, one to train on, one to validate with; remove one"),
        ("00.png", "32.png", r"00\.png' and '.*32\.png', which is tested, are the same picture; remove one"),
        ("24.png", "32.png", r"24\.png' and '.*32\.png', which is tested, are the same picture; remove one"),
    ],
    ids=["labels", "validation", "test", "validation and test"],
)
def test_the_same_picture_under_another_name_is_refused(tmp_path, images, source, target, message):
    shutil.copy(images / source, images / target)
    with pytest.raises(Explain2MeError, match=message):
        train_missing(plan_study(make_config(images / "manifest.csv", epochs=1), tmp_path / "out"))
    assert not list((tmp_path / "out").glob("training/*/run00/training.json"))


@pytest.mark.parametrize("loaders", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_image_that_changed_unseen_is_refused_when_it_is_trained_on(tmp_path, images, loaders):
    config = make_config(images / "manifest.csv", loaders=loaders)
    training = one(config, tmp_path)
    all_splits(config, training.index)
    content, times = bytearray((images / "03.png").read_bytes()), (images / "03.png").stat()
    content[-1] ^= 1
    (images / "03.png").write_bytes(content)
    os.utime(images / "03.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(Explain2MeError, match=r"^an image cannot be read any more: [^\n]*'03\.png'[^\n]*$"):
        train_detector(training)
