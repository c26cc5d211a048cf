"""One folder of images, one finished training and one finished study, for the tests that only read them."""

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from small_trainings import SIZE, make_config, one

from explain2me.config.schema import Config
from explain2me.train.loop import train_detector
from explain2me.train.study import plan_study, train_missing
from explain2me.train.training import Training

LINES = "path,label,source,split,salience\n"


class Study(NamedTuple):
    config: Config
    out: Path


class Finished(NamedTuple):
    training: Training
    steps: list[tuple[int, int, str]]
    random_states_kept: bool


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> Path:
    """24 images to train on, 8 to validate with, 8 to test; fakes carry a bright square, which their map marks."""
    folder = tmp_path_factory.mktemp("training")
    rng = np.random.default_rng(0)
    lines = LINES
    for i in range(40):
        label, split = ("real", "fake")[i % 2], "train" if i < 24 else "val" if i < 32 else "test"
        pixels = rng.integers(0, 140, (SIZE, SIZE, 3), dtype=np.uint8)
        human = np.zeros((SIZE, SIZE), np.uint8)
        left = int(rng.integers(0, SIZE - 20))
        human[left : left + 20, left : left + 20] = 255
        if label == "fake":
            pixels[human > 0] = 255
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        Image.fromarray(human).save(folder / f"map{i:02d}.png")
        lines += f"{i:02d}.png,{label},camera,{split},{'' if i % 5 == 0 else f'map{i:02d}.png'}\n"
    for name, values in (("maps", np.eye(8)), ("others", np.eye(8)[::-1])):
        (folder / name).mkdir()
        np.save(folder / name / "a.npy", values)
    (folder / "manifest.csv").write_text(lines)
    return folder / "manifest.csv"


@pytest.fixture(scope="session")
def uneven(manifest) -> Path:
    """The same images, of which 6 real and 5 fake ones are to validate with."""
    path = manifest.parent / "uneven.csv"
    path.write_text(manifest.read_text().replace(",test,", ",val,", 3))
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory, uneven) -> Finished:
    """A guided training of 25 epochs that has learnt the task."""
    optimizer = {"learning_rate": 0.05, "schedule": "cosine"}
    config = make_config(uneven, epochs=25, optimizer=optimizer, augmentation={"flip": True})
    training = one(config, tmp_path_factory.mktemp("finished"), 1)
    steps = []
    torch.manual_seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    train_detector(training, lambda *step: steps.append(step))
    kept = torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    return Finished(training, steps, kept)


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory, manifest) -> Study:
    """Two runs of each of three strategies, one epoch each. Read only."""
    out = tmp_path_factory.mktemp("study")
    strategies = [
        {"name": "plain"},
        {"name": "guided", "loss": "cyborg"},
        {"name": "averaged", "loss": "cyborg", "salience": f"mean-of:{manifest.parent / 'maps'}"},
    ]
    config = make_config(manifest, epochs=1, runs=2, strategies=strategies)
    assert train_missing(plan_study(config, out)) == []
    return Study(config, out)


@pytest.fixture
def study(finished_study, tmp_path) -> Study:
    """A copy of the finished study that a test may change."""
    out = tmp_path / "study"
    shutil.copytree(finished_study.out, out)
    return Study(finished_study.config, out)


@pytest.fixture(scope="session", params=["plain", "guided"])
def uninterrupted(request, tmp_path_factory, manifest, uneven) -> Study:
    """A training of three epochs without a break; plain: a network with dropout, without validation."""
    if request.param == "plain":
        optimizer = {"schedule": "cosine", "warmup_epochs": 1, "learning_rate": 0.01}
        architectures = ["torchvision:mobilenet_v3_small"]  # its head allows no class activation map
        config = make_config(
            manifest,
            strategies=[{"name": "plain"}],
            optimizer=optimizer,
            architectures=architectures,
            validation_split=None,
        )
    else:
        optimizer = {"name": "adamw", "learning_rate": 0.001}
        config = make_config(uneven, strategies=[{"name": "guided", "loss": "cyborg"}], optimizer=optimizer)
    out = tmp_path_factory.mktemp("uninterrupted")
    train_detector(one(config, out))
    return Study(config, out)
