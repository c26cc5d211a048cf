"""The folder of one training: its lock, its outcome, and which epoch its files are of."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from odd_files import small_files
from small_trainings import Stop, make_config, one, stop_after

import explain2me.train.training
from explain2me.detectors.cards import CARD
from explain2me.errors import Explain2MeError
from explain2me.train.loop import train_detector
from explain2me.train.training import LOCK, RESUME, Progress


def test_a_card_that_a_network_disk_shows_late_ends_nothing(tmp_path, manifest):
    training = one(make_config(manifest, epochs=1), tmp_path)
    assert training.outcome().startswith("another process is training test_resnet-plain run 0; ")


def test_two_processes_do_not_train_in_one_folder(tmp_path, manifest):
    training = one(make_config(manifest, epochs=1), tmp_path)
    training.folder.mkdir(parents=True)
    hold = "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); time.sleep(99)"
    with subprocess.Popen(
        [sys.executable, "-c", hold, training.folder / LOCK], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "\n"
        with pytest.raises(Explain2MeError, match=r"^another process is training test_resnet-plain run 0; wait for it"):
            train_detector(training)
        assert not list(training.folder.glob("*.safetensors"))
        other.kill()
    with training.locked():
        pass


def test_a_full_disk_keeps_the_last_whole_epoch(tmp_path, manifest):
    training = one(make_config(manifest, epochs=2), tmp_path)
    with pytest.raises(Stop):
        train_detector(training, stop_after(4))
    before = {path.name: path.read_bytes() for path in training.folder.iterdir()}
    with small_files(100_000), pytest.raises(OSError, match="File too large"):
        train_detector(training)
    assert {path.name: path.read_bytes() for path in training.folder.iterdir()} == before
    train_detector(training)
    assert training.done
    assert {path.stat().st_mode & 0o777 for path in training.folder.glob("*.safetensors")} == {0o644}


@pytest.mark.parametrize(
    ("monitor", "values", "best"),
    [
        ("loss", [0.2, math.nan, 0.1, 0.1, 0.3], [1, 1, 3, 3, 3]),
        ("auroc", [math.nan, math.nan, 0.5, 0.4, 0.5], [1, 1, 3, 3, 3]),
        ("accuracy", [0.5, 0.7, 0.6, 0.7, 0.8], [1, 2, 2, 2, 5]),
    ],
)
def test_the_best_epoch_is_the_first_that_is_better_than_all_before(manifest, monitor, values, best):
    """An undefined metric is never the best, but of the first epoch."""
    settings, progress, seen = make_config(manifest, monitor=monitor).training, Progress(), []
    for epoch, value in enumerate(values, start=1):
        progress.add(
            {"epoch": epoch, "val_loss": 1, "val_auroc": 1, "val_accuracy": 1} | {f"val_{monitor}": value}, settings
        )
        seen.append(progress.best_epoch)
    assert seen == best


def test_a_stop_between_the_last_epoch_and_the_card(tmp_path, manifest, monkeypatch):
    training = one(make_config(manifest, epochs=2), tmp_path)

    def stop(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr("explain2me.train.loop.write_card", stop)
        with pytest.raises(Stop):
            train_detector(training)
    assert training.epochs_committed() == 2
    before = (training.folder / "best.safetensors").read_bytes()
    steps = []
    train_detector(training, lambda *told: steps.append(told))
    assert training.done
    assert not steps
    assert (training.folder / "best.safetensors").read_bytes() == before


@pytest.fixture(scope="module")
def unvalidated(tmp_path_factory, manifest):
    """A training of two epochs without validation, so that the later epoch is the better one."""
    training = one(make_config(manifest, epochs=2, validation_split=None), tmp_path_factory.mktemp("unvalidated"))
    train_detector(training)
    return training


@pytest.mark.parametrize("place", ["before resume.ckpt", "after resume.ckpt"])
def test_the_best_weights_are_those_that_are_committed(tmp_path, unvalidated, monkeypatch, place):
    training = dataclasses.replace(unvalidated, study_folder=tmp_path)
    with pytest.raises(Stop):
        train_detector(training, stop_after(4))
    first = (training.folder / "best.safetensors").read_bytes()
    second = (unvalidated.folder / "best.safetensors").read_bytes()
    assert first != second
    write_bytes, promote_best = explain2me.train.training.write_bytes, explain2me.train.training.promote_best

    def stop_before(content: bytes, path: Path) -> None:
        if path.name == RESUME:
            raise Stop
        write_bytes(content, path)

    def stop_after_it(folder: Path, best_epoch: int) -> None:
        if best_epoch == 2:
            raise Stop
        promote_best(folder, best_epoch)

    with monkeypatch.context() as patch:
        if place == "before resume.ckpt":
            patch.setattr("explain2me.train.training.write_bytes", stop_before)
        else:
            patch.setattr("explain2me.train.training.promote_best", stop_after_it)
        with pytest.raises(Stop):
            train_detector(training)
    assert (training.folder / "best.safetensors").read_bytes() == first
    if place == "before resume.ckpt":  # the second epoch is not committed, so it begins again
        with pytest.raises(Stop):
            train_detector(training, stop_after(4))
        assert (training.folder / "best.safetensors").read_bytes() == first
    train_detector(training)
    assert (training.folder / "best.safetensors").read_bytes() == second
    assert {path.name for path in training.folder.iterdir()} == {path.name for path in unvalidated.folder.iterdir()}


def test_patience_ends_a_training_early(tmp_path, manifest):
    config = make_config(manifest, epochs=30, patience=2, optimizer={"learning_rate": 1e-9}, augmentation={})
    training = one(config, tmp_path)
    train_detector(training)
    card = json.loads((training.folder / CARD).read_text())
    assert card["epochs"] == card["best_epoch"] + 2 < 30


def test_without_validation_the_last_epoch_is_the_best(unvalidated):
    card = json.loads((unvalidated.folder / CARD).read_text())
    assert card["best_epoch"] == 2
    assert card["files"]["best.safetensors"] == card["files"]["last.safetensors"]


def test_the_outcome_of_a_finished_training_in_a_line(finished):
    assert re.fullmatch(
        r"test_resnet-guided run 0, best of 25 epochs: epoch \d+: train_loss 0\.\d+, val_accuracy [01]\.\d+, val_auroc .*",
        finished.training.outcome(),
    )
