"""`explain2me study`, from its check to its report."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refused import refused

Call = Callable[..., tuple[int, str, str]]
STUDY = """
name = "study"
[data]
manifest = "images/manifest.csv"
split = "test"
[training]
architectures = ["timm:test_resnet"]
runs = 2
split = "train"
validation_split = "val"
epochs = 2
batch_size = 6
input_size = 64
device = "cpu"
[[training.strategies]]
name = "plain"
[[training.strategies]]
name = "guided"
loss = "cyborg"
salience = "mean-of:maps"
[summary]
bootstrap = 10
[compute]
device = "cpu"
[report]
images = 1
"""
AGAIN = """
name = "again"
[data]
manifest = "images/manifest.csv"
split = "test"
[[detectors]]
name = "d"
architecture = "timm:test_resnet"
checkpoints = "out/training/test_resnet-plain/run*/best.safetensors"
[measures]
noise = false
resilience = false
focus = false
[compute]
device = "cpu"
"""
"""A run of the weights that the study trained, which says nothing of how they were trained."""


def write_study(folder: Path, make_images: Callable[..., Path]) -> None:
    """20 images in three splits, a map to guide by, and the config."""
    manifest = make_images(folder / "images", counts={("real", "camera"): 10, ("fake", "gan"): 10}, size=64)
    head, *rows = manifest.read_text().splitlines()
    splits = ["train" if i % 5 < 3 else "val" if i % 5 == 3 else "test" for i in range(20)]
    lines = [line.rpartition(",")[0] + f",{split}" for line, split in zip(rows, splits, strict=True)]
    manifest.write_text("\n".join([head, *lines]) + "\n")
    (folder / "maps").mkdir()
    np.save(folder / "maps" / "a.npy", np.eye(8))
    (folder / "study.toml").write_text(STUDY)
    (folder / "again.toml").write_text(AGAIN)


@pytest.fixture(scope="session")
def finished(make_once, make_images, command) -> Path:
    """A study that one of two machines began, that was stopped after an epoch and called again; ``said-*``: what it said."""

    def fill(folder: Path) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        write_study(folder, make_images)
        study = ("study", folder / "study.toml", "--out", folder / "out")
        results = {"first": command(*study, "--shard", "0/2")}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("explain2me.train.loop.log_epoch", interrupt)
            results["stopped"] = command(*study)
        results["last"] = command(*study)
        assert [code for code, _, _ in results.values()] == [0, 130, 0], results
        for name, (_, output, errors) in results.items():
            (folder / f"said-{name}").write_text(output + errors)

    return make_once("study", fill)


def test_its_check_says_what_would_be_trained(call: Call, make_images: Callable[..., Path], tmp_path: Path) -> None:
    write_study(tmp_path, make_images)
    code, said, _ = call("check", "study.toml")
    assert code == 0
    assert "strategy guided: cyborg, human maps: the mean of 1 maps, the same for every image" in said
    assert "training: 12 images (fake/gan 6, real/camera 6)" in said
    assert "test_resnet-guided: 2 run(s) of 2 epochs" in said
    assert "classes, in the order of the logits: real, fake; positive: fake" in said
    coarse = "warning: the maps of timm:test_resnet have only 2 x 2 cells"
    finer = '[[detectors]]\nname = "finer"\narchitecture = "timm:test_resnet"\ninput_size = 160\nrandom_runs = 2\n'
    (tmp_path / "listed.toml").write_text(STUDY + finer)
    assert [said.count(coarse), call("check", "listed.toml")[1].count(coarse)] == [1, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [("training.runs=1", "needs at least 2"), ("training.batch_size=13", "more than the 12 images")],
)
def test_its_check_refuses_what_could_not_be_trained(
    call: Call, make_images: Callable[..., Path], tmp_path: Path, change: str, message: str
) -> None:
    write_study(tmp_path, make_images)
    refused(call("check", "study.toml", "--set", change), message)


def test_nothing_is_trained_before_everything_is_checked(
    call: Call, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    write_study(tmp_path, make_images)
    sets = ("--set", "training.strategies.1.salience=mean-of:x")
    refused(call("study", "study.toml", "-o", "out", *sets), "expected a folder of maps")
    assert not (tmp_path / "out").exists()


def test_machines_share_the_trainings_and_a_stopped_one_continues(finished: Path) -> None:
    said = (finished / "said-first").read_text()
    assert re.search("1 of 2: test_resnet-plain run 0, best of 2 epochs: epoch [12]: train_loss ", said)
    assert "2 trainings are not finished, first test_resnet-plain run 1" in said
    assert "continues after" not in (finished / "said-stopped").read_text()
    said = (finished / "said-last").read_text()
    assert said.count("continues after") == said.count("test_resnet-plain run 1 continues after epoch 1 of 2\n") == 1


def test_it_ends_with_a_report(call: Call, finished: Path) -> None:
    said = (finished / "said-last").read_text()
    assert "Measures over all images" in said
    assert "What the numbers say\n" in said
    assert (
        "few training runs: 2 training runs of each detector: so few runs make the interval of a score too narrow"
        in said
    )
    report = finished / "out" / "run" / "report"
    assert "- **few training runs**: 2 training runs of each detector" in (report / "findings.md").read_text()
    assert call("verify", finished / "out" / "run")[:2] == (0, "whole\n")
    page = (report / "index.html").read_text()
    card = (report / "model-cards" / "test_resnet-guided" / "model-card.md").read_text()
    for text in (
        "cyborg, alpha 0.5, map of the predicted class",
        "the mean of 1 maps, the same for every image: no annotation",
    ):
        assert text in page
        assert text in card
    assert "12 (fake/gan 6, real/camera 6)" in page
    assert re.search("- epoch taken: [12], [12] of 2", card)
    refused(call("show", finished / "out"), f"it has no run.json; give '{finished / 'out' / 'run'}'")


def test_its_check_compares_with_what_was_trained(call: Call, finished: Path) -> None:
    check = ("check", finished / "study.toml", "--out", finished / "out")
    assert re.search("timm:test_resnet: input 64x64, .*, maps of 2x2 cells", call(*check)[1])
    assert call(*check, "--set", "training.device=cuda:63")[0] == 0  # nothing is left to train on it
    assert call(*check, "--set", "training.runs=3")[0] == 0  # it would grow
    message = "Move that folder away, and the comparison is made again (what was trained stays)"
    refused(call(*check, "--set", "compute.batch_size=3"), message)
    lines = (finished / "images" / "manifest.csv").read_text().splitlines()
    image = finished / "images" / next(line for line in lines if line.endswith(",train")).partition(",")[0]
    before = image.read_bytes()
    try:
        Image.new("RGB", (64, 64)).save(image)  # under its name: only `check` opens every image again
        refused(call(*check), "data.training.sha256 was")
    finally:
        image.write_bytes(before)


def test_weights_of_a_study_warn_where_they_are_used_otherwise(call: Call, finished: Path) -> None:
    again, size = finished / "again.toml", "its weights were trained with input_size = [64, 64]"
    said = call("check", again)[1]
    assert "set input_size = [64, 64]" in said
    order = "its weights were trained with the classes real, fake in the order of the logits (says the card beside them), but fake, real are"
    assert order not in said
    assert size not in call("check", again, "--set", "detectors.0.input_size=64")[1]
    other = ("--set", 'data.classes=["fake", "real"]')
    assert f'{order} used; set data.classes = ["real", "fake"]' in call("check", again, *other)[1]
    said = " ".join(call("explain", again, "--out", "again", *other)[1].split())
    assert size in said
    assert order in said
