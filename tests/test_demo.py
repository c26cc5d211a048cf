"""The demo's images, annotator and training loop; the whole demo is a slow test."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from explain2me import demo
from explain2me.config import load_config
from explain2me.detectors import load_detector
from explain2me.errors import Explain2MeError
from explain2me.salience import GradCAM

SIZE = 64


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.make_images(tmp_path_factory.mktemp("demo"), seed=7)


def rows_of(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


def pixels_of(manifest: Path, **wanted: str) -> list[bytes]:
    rows = [row for row in rows_of(manifest) if wanted.items() <= row.items()]
    return [np.asarray(Image.open(manifest.parent / row["path"])).tobytes() for row in rows]


# ------------------------------------------------------------------------------------------------------------ images


def test_photographs_come_from_the_installed_package():
    faces = demo.face_photographs()
    assert faces.shape == (100, 25, 25)
    assert faces.min() >= 0
    assert faces.max() <= 1


def test_images_depend_on_the_seed_alone(made, tmp_path):
    again = demo.make_images(tmp_path / "again", seed=7)
    other = demo.make_images(tmp_path / "other", seed=8)
    assert again.read_bytes() == made.read_bytes()
    assert pixels_of(again) == pixels_of(made)
    assert pixels_of(other) != pixels_of(made)


def test_splits_share_no_image_and_balance_the_training(made):
    rows = rows_of(made)
    assert len({row["path"] for row in rows}) == len(rows)
    training = [row["label"] for row in rows if row["split"] == "train"]
    assert training.count("real") == training.count("fake") == 60
    assert {row["source"] for row in rows if row["split"] == "test"} == {"lfw_subset", "ppca50", "ppca58"}
    assert not set(pixels_of(made, split="train")) & set(pixels_of(made, split="test"))


def test_fakes_know_nothing_of_the_test_photographs(made, tmp_path, monkeypatch):
    held_out = np.random.default_rng(7).permutation(100)[60:]
    changed = demo.face_photographs()
    changed[held_out] = 1 - changed[held_out]
    monkeypatch.setattr(demo, "face_photographs", lambda: changed)
    other = demo.make_images(tmp_path, seed=7)
    assert pixels_of(other, label="fake") == pixels_of(made, label="fake")
    assert pixels_of(other, label="real", split="train") == pixels_of(made, label="real", split="train")
    assert pixels_of(other, label="real", split="test") != pixels_of(made, label="real", split="test")


def test_ppca_keeps_the_large_variances_and_the_total():
    data = np.random.default_rng(0).normal(size=(40, 7)) * [5, 3, 2, 1, 1, 0.5, 0.2]
    model = demo.fit_ppca(data, 2)
    sample = np.cov(data.T, bias=True)
    fitted = model.factors @ model.factors.T + model.sigma**2 * np.eye(7)
    np.testing.assert_allclose(np.linalg.eigvalsh(fitted)[-2:], np.linalg.eigvalsh(sample)[-2:])
    np.testing.assert_allclose(np.trace(fitted), np.trace(sample))
    drawn = demo.draw_faces(model, 200_000, rng=np.random.default_rng(1))
    np.testing.assert_allclose(np.cov(drawn.T, bias=True), fitted, atol=0.15)
    np.testing.assert_allclose(drawn.mean(0), data.mean(0), atol=0.05)


def test_read_split_gives_labels_as_positions(made):
    images, labels = demo.read_split(made, "test", input_size=(SIZE, SIZE), classes=("real", "fake"))
    assert images.shape == (120, 3, SIZE, SIZE)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [40, 80]
    with pytest.raises(Explain2MeError, match="expected labels among the classes"):
        demo.read_split(made, "test", input_size=(SIZE, SIZE), classes=("real", "synthetic"))


def test_read_split_needs_labels(made, tmp_path):
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(f"path\n{made.parent / 'real/lfw_subset/000.png'}\n")
    with pytest.raises(Explain2MeError, match="needs labels"):
        demo.read_split(manifest, None, input_size=(SIZE, SIZE), classes=("real", "fake"))


# ---------------------------------------------------------------------------------------------- simulated annotation


def test_annotations_lie_on_the_face():
    maps = demo.simulated_annotations(200, seed=7)
    assert maps.shape == (200, 25, 25)
    assert maps.min() >= 0
    assert maps.max() <= 1
    assert maps.flatten(1).amax(1).min() > 0.8  # a blob's centre is never outside the image
    border = maps.clone()
    border[:, 3:-3, 3:-3] = 0
    assert border.sum() < 0.05 * maps.sum()


def test_annotations_differ_between_images_and_repeat_with_the_seed():
    maps = demo.simulated_annotations(5, seed=7)
    assert len({tuple(one.flatten().tolist()) for one in maps}) == 5
    assert torch.equal(maps, demo.simulated_annotations(5, seed=7))
    assert not torch.equal(maps, demo.simulated_annotations(5, seed=8))


# ---------------------------------------------------------------------------------------------------------- training


def test_cyborg_loss_by_hand():
    logits, labels = torch.zeros(1, 2), torch.tensor([1])
    cams = torch.tensor([[[-1.0, 1.0], [3.0, 1.0]]])  # scaled: 0, 1/2, 1, 1/2
    human_maps = torch.tensor([[[0.0, 4.0], [0.0, 0.0]]])  # scaled: 0, 1, 0, 0
    want = 0.25 * np.log(2) + 0.75 * (0 + 0.25 + 1 + 0.25) / 4
    assert demo.cyborg_loss(logits, labels, cams, human_maps, alpha=0.25).item() == pytest.approx(want)


def test_cyborg_loss_resizes_the_human_map():
    cams = torch.rand(1, 2, 2, generator=torch.Generator().manual_seed(0))
    logits, labels = torch.zeros(1, 2), torch.tensor([0])
    large = cams.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert demo.cyborg_loss(logits, labels, cams, large, alpha=0).item() == pytest.approx(0, abs=0.02)
    assert demo.cyborg_loss(logits, labels, cams, large.flip(1), alpha=0).item() > 0.1


@pytest.mark.parametrize(
    ("nothing", "where"),
    [(0.0, ...), (1.0, ...), (float("nan"), ...), (float("inf"), ...), (float("nan"), (3, 4)), (float("inf"), (3, 4))],
    ids=str,
)
def test_image_without_human_map_gives_cross_entropy_alone(nothing, where):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(3, 2, generator=generator), torch.tensor([0, 1, 1])
    cams = torch.randn(3, 5, 5, generator=generator).requires_grad_()
    human_maps = torch.rand(3, 25, 25, generator=generator)
    human_maps[1][where] = nothing
    loss = demo.cyborg_loss(logits, labels, cams, human_maps)
    others = demo.cyborg_loss(logits[[0, 2]], labels[[0, 2]], cams[[0, 2]], human_maps[[0, 2]])
    want = (2 * others + F.cross_entropy(logits[[1]], labels[[1]])) / 3
    torch.testing.assert_close(loss, want)
    (gradient,) = torch.autograd.grad(loss, cams)
    assert not gradient[1].any()
    assert gradient[0].any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("level", [0.0, -3.0, 1e8])
def test_flat_cam_gives_a_finite_loss_and_no_gradient(level):
    cams = torch.full((2, 5, 5), level, requires_grad=True)
    human_maps = demo.simulated_annotations(2, seed=7)
    loss = demo.cyborg_loss(torch.zeros(2, 2), torch.tensor([0, 1]), cams, human_maps)
    (gradient,) = torch.autograd.grad(loss, cams)
    assert loss.isfinite()
    assert not gradient.any()


def test_alpha_1_is_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits, cams = torch.randn(4, 2, generator=generator), torch.randn(4, 5, 5, generator=generator)
    labels = torch.tensor([0, 1, 0, 1])
    loss = demo.cyborg_loss(logits, labels, cams, demo.simulated_annotations(4, seed=7), alpha=1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("architecture", [demo.ARCHITECTURE, "timm:test_resnet", "torchvision:resnet18"])
def test_class_activation_maps_are_grad_cam_before_relu(architecture):
    model = load_detector(architecture, num_classes=2, seed=1).model
    inputs = torch.randn(3, 3, SIZE, 96, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 1, 1])
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    logits, cams = demo.class_activation_maps(model, inputs, classes)
    assert hooks == sum(len(module._forward_pre_hooks) for module in model.modules())
    with GradCAM(model) as cam:
        want = cam(inputs, classes)
    torch.testing.assert_close(logits, want.logits)
    torch.testing.assert_close(cams.relu() / cams[0].numel(), want.maps)
    assert cams.requires_grad


def test_class_activation_maps_need_pooling_and_a_linear_head():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten())
    with pytest.raises(ValueError, match="ends in a pooling module and a linear head, got Sequential"):
        demo.class_activation_maps(model, torch.zeros(1, 3, 8, 8), torch.tensor([0]))


def test_augmentation_moves_the_human_map_with_the_image():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 20, 30), generator=generator, dtype=torch.uint8)
    moved, maps = demo.augment(images, images[:, 0].float(), max_shift=0.2, generator=generator)
    torch.testing.assert_close(maps, moved[:, 0].float())
    assert not torch.equal(moved, images)


def test_augmentation_mirrors_and_shifts_by_whole_pixels():
    image = torch.arange(5, dtype=torch.uint8).expand(1, 3, 5, 5)
    seen = set()
    for seed in range(60):
        moved, _ = demo.augment(image, None, max_shift=0.2, generator=torch.Generator().manual_seed(seed))
        seen.add(tuple(moved[0, 0, 0].tolist()))
    right, still, left = (0, 0, 1, 2, 3), (0, 1, 2, 3, 4), (1, 2, 3, 4, 4)
    assert seen == {right, still, left, right[::-1], still[::-1], left[::-1]}


@pytest.fixture(scope="module")
def tiny(made) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = demo.read_split(made, "train", input_size=(SIZE, SIZE), classes=("real", "fake"))
    return images[::10], labels[::10]


def train_tiny(folder: Path, tiny: tuple[torch.Tensor, torch.Tensor], name: str, **options: object) -> bytes:
    settings = {"architecture": demo.ARCHITECTURE, "seed": 3, "epochs": 1, "batch_size": 4} | options
    return demo.train_run(folder / f"{name}.safetensors", *tiny, **settings).read_bytes()


def test_training_gives_a_checkpoint_that_loads(tmp_path, tiny):
    epochs = []
    train_tiny(tmp_path, tiny, "run", epochs=2, on_epoch=lambda done, total: epochs.append((done, total)))
    detector = load_detector(demo.ARCHITECTURE, tmp_path / "run.safetensors", num_classes=2, input_size=SIZE)
    assert detector.model(detector.preprocess(tiny[0])).shape == (12, 2)
    assert epochs == [(1, 2), (2, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]


def test_training_repeats_and_leaves_the_random_state_alone(tmp_path, tiny):
    torch.manual_seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = train_tiny(tmp_path, tiny, "first")
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    torch.manual_seed(6)
    assert train_tiny(tmp_path, tiny, "again") == first
    assert train_tiny(tmp_path, tiny, "other seed", seed=4) != first
    human_maps = demo.simulated_annotations(len(tiny[0]), seed=7)
    assert train_tiny(tmp_path, tiny, "guided", human_maps=human_maps) != first


def test_training_learns(tmp_path, tiny):
    images, labels = tiny
    marked = images.clone()
    marked[labels == 1, :, 20:44, 20:44] = 255
    human_maps = torch.zeros(len(images), SIZE, SIZE)
    human_maps[:, 20:44, 20:44] = 1
    path = tmp_path / "run.safetensors"
    train_tiny(tmp_path, (marked, labels), "run", human_maps=human_maps, epochs=15)
    detector = load_detector(demo.ARCHITECTURE, path, num_classes=2, input_size=SIZE)
    predicted = detector.model(detector.preprocess(marked)).argmax(1)
    assert (predicted == labels).float().mean() > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 13}, "expected a batch_size of 1 to 12, the number of images, got 13"),
        ({"batch_size": 0}, "expected a batch_size of 1 to 12"),
        ({"human_maps": torch.ones(3, 5, 5)}, "expected one of human_maps for each of 12 images, got 3"),
    ],
)
def test_wrong_input_of_training(tmp_path, tiny, change, message):
    with pytest.raises(ValueError, match=message):
        train_tiny(tmp_path, tiny, "run", **change)
    with pytest.raises(ValueError, match="expected one of labels for each of 12 images, got 11"):
        train_tiny(tmp_path, (tiny[0], tiny[1][1:]), "run")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------- the whole


def trained_before(out: Path) -> list[Path]:
    """Put files where the checkpoints will be, so that there is nothing to train."""
    paths = [out / "weights" / name / f"run{run}.safetensors" for name in demo.STRATEGIES for run in range(3)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return paths


def test_prepare_writes_a_config_that_loads_and_keeps_what_is_there(tmp_path):
    paths = trained_before(tmp_path)
    told = []
    config = load_config(demo.prepare(tmp_path, seed=9, progress=lambda *step: told.append(step)))
    assert config.seed == 9
    assert [detector.name for detector in config.detectors] == list(demo.STRATEGIES)
    assert Path(config.data.manifest).exists()
    assert told[0] == ("make images", 1, 3)
    assert told[-1] == ("train detectors", 6, 6)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    demo.prepare(tmp_path, seed=9)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert all(path.stat().st_size == 0 for path in paths)


def test_prepare_refuses_the_folder_of_another_seed(tmp_path):
    trained_before(tmp_path)
    demo.prepare(tmp_path, seed=1)
    with pytest.raises(Explain2MeError, match=r"demo\.toml' belongs to another demo .* --out"):
        demo.prepare(tmp_path, seed=2)


def test_it_is_said_what_is_made():
    for word in ("Tipping & Bishop 1999", "SIMULATED", "lfw_subset"):
        assert word in demo.ABOUT


@pytest.mark.slow
def test_the_demos_detectors_are_better_than_chance(tmp_path):
    from sklearn.metrics import roc_auc_score

    config = load_config(demo.prepare(tmp_path))
    images, labels = demo.read_split(
        Path(config.data.manifest), "test", input_size=(demo.INPUT_SIZE, demo.INPUT_SIZE), classes=("real", "fake")
    )
    for name in demo.STRATEGIES:
        for path in sorted((tmp_path / "weights" / name).iterdir()):
            detector = load_detector(demo.ARCHITECTURE, path, num_classes=2, input_size=demo.INPUT_SIZE)
            with torch.no_grad():
                logits = detector.model(detector.preprocess(images))
            assert roc_auc_score(labels, logits[:, 1] - logits[:, 0]) > 0.75
