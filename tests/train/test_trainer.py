"""Trainings of a tiny real network: the same bytes after an interrupt, the human map beside its image, clear errors."""

import gc
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from odd_files import small_files
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

import explain2me.train.trainer
from explain2me.config.load import parse_config
from explain2me.config.schema import Config
from explain2me.config.training import AugmentationConfig, OptimizerConfig
from explain2me.detectors.cards import human_maps_in_words
from explain2me.detectors.load import load_detector
from explain2me.errors import DivergedError, Explain2MeError, ManifestError
from explain2me.train.augment import Move, _moved, draw_move, move_image, move_map
from explain2me.train.cams import class_activation_maps, find_features
from explain2me.train.data import EpochSampler, Examples, class_weights, read_human_maps, read_splits
from explain2me.train.losses import guided_loss
from explain2me.train.study import check_study, evaluation, refuse_shared_gpus, train_missing, trainings
from explain2me.train.trainer import (
    CARD,
    LOCK,
    RESUME,
    _as_raised,
    _build,
    learning_rate_factor,
    ranking,
    train_detector,
)

ARCHITECTURE = "timm:test_resnet"
SIZE = 64
LINES = "path,label,source,split,salience\n"


@pytest.fixture(scope="module")
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
    (folder / "manifest.csv").write_text(lines)
    return folder / "manifest.csv"


def make_config(manifest: Path, **training: object) -> Config:
    settings = {
        "architectures": [ARCHITECTURE],
        "strategies": [{"name": "plain"}, {"name": "guided", "loss": "cyborg"}],
        "split": "train",
        "validation_split": "val",
        "input_size": SIZE,
        "runs": 1,
        "epochs": 3,
        "batch_size": 8,
        "device": "cpu",
        "augmentation": {"flip": True, "crop": 0.7, "shift": 0.05},
    }
    data = {"manifest": str(manifest), "split": "test"}
    return parse_config({"name": "study", "data": data, "training": settings | training})


def one(config: Config, out: Path, index: int = 0):
    return trainings(config, out)[index]


class Stop(Exception):
    """Stands for a kill."""


def stop_after(steps: int):
    def on_step(done: int, total: int, text: str) -> None:
        if done == steps:
            raise Stop

    return on_step


def spoil_the_weights() -> None:
    """Of every training under way in this process."""
    for thing in gc.get_objects():
        if type(thing).__name__ == "_Module":
            next(thing.model.parameters()).data.fill_(float("nan"))


@pytest.mark.parametrize("index", [0, 1], ids=["plain", "guided"])
@pytest.mark.parametrize("steps", [4, 7], ids=["within an epoch", "after two epochs"])
def test_an_interrupt_changes_no_bit(tmp_path, manifest, index, steps):
    config = make_config(
        manifest,
        optimizer={"schedule": "cosine"},
        architectures=["torchvision:mobilenet_v3_small"],
        validation_split=None,  # Lightning restarts otherwise without
    )
    if index == 1:  # its head is not linear behind the pooling: no class activation map
        config = make_config(manifest, optimizer={"name": "adamw", "learning_rate": 0.001})
    whole, broken = one(config, tmp_path / "whole", index), one(config, tmp_path / "broken", index)
    train_detector(whole)
    with pytest.raises(Stop):
        train_detector(broken, stop_after(steps))
    assert not broken.done
    assert (broken.folder / RESUME).exists()
    train_detector(broken)
    for name in ("best.safetensors", "last.safetensors", "metrics.csv"):
        assert (broken.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    cards = [json.loads((training.folder / CARD).read_text()) for training in (whole, broken)]
    assert len(cards[0]["curve"]) == 3
    for card in cards:
        del card["seconds"]
    assert cards[0] == cards[1]
    assert {path.name for path in broken.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}


def test_the_card_tells_what_each_stretch_of_epochs_was_made_with(tmp_path, manifest, monkeypatch):
    training = one(make_config(manifest), tmp_path)
    with pytest.raises(Stop):
        train_detector(training, stop_after(4))
    real = explain2me.train.trainer.provenance
    monkeypatch.setattr("explain2me.train.trainer.provenance", lambda *more: real(*more) | {"git": {"commit": "later"}})
    train_detector(training)
    card = json.loads((training.folder / CARD).read_text())
    assert (card["git"], card["from_epoch"]) == ({"commit": "later"}, 2)
    assert [(each["git"], each["from_epoch"]) for each in card["earlier"]] == [(real()["git"], 1)]
    assert card["device"] == "cpu"
    assert "lightning" in card["versions"]


def test_a_training_uses_its_own_folder_and_generator_alone(tmp_path, manifest, monkeypatch):
    def fail(*_: object) -> None:
        raise AssertionError("the caller's generators on GPUs are not ours")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    training = one(make_config(manifest, epochs=1), tmp_path)
    train_detector(training)
    (training.folder / RESUME).write_bytes(b"of a process that was killed right after it wrote the card")
    train_detector(training)
    assert not (training.folder / RESUME).exists()


def test_a_training_that_is_over_holds_no_images(tmp_path, manifest):
    gc.collect()
    gc.disable()
    try:
        train_detector(one(make_config(manifest, epochs=1), tmp_path))
        assert not [thing for thing in gc.get_objects() if type(thing) is Examples]
    finally:
        gc.enable()


@pytest.mark.slow
def test_an_interrupt_changes_no_bit_where_processes_read_the_images(tmp_path, manifest):
    plain, config = make_config(manifest, epochs=2), make_config(manifest, epochs=2, loaders=1)
    trained = [one(config, tmp_path / name) for name in ("plain", "whole", "broken")]
    train_detector(one(plain, tmp_path / "plain"))
    train_detector(trained[1])
    with pytest.raises(Stop):
        train_detector(trained[2], stop_after(4))
    train_detector(trained[2])
    weights = [(training.folder / "last.safetensors").read_bytes() for training in trained]
    assert weights[0] == weights[1] == weights[2]


def test_a_training_keeps_its_number_of_threads(tmp_path, manifest):
    config = make_config(manifest, epochs=2)
    training = one(config, tmp_path)
    seen = []

    def on_step(done: int, total: int, text: str) -> None:
        seen.append(torch.get_num_threads())
        if len(seen) == 4:
            raise Stop

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with pytest.raises(Stop):
            train_detector(training, on_step)
        torch.set_num_threads(2)
        train_detector(training, on_step)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}
    assert json.loads((training.folder / CARD).read_text())["threads"] == 1


@pytest.mark.parametrize("all_the_same", [False, True], ids=["skipped", "computed"])
def test_guidance_that_weighs_nothing_changes_no_bit(tmp_path, manifest, monkeypatch, all_the_same):
    if all_the_same:  # alpha = 1 reads no activation maps; here it does
        monkeypatch.setattr(
            "explain2me.config.training.StrategyConfig.guided", property(lambda self: self.loss == "cyborg")
        )
    strategies = [{"name": "plain"}, {"name": "guided", "loss": "cyborg", "alpha": 1.0}]
    config = make_config(manifest, epochs=2, strategies=strategies)
    for index in (0, 1):
        train_detector(one(config, tmp_path, index))
    weights = [(one(config, tmp_path, index).folder / "last.safetensors").read_bytes() for index in (0, 1)]
    assert weights[0] == weights[1]


def test_what_going_on_needs_must_be_of_this_training(tmp_path, manifest):
    config = make_config(manifest, epochs=2, runs=2)
    first, second = trainings(config, tmp_path)[:2]
    for training in (first, second):
        with pytest.raises(Stop):
            train_detector(training, stop_after(4))
    (second.folder / RESUME).write_bytes((first.folder / RESUME).read_bytes())
    with pytest.raises(
        Explain2MeError, match=r"run01/resume\.ckpt' holds a training begun with another config.*run was 0, is 1"
    ):
        train_detector(second)
    (second.folder / RESUME).write_bytes(b"not a checkpoint")
    with pytest.raises(Explain2MeError, match=r"resume\.ckpt cannot be read"):
        train_detector(second)
    (second.folder / "training.json").write_text("{")
    with pytest.raises(Explain2MeError, match=r"training\.json is damaged"):
        train_detector(second)


def test_one_study_trains_on_one_set_of_images(tmp_path, manifest):
    config = make_config(manifest, epochs=1, runs=2)
    train_detector(one(config, tmp_path))
    other = tmp_path / "manifest.csv"
    lines = manifest.read_text().splitlines()
    elsewhere = [f"{manifest.parent}/{line}".replace(",map", f",{manifest.parent}/map") for line in lines[3:]]
    other.write_text("\n".join([lines[0], *elsewhere]) + "\n")
    changed = config.model_copy(update={"data": config.data.model_copy(update={"manifest": str(other)})})
    with pytest.raises(Explain2MeError, match=r"run00' holds a training begun with .* other data: data\.training\."):
        train_missing(changed, tmp_path)


def _swap_classes(folder: Path, tree: dict) -> None:
    tree["data"]["classes"] = ["fake", "real"]


def _leave_one_out(folder: Path, tree: dict) -> None:
    lines = (folder / "manifest.csv").read_text().splitlines()
    (folder / "manifest.csv").write_text("\n".join(line for line in lines if not line.startswith("03.png")) + "\n")


def _change_a_label(folder: Path, tree: dict) -> None:
    text = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(text.replace("03.png,fake", "03.png,real"))


def _change_a_human_map(folder: Path, tree: dict) -> None:
    Image.fromarray(np.eye(SIZE, dtype=np.uint8) * 255).save(folder / "map03.png")


def _change_an_average_map(folder: Path, tree: dict) -> None:
    np.save(folder / "maps" / "a.npy", np.eye(8)[::-1])  # of the same size


def _take_another_average_map(folder: Path, tree: dict) -> None:
    tree["training"]["strategies"][2]["salience"] = f"mean-of:{folder / 'others'}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap_classes, r"plain/run00' holds .* data\.classes\.0 was 'real', is 'fake'"),
        (_leave_one_out, r"plain/run00' holds .* data\.training\.by_label_and_source\.fake/camera was 12, is 11"),
        (_change_a_label, r"plain/run00' holds .* data\.training\.by_label_and_source\.fake/camera was 12, is 11"),
        (_change_a_human_map, r"guided/run00' holds .* human_maps\.sha256 was"),
        (_change_an_average_map, r"averaged/run00' holds .* human_maps\.sha256 was"),
        (_take_another_average_map, r"averaged/run00' holds .* human_maps\.folder was 'maps', is 'others'"),
    ],
)
def test_a_study_that_is_trained_is_not_compared_under_other_data(tmp_path, manifest, change, message, monkeypatch):
    folder = tmp_path / "data"
    shutil.copytree(manifest.parent, folder)
    for name, maps in (("maps", np.eye(8)), ("others", np.eye(8)[::-1])):
        (folder / name).mkdir()
        np.save(folder / name / "a.npy", maps)
    strategies = [
        {"name": "plain"},
        {"name": "guided", "loss": "cyborg"},
        {"name": "averaged", "loss": "cyborg", "salience": f"mean-of:{folder / 'maps'}"},
    ]
    config = make_config(folder / "manifest.csv", epochs=1, runs=2, strategies=strategies)
    assert train_missing(config, tmp_path) == []
    with monkeypatch.context() as patch:
        patch.setattr("explain2me.train.trainer.read_splits", None)
        check_study(config, tmp_path)  # opens no image
        assert train_missing(config, tmp_path) == []
    tree = json.loads(config.model_dump_json())
    change(folder, tree)
    changed = parse_config(tree)
    for refuse in (lambda: check_study(changed, tmp_path), lambda: train_missing(changed, tmp_path)):
        with pytest.raises(Explain2MeError, match=message):
            refuse()


def test_images_that_are_listed_otherwise_and_are_the_same_go_on(tmp_path, manifest):
    config = make_config(manifest, epochs=1)
    assert train_missing(config, tmp_path) == []
    copy = tmp_path / "elsewhere"
    shutil.copytree(manifest.parent, copy)
    text = (copy / "manifest.csv").read_text()
    (copy / "manifest.csv").write_text(re.sub(r"^(\d\d)\.png", r"./\1.png", text, flags=re.MULTILINE))
    assert train_missing(make_config(copy / "manifest.csv", epochs=1), tmp_path) == []


def test_machines_that_began_at_the_same_moment_with_other_data_are_told(tmp_path, manifest):
    folder = tmp_path / "data"
    shutil.copytree(manifest.parent, folder)
    _leave_one_out(folder, {})
    theirs = one(make_config(folder / "manifest.csv", epochs=1), tmp_path / "other", 1)
    train_detector(theirs)
    config = make_config(manifest, epochs=1)

    def finished_by_the_other(*_: object) -> None:
        shutil.copytree(theirs.folder, one(config, tmp_path / "out", 1).folder)

    with pytest.raises(Explain2MeError, match=r"guided/run00' holds .* data\.training"):
        train_missing(config, tmp_path / "out", shard=(0, 2), on_trained=finished_by_the_other)


def test_a_training_that_another_process_is_at_is_left_to_it(tmp_path, manifest):
    config = make_config(manifest, epochs=1)
    held = one(config, tmp_path)
    held.folder.mkdir(parents=True)
    told = []
    with (
        FileLock(held.folder / LOCK),
        pytest.raises(
            Explain2MeError,
            match=r"^test_resnet-plain run 0 is being .* \(1 of 2 trainings are like that, the others are fini",
        ),
    ):
        train_missing(config, tmp_path, on_trained=lambda each, *_: told.append(each.outcome()))
    assert [training.done for training in trainings(config, tmp_path)] == [False, True]
    assert told[1].startswith("test_resnet-guided run 0, best of 1 epochs")
    assert train_missing(config, tmp_path) == []


def test_a_card_that_a_network_disk_shows_late_ends_nothing(tmp_path, manifest):
    training = one(make_config(manifest, epochs=1), tmp_path)
    assert training.outcome().startswith("test_resnet-plain run 0 is being trained by another process already; ")


def test_two_processes_do_not_train_in_one_folder(tmp_path, manifest):
    training = one(make_config(manifest, epochs=1), tmp_path)
    training.folder.mkdir(parents=True)
    hold = "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); time.sleep(99)"
    with subprocess.Popen(
        [sys.executable, "-c", hold, training.folder / LOCK], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "\n"
        with pytest.raises(Explain2MeError, match="run 0 is being trained by another process already; wait for it"):
            train_detector(training)
        assert not list(training.folder.glob("*.safetensors"))
        other.kill()
    train_detector(training)
    assert training.done


def test_a_device_that_fails_is_not_a_damaged_checkpoint(tmp_path, manifest, monkeypatch):
    training = one(make_config(manifest, epochs=2), tmp_path)
    with pytest.raises(Stop):
        train_detector(training, stop_after(4))

    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory\nand so on")

    with monkeypatch.context() as patch:
        patch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.model_to_device", fail)
        with pytest.raises(
            Explain2MeError, match=r"^CUDA out of memory; .* are kept\. .* smaller training\.batch_size"
        ):
            train_detector(training)
    train_detector(training)
    assert training.done


def test_the_ranks_of_a_scheduler_are_not_those_of_a_training(tmp_path, manifest, monkeypatch):
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    for name, value in (("SLURM_NTASKS", "4"), ("SLURM_PROCID", "3"), ("SLURM_LOCALID", "3"), ("SLURM_JOB_NAME", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 3)  # as Lightning sets it when it is imported under SLURM
    training = one(make_config(manifest, epochs=1, loggers=["tensorboard"]), tmp_path)
    train_detector(training)
    assert list((training.folder / "tensorboard").glob("events*"))
    assert rank_zero_only.rank == 3


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


def test_every_architecture_is_built_before_the_first_is_trained(tmp_path, manifest):
    config = make_config(manifest, architectures=[ARCHITECTURE, "timm:test_resnett"])
    with pytest.raises(Explain2MeError, match="unknown architecture 'timm:test_resnett'"):
        train_missing(config, tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


PLAIN = [{"name": "plain"}]
LEVELS = [{"kind": "gaussian", "levels": [0.1]}] * 2


@pytest.mark.parametrize(
    ("sets", "training", "message"),
    [
        ({}, {"runs": 1}, "needs at least 2 of each detector, got training.runs = 1"),
        ({"data": {"sample": 9}}, {}, "expected at least 9 images of the source 'camera', got 8"),
        ({"data": {"split": "tset"}}, {}, "did you mean 'test'"),
        ({}, {"input_size": [96, 64]}, "measures.resilience .* needs a square input, got 96x64"),
        (
            {},
            {"input_size": 32, "architectures": ["torchvision:resnet18"], "strategies": PLAIN},
            "detector 'resnet18-plain': .*no map of more than one cell",
        ),
        ({"salience": {"target": "fakee"}}, {}, "salience.target: .* did you mean 'fake'"),
        ({"measures": {"noise": LEVELS}}, {}, "expected different conditions, got 'gaussian@0.1' twice"),
        ({"compute": {"device": "cuda:63"}}, {}, "compute.device = 'cuda:63'"),
        (
            {"detectors": [{"name": "other", "architecture": ARCHITECTURE, "checkpoints": "no/such*"}]},
            {},
            "'other': no file matches",
        ),
    ],
    ids=["runs", "sample", "split", "square", "grid", "target", "conditions", "device", "checkpoints"],
)
def test_what_would_stop_the_comparison_is_found_before_training(tmp_path, manifest, sets, training, message):
    tree = json.loads(make_config(manifest, **({"runs": 2} | training)).model_dump_json())
    for name, values in sets.items():
        tree[name] = tree[name] | values if isinstance(values, dict) else values
    with pytest.raises(Explain2MeError, match=message):
        check_study(parse_config(tree), tmp_path)


def test_a_finished_study_needs_no_device_to_train_on(tmp_path, manifest):
    assert train_missing(make_config(manifest, strategies=PLAIN, epochs=1), tmp_path) == []
    without = make_config(manifest, strategies=PLAIN, epochs=1, device="cuda:63")
    assert train_missing(without, tmp_path) == []
    check_study(
        without.model_copy(update={"measures": without.measures.model_copy(update={"stability": False})}), tmp_path
    )
    with pytest.raises(Explain2MeError, match=r"training\.device = 'cuda:63'"):
        check_study(make_config(manifest, runs=2, device="cuda:63"), tmp_path)


@pytest.mark.parametrize("wrong", ["mean-of:/no/such", "manifest"])
def test_human_maps_are_read_before_the_first_training(tmp_path, manifest, wrong):
    text = manifest.read_text().replace("map01.png", "missing.png")
    other = manifest.parent / "missing.csv"
    other.write_text(text)
    strategies = [{"name": "plain"}, {"name": "guided", "loss": "cyborg", "salience": wrong}]
    with pytest.raises(Explain2MeError, match=r"missing\.png|expected a folder of maps"):
        train_missing(make_config(other, strategies=strategies, epochs=1), tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


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
            read_splits(config, config.training)
    absent = config.model_copy(
        update={"data": make_config(manifest).data.model_copy(update={"classes": ("real", "fake", "fakes")})}
    )
    with pytest.raises(Explain2MeError, match="to train on, got none of 'fakes'; add some"):  # in no row at all
        read_splits(absent, absent.training)
    kept = [line for i, line in enumerate(lines) if i not in fakes]
    (manifest.parent / "spelt.csv").write_text("\n".join(kept))
    with pytest.raises(
        Explain2MeError, match=r"split 'train': .* got only 'real'; add images of another label to train on"
    ):
        read_splits(config, config.training)


def test_a_study_that_can_be_compared_is_let_through(tmp_path, manifest):
    check_study(make_config(manifest, runs=2), tmp_path)


def test_trainings_of_several_gpus_do_not_share_them(tmp_path, manifest, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for change in ({"devices": 2}, {"workers": 2}):
        refuse_shared_gpus(make_config(manifest, device="cuda", **change).training)
    config = make_config(manifest, device="cuda", devices=2, workers=2)
    with pytest.raises(Explain2MeError, match=r"workers = 2 with training\.devices = 2: .* would share their GPUs"):
        train_missing(config, tmp_path)


def test_an_extended_study_says_what_to_delete(tmp_path, manifest):
    from explain2me.stages.begin import prepare

    config = make_config(manifest, runs=2, epochs=1)
    assert train_missing(config, tmp_path) == []
    prepare(evaluation(config, tmp_path), tmp_path / "run")
    check_study(config, tmp_path)
    more = make_config(manifest, runs=3, epochs=1)
    with pytest.raises(
        Explain2MeError, match=r"run' holds the comparison .*Delete that folder, .*what was trained stays"
    ):
        check_study(more, tmp_path)


def test_labels_to_test_are_those_that_were_trained(tmp_path, manifest):
    lines = manifest.read_text().replace("fake,camera,test", "odd,camera,test")
    other = manifest.parent / "odd_test.csv"
    other.write_text(lines)
    config = make_config(other, runs=2, epochs=1)
    with pytest.raises(Explain2MeError, match="'odd'"):
        check_study(config, tmp_path)


def test_an_undefined_score_is_never_the_best(tmp_path, manifest):
    from explain2me.train.trainer import _Files

    training = one(make_config(manifest, monitor="loss"), tmp_path)
    files = _Files(training, load_detector(ARCHITECTURE, num_classes=2, seed=1), {}, {})
    scores = [files._score({"epoch": i, "val_loss": loss}) for i, loss in enumerate([0.2, float("nan"), 0.1])]
    assert scores == [-0.2, -float("inf"), -0.1]


def test_the_best_epoch_is_not_chosen_by_ties():
    logits = torch.tensor([[0.0, 20.0], [0.0, 21.0], [0.0, 22.0], [1.0, 0.0]])
    found = ranking(logits, 1)
    assert found.diff()[:2].gt(0).all()
    assert ((found > 0) & (found < 1)).all()
    assert found[3] == found.min()
    several = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert ranking(several, 2).argsort().tolist() == several.double().softmax(1)[:, 2].argsort().tolist()


def test_epochs_that_order_the_images_alike_tie(tmp_path, manifest):
    """AUROC is a number of pairs, here of 30, and not what float32 makes of it."""
    (manifest.parent / "uneven.csv").write_text(manifest.read_text().replace(",test,", ",val,", 3))
    training = one(make_config(manifest.parent / "uneven.csv"), tmp_path)
    train_detector(training)
    curve = json.loads((training.folder / CARD).read_text())["curve"]
    halves = [round(60 * epoch["val_auroc"]) for epoch in curve]  # a tie counts one half
    assert [epoch["val_auroc"] for epoch in curve] == [half / 60 for half in halves]
    assert any(half % 15 for half in halves)  # one that float32 cannot say


def test_an_epoch_that_spoils_the_weights_is_not_kept(tmp_path, manifest):
    training = one(make_config(manifest, epochs=2), tmp_path)

    def on_step(done, total, text):
        if done == 6:  # the last step of the second epoch: every loss was finite
            spoil_the_weights()

    with pytest.raises(Explain2MeError, match="is not finite after epoch 2"):
        train_detector(training, on_step)
    assert not training.done
    kept = load_detector(ARCHITECTURE, training.folder / "last.safetensors", num_classes=2, input_size=SIZE)
    assert all(value.isfinite().all() for value in kept.model.state_dict().values())


def test_large_seeds(tmp_path, manifest):
    config = make_config(manifest, epochs=1).model_copy(update={"seed": 2**63 - 1000})
    train_detector(one(config, tmp_path))


@pytest.mark.parametrize("pretrained", ["inception_v3", "googlenet"])
def test_pretrained_weights_get_no_second_normalisation(monkeypatch, pretrained):
    """Their checkpoints are read into a model without it."""
    import torchvision

    plain = torchvision.models.get_model(pretrained, init_weights=False)
    weights = plain.state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: weights)
    trained = load_detector(f"torchvision:{pretrained}", num_classes=2, pretrained=True, new_head=True).model
    assert plain.transform_input is False
    assert trained.transform_input is False


def test_a_stop_between_the_last_epoch_and_the_card(tmp_path, manifest, monkeypatch):
    from explain2me.train import trainer

    training = one(make_config(manifest, epochs=2), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(trainer._Files, "on_fit_end", lambda *_: (_ for _ in ()).throw(Stop()))
        with pytest.raises(Stop):
            train_detector(training)
    before = (training.folder / "best.safetensors").read_bytes()
    steps = []
    train_detector(training, lambda *told: steps.append(told))
    assert training.done
    assert not steps
    assert (training.folder / "best.safetensors").read_bytes() == before


@pytest.mark.parametrize(("place", "call"), [("save_checkpoint", 2), ("_take_best", 3)])  # of the second epoch
def test_the_best_weights_are_those_that_are_committed(tmp_path, manifest, monkeypatch, place, call):
    from explain2me.train import trainer

    config = make_config(manifest, epochs=2, validation_split=None)  # the later epoch is the better
    whole, short, broken = (one(config, tmp_path / name) for name in ("whole", "short", "broken"))
    train_detector(whole)
    with pytest.raises(Stop):
        train_detector(short, stop_after(4))
    after = {1: (short.folder / "best.safetensors").read_bytes(), 2: (whole.folder / "best.safetensors").read_bytes()}
    owner = trainer.L.Trainer if place == "save_checkpoint" else trainer._Files
    real, calls = getattr(owner, place), []

    def stop_there(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise Stop
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, stop_there)
        with pytest.raises(Stop):
            train_detector(broken)
    assert (broken.folder / "best.safetensors").read_bytes() == after[1]
    if place == "save_checkpoint":  # the second epoch is not committed, so that it begins again
        with pytest.raises(Stop):
            train_detector(broken, stop_after(4))
        assert (broken.folder / "best.safetensors").read_bytes() == after[1]
    train_detector(broken)
    assert (broken.folder / "best.safetensors").read_bytes() == after[2]
    assert {path.name for path in broken.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}


def test_a_finished_training_is_left_alone_and_the_random_state_too(tmp_path, manifest):
    training = one(make_config(manifest, epochs=1), tmp_path)
    torch.manual_seed(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    train_detector(training)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    times = {path: path.stat().st_mtime_ns for path in training.folder.iterdir()}
    train_detector(training)
    assert {path: path.stat().st_mtime_ns for path in training.folder.iterdir()} == times


def test_runs_differ_and_strategies_start_alike(tmp_path, manifest):
    config = make_config(manifest, runs=2, epochs=1)
    left = train_missing(config, tmp_path)
    assert left == []
    digests = {
        t.folder: json.loads((t.folder / CARD).read_text())["files"]["last.safetensors"]
        for t in trainings(config, tmp_path)
    }
    assert len(set(digests.values())) == 4
    begun = {(t.detector, t.run): _build(t, 2).weights_sha256 for t in trainings(config, tmp_path)}
    assert begun["test_resnet-plain", 1] == begun["test_resnet-guided", 1] != begun["test_resnet-plain", 0]


def test_training_learns_and_its_card_tells(tmp_path, manifest):
    config = make_config(
        manifest, epochs=25, optimizer={"learning_rate": 0.05, "schedule": "cosine"}, augmentation={"flip": True}
    )
    training = one(config, tmp_path, 1)
    train_detector(training)
    card = json.loads((training.folder / CARD).read_text())
    assert card["metrics"]["val_accuracy"] >= 0.75
    assert card["metrics"] == card["curve"][card["best_epoch"] - 1]
    assert max(line["val_accuracy"] for line in card["curve"]) == card["metrics"]["val_accuracy"]
    assert card["curve"][-1]["train_loss"] < card["curve"][0]["train_loss"]
    assert card["data"]["training"]["by_label_and_source"] == {"fake/camera": 12, "real/camera": 12}
    assert card["human_maps"]["maps"] == 19
    assert torch.__version__.startswith(card["versions"]["torch"])
    assert str(tmp_path) not in json.dumps(card)
    detector = load_detector(ARCHITECTURE, training.checkpoint, num_classes=2, input_size=SIZE)
    fresh = load_detector(ARCHITECTURE, num_classes=2, input_size=SIZE, seed=training.seed).model.state_dict()
    moved = [name for name, value in detector.model.state_dict().items() if not torch.equal(value, fresh[name])]
    assert any(name.endswith("running_mean") for name in moved)  # it was trained in training mode
    assert all(name in moved for name in fresh if name.endswith("weight"))
    splits = read_splits(config, config.training)
    assert splits.validation is not None
    images = torch.stack([Examples(splits.validation, (SIZE, SIZE), "bilinear")[0, i].image for i in range(8)])
    with torch.no_grad():
        predicted = detector.model(detector.preprocess(images)).argmax(1)
    assert (predicted == splits.validation.labels).float().mean().item() == pytest.approx(
        card["metrics"]["val_accuracy"]
    )


def test_shards_share_the_trainings(tmp_path, manifest):
    config = make_config(manifest, runs=2, epochs=1)
    left = train_missing(config, tmp_path, shard=(1, 2))
    assert [(t.detector, t.run) for t in left] == [("test_resnet-plain", 0), ("test_resnet-guided", 0)]
    assert train_missing(config, tmp_path, shard=(0, 2)) == []


def test_evaluation_lists_what_was_trained(tmp_path, manifest):
    config = make_config(manifest, runs=2)
    found = evaluation(config, tmp_path)
    assert found.training is None
    assert [detector.name for detector in found.detectors] == ["test_resnet-plain", "test_resnet-guided"]
    assert [Path(path).parent.name for path in found.detectors[0].checkpoints] == ["run00", "run01"]
    assert found.detectors[0].input_size == SIZE


def test_evaluation_reads_images_as_the_weights_were_trained_from(tmp_path, manifest):
    named = "IMAGENET1K_SWAG_E2E_V1"
    for change, side in (({}, 384), ({"input_size": 384}, 384), ({"pretrained": True}, None)):
        options = {"architectures": ["torchvision:vit_b_16"], "pretrained": named, "input_size": None} | change
        (found, *_) = evaluation(make_config(manifest, **options), tmp_path).detectors
        size = found.input_size if isinstance(found.input_size, int | None) else found.input_size[0]
        assert (size, found.interpolation) == (side, None if side is None else "bicubic")


def test_patience_ends_a_training_early(tmp_path, manifest):
    config = make_config(manifest, epochs=30, patience=2, optimizer={"learning_rate": 1e-9}, augmentation={})
    training = one(config, tmp_path)
    train_detector(training)
    card = json.loads((training.folder / CARD).read_text())
    assert card["epochs"] == card["best_epoch"] + 2 < 30


def test_without_validation_the_last_epoch_is_the_best(tmp_path, manifest):
    training = one(make_config(manifest, validation_split=None, epochs=2), tmp_path)
    train_detector(training)
    card = json.loads((training.folder / CARD).read_text())
    assert card["best_epoch"] == 2
    assert card["files"]["best.safetensors"] == card["files"]["last.safetensors"]


def test_a_share_can_be_held_out_for_validation(manifest):
    config = make_config(manifest, validation_split=None, validation_share=0.25)
    splits = read_splits(config, config.training)
    assert splits.validation is not None
    assert (len(splits.training.files), len(splits.validation.files)) == (18, 6)
    assert not set(splits.training.files) & set(splits.validation.files)
    assert splits.validation.labels.bincount().tolist() == [3, 3]


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
    splits = read_splits(config, config.training)
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


def test_each_example_has_the_human_map_of_what_it_shows(manifest):
    config = make_config(manifest, augmentation={"flip": True, "crop": 0.5, "shift": 0.1})
    splits = read_splits(config, config.training)
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
    assert _moved(human_map[None], tail).any()  # which scaling would have made a map of its own
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


@pytest.mark.parametrize("balance", ["weights", "sampling"])
def test_class_balance_trains(tmp_path, manifest, balance):
    unequal = manifest.parent / "unequal.csv"
    unequal.write_text(re.sub("(0[1357].png),fake", r"\1,real", manifest.read_text()))
    found = []
    for name in ("none", balance):
        training = one(make_config(unequal, class_balance=name, epochs=1), tmp_path / name, 1)
        train_detector(training)
        found.append((training.folder / "last.safetensors").read_bytes())
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("strategy", "called"),
    [
        ({"loss": "cyborg", "alpha": 0.3, "entropy_weight": 0.7}, "guided_loss"),
        ({"entropy_weight": 0.7}, "guided_loss"),
        ({}, "cross_entropy"),
    ],
    ids=["both", "entropy alone", "neither"],
)
def test_what_the_config_weighs_reaches_the_loss(tmp_path, manifest, monkeypatch, strategy, called):
    unequal = tmp_path / "unequal.csv"
    lines = manifest.read_text().replace("\n", f"\n{manifest.parent}/").replace(",map", f",{manifest.parent}/map")
    lines = re.sub("(0[1357].png),fake", r"\1,real", lines).removesuffix(f"{manifest.parent}/")  # 16 real, 8 fake
    unequal.write_text(lines)
    seen = []
    real = getattr(explain2me.train.trainer, called)

    def loss(*tensors, **options):
        seen.append(options)
        return real(*tensors, **options)

    monkeypatch.setattr(f"explain2me.train.trainer.{called}", loss)
    strategies = [{"name": "one"} | strategy]
    config = make_config(unequal, strategies=strategies, class_balance="weights", epochs=1, validation_split=None)
    train_detector(one(config, tmp_path))
    assert len(seen) == 3
    for options in seen:
        torch.testing.assert_close(options["class_weights"], torch.tensor([0.75, 1.5]))
        if called == "guided_loss":
            assert (options["entropy_weight"], options["alpha"]) == (0.7, strategy.get("alpha", 0.5))
            assert (options["human_maps"] is not None) == ("loss" in strategy)


def test_the_learning_rate_of_each_epoch_is_that_of_the_schedule(tmp_path, manifest):
    optimizer = {"schedule": "cosine", "warmup_epochs": 1, "learning_rate": 0.01}
    training = one(make_config(manifest, optimizer=optimizer), tmp_path)
    with pytest.raises(Stop):
        train_detector(training, stop_after(4))
    train_detector(training)
    lines = [line.split(",")[:2] for line in (training.folder / "metrics.csv").read_text().splitlines()]
    assert lines[0] == ["epoch", "learning_rate"]
    assert [float(rate) for _, rate in lines[1:]] == pytest.approx([0.005, 0.0075, 0.0025])


@pytest.mark.parametrize("cam_class", ["predicted", "true"])
def test_the_class_whose_map_is_guided(tmp_path, manifest, monkeypatch, cam_class):
    from explain2me.train import trainer

    guided, wanted, others = [], [], []

    def maps(features, weights, classes):
        guided.append(classes)
        return class_activation_maps(features, weights, classes)

    def loss(logits, labels, **options):
        (wanted if cam_class == "true" else others).append(labels)
        (others if cam_class == "true" else wanted).append(logits.argmax(1))
        return guided_loss(logits, labels, **options)

    monkeypatch.setattr(trainer, "class_activation_maps", maps)
    monkeypatch.setattr(trainer, "guided_loss", loss)
    strategies = [{"name": "guided", "loss": "cyborg", "cam_class": cam_class}]
    train_detector(one(make_config(manifest, strategies=strategies, epochs=1), tmp_path))
    assert len(guided) == 3
    assert all(map(torch.equal, guided, wanted))
    assert not all(map(torch.equal, guided, others))


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        ({"name": "sgd", "momentum": 0.7, "weight_decay": 0.03}, torch.optim.SGD),
        ({"name": "adamw", "weight_decay": 0.03, "gradient_clip": 0.5}, torch.optim.AdamW),
    ],
    ids=["sgd", "adamw"],
)
def test_the_optimizer_is_the_one_that_was_asked_for(tmp_path, manifest, monkeypatch, optimizer, kind):
    from explain2me.train import trainer

    def look(_, begun, module):
        (found,) = begun.optimizers
        assert type(found) is kind
        (group,) = found.param_groups
        assert len(group["params"]) == len(list(module.model.parameters()))
        assert group["initial_lr"] == 0.002
        assert {name: group[name] for name in ("momentum", "weight_decay") if name in optimizer and name in group} == {
            name: optimizer[name] for name in ("momentum", "weight_decay") if name in optimizer
        }
        assert begun.gradient_clip_val == optimizer.get("gradient_clip")
        assert begun.precision == "bf16-mixed"
        raise Stop

    monkeypatch.setattr(trainer._Files, "on_train_start", look)
    config = make_config(manifest, precision="bfloat16", optimizer=optimizer | {"learning_rate": 0.002})
    with pytest.raises(Stop):
        train_detector(one(config, tmp_path))


def test_bfloat16_trains_float32_weights(tmp_path, manifest):
    found = {}
    for precision in ("float32", "bfloat16"):
        training = one(make_config(manifest, precision=precision, epochs=1), tmp_path / precision, 1)
        train_detector(training)
        found[precision] = load_file(training.folder / "last.safetensors")
    floats = [name for name, value in found["float32"].items() if value.is_floating_point()]
    assert {found["bfloat16"][name].dtype for name in floats} == {torch.float32}
    apart = [(found["float32"][name] - found["bfloat16"][name]).abs().max().item() for name in floats]
    assert 0 < max(apart) < 0.5  # computed otherwise, but the same training


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_a_training_that_then_goes_on(tmp_path, manifest, number):
    training = one(make_config(manifest, epochs=2), tmp_path)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        train_detector(training, lambda done, *_: os.kill(os.getpid(), number) if done == 4 else None)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not training.done
    assert (training.folder / RESUME).exists()
    train_detector(training)
    assert training.done


def test_all_trainings_of_an_architecture_start_from_the_same_pretrained_weights(tmp_path, manifest, monkeypatch):
    import torchvision

    weights = torchvision.models.get_model("resnet18").state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: weights)
    config = make_config(manifest, architectures=["torchvision:resnet18"], pretrained="IMAGENET1K_V1", epochs=1, runs=2)
    first, second = (one(config, tmp_path, i) for i in (0, 1))
    train_detector(first)
    card = json.loads((first.folder / CARD).read_text())
    assert re.fullmatch("[0-9a-f]{64}", card["initial_weights"])
    right = weights["conv1.weight"]
    weights["conv1.weight"] = right + 1
    with pytest.raises(Explain2MeError, match="initial_weights was"):
        train_detector(second)
    weights["conv1.weight"] = right
    train_detector(second)  # though the new heads differ
    assert second.done


@pytest.mark.parametrize("architecture", ["torchvision:resnet18", "torchvision:densenet121", "timm:test_resnet"])
def test_class_activation_maps_are_grad_cam_before_relu(architecture):
    from explain2me import GradCAM

    detector = load_detector(architecture, num_classes=3, seed=1)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    reader = find_features(detector.model, (64, 64))
    classes = torch.tensor([2, 0])
    with torch.no_grad():
        logits, features = reader(images)
        maps = class_activation_maps(
            features,
            detector.model.get_classifier().weight
            if "timm" in architecture
            else list(detector.model.modules())[-1].weight,
            classes,
        )
    with GradCAM(detector.model) as cam:
        wanted, wanted_logits = cam(images, classes)
    torch.testing.assert_close(logits, wanted_logits)
    torch.testing.assert_close(maps.relu() / maps[0].numel(), wanted, rtol=1e-4, atol=1e-6)


def test_features_carry_gradients_into_the_whole_network():
    model = load_detector(ARCHITECTURE, num_classes=2, seed=1).model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reader = find_features(model, (SIZE, SIZE))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    _, features = reader(torch.randn(2, 3, SIZE, SIZE))
    (gradient,) = torch.autograd.grad(features.square().sum(), next(model.parameters()))
    assert gradient.any()


def test_schedules():
    step = OptimizerConfig(warmup_epochs=2, step_epochs=3)
    assert [learning_rate_factor(step, epoch, 9) for epoch in range(5)] == pytest.approx([1 / 3, 2 / 3, 1, 0.1, 0.1])
    cosine = [learning_rate_factor(OptimizerConfig(schedule="cosine"), epoch, 4) for epoch in range(4)]
    assert cosine == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])
    assert learning_rate_factor(OptimizerConfig(schedule="constant"), 3, 4) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["timm:test_resnett"]}, "unknown architecture"),
        ({"batch_size": 25}, "batch_size = 25 is more than the 24 images"),
        ({"devices": 9, "batch_size": 1}, "at least one image to validate with on each, got 8"),
        ({"pretrained": "V9", "architectures": ["torchvision:resnet18"]}, "no such weights; known: 'IMAGENET1K_V1'"),
        ({"pretrained": "IMAGENET1K_V1"}, "names weights of torchvision"),
        ({"split": "trian"}, "did you mean 'train'"),
        ({"validation_split": "train"}, "are in the split to train on and in the one to validate with"),
        ({"split": "test", "validation_split": None}, "8 images would be trained on and tested"),
        ({"split": None, "validation_split": None}, "8 images would be trained on and tested"),
        ({"validation_split": "test"}, "8 images would be validated with and tested"),
        ({"sample": 25}, "expected at least 25 images of the source 'camera', got 24"),
        ({"sample": {"camra": 3}}, "there is no source 'camra'; did you mean 'camera'"),
        (
            {"strategies": [{"name": "a", "loss": "cyborg", "salience": "mean-of:/no/such"}]},
            "expected a folder of maps",
        ),
        (
            {"architectures": ["timm:test_vit"], "strategies": [{"name": "a", "loss": "cyborg"}]},
            "needs a linear head right behind global average pooling",
        ),
        (
            {"input_size": 20, "strategies": [{"name": "a", "loss": "cyborg"}]},
            "ResNet: images of 20 x 20 pixels leave no map to guide in front of .*; set a larger input_size, such as 224",
        ),
        (
            {"optimizer": {"learning_rate": 1e30}},
            "the loss is not finite in epoch 1, step 2; lower",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_input(tmp_path, manifest, change, message):
    with pytest.raises(Explain2MeError, match=message):
        train_detector(one(make_config(manifest, **change), tmp_path))


def test_a_folder_of_another_training_is_refused(tmp_path, manifest):
    train_detector(one(make_config(manifest, epochs=1), tmp_path))
    other = one(make_config(manifest, epochs=1, batch_size=4), tmp_path)
    (other.folder / CARD).unlink()
    with pytest.raises(
        Explain2MeError, match=r"begun with another config or other data: training\.batch_size was 8, is 4"
    ):
        train_detector(other)


@pytest.mark.parametrize("change", [{"epochs": 2}, {"optimizer": {"learning_rate": 0.5}}, {"batch_size": 4}], ids=str)
def test_a_finished_training_of_another_config_is_no_result_of_this_one(tmp_path, manifest, change):
    train_missing(make_config(manifest, epochs=1), tmp_path)
    with pytest.raises(Explain2MeError, match="begun with another config"):
        train_missing(make_config(manifest, **({"epochs": 1} | change)), tmp_path)
    assert train_missing(make_config(manifest, epochs=1, runs=2), tmp_path) == []  # more runs are no other config


def test_a_setting_that_was_added_since_had_its_default(tmp_path, manifest):
    config = make_config(manifest, epochs=1, optimizer={"warmup_epochs": 0})
    train_missing(config, tmp_path)
    for path in tmp_path.rglob("training.json"):
        record = json.loads(path.read_text())
        del record["training"]["class_balance"], record["training"]["optimizer"]["warmup_epochs"]
        del record["strategy"]["entropy_weight"]
        path.write_text(json.dumps(record))
    assert train_missing(config, tmp_path) == []
    with pytest.raises(Explain2MeError, match="class_balance was 'none', is 'weights'"):
        train_missing(make_config(manifest, epochs=1, class_balance="weights"), tmp_path)


def test_a_training_that_diverges_keeps_its_last_whole_epoch(tmp_path, manifest):
    config = make_config(manifest, epochs=3, optimizer={"schedule": "step", "step_epochs": 1, "step_factor": 1.0})
    training = one(config, tmp_path)

    def on_step(done, total, text):
        if done == 4:  # in the second epoch: weights that give no finite loss
            spoil_the_weights()

    with pytest.raises(Explain2MeError, match="not finite in epoch 2"):
        train_detector(training, on_step)
    assert not training.done
    kept = load_detector(ARCHITECTURE, training.folder / "last.safetensors", num_classes=2, input_size=SIZE)
    assert all(value.isfinite().all() for value in kept.model.state_dict().values())


def test_the_others_go_on_where_a_training_diverges(tmp_path, manifest):
    config = make_config(manifest, epochs=1, strategies=[{"name": "first"}, {"name": "second"}])
    told = []

    def on_step(done, total, text):
        if not told and done == 2:
            spoil_the_weights()

    with pytest.raises(
        Explain2MeError, match=r"^1 of 2 trainings diverged, the others are finished\. .*-first run 0: the l"
    ):
        train_missing(config, tmp_path, on_step=on_step, on_trained=lambda each, *_: told.append(each.outcome()))
    assert [training.done for training in trainings(config, tmp_path)] == [False, True]
    assert re.match(r"test_resnet-first run 0: the loss is not finite in epoch 1, step 3", told[0])
    assert train_missing(config, tmp_path) == []
    assert not list(tmp_path.rglob("diverged*"))


def test_a_class_of_one_or_no_image_is_refused(tmp_path, manifest):
    lines = manifest.read_text().splitlines()
    train = [line for line in lines[1:] if ",train," in line]
    tests = [line for line in lines[1:] if ",test," in line]
    config = make_config(manifest, split="train", validation_split=None, validation_share=0.25)

    def splits_of(more: list[str], **data: object):
        odd = tmp_path / "odd.csv"
        odd.write_text("\n".join([lines[0], *(f"{manifest.parent}/{line}" for line in [*more, *tests])]) + "\n")
        changed = config.data.model_copy(update={"manifest": str(odd)} | data)
        return read_splits(config.model_copy(update={"data": changed}), config.training)

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
        return read_splits(config, config.training.model_copy(update={"manifest": str(odd)}))

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


def test_human_maps_of_a_few_images_are_counted():
    record = {"kind": "a map for each image", "maps": 3, "images": 120, "sha256": "x"}
    assert human_maps_in_words(record) == "a map of its own for 3 of 120 images, the others are trained without one"
    assert human_maps_in_words(record | {"maps": 120}) == "a map of its own for 120 of 120 images"
    assert human_maps_in_words(None) == "none"


def test_manifest_without_human_maps(tmp_path, manifest):
    bare = manifest.parent / "bare.csv"
    bare.write_text("\n".join(line.rpartition(",")[0] for line in manifest.read_text().splitlines()) + "\n")
    with pytest.raises(Explain2MeError, match="needs human maps, and no image to train on has one"):
        train_detector(one(make_config(bare), tmp_path, 1))


def test_an_image_that_cannot_be_read_is_named_with_its_use(tmp_path, manifest):
    (manifest.parent / "empty.png").write_bytes(b"")
    for old, use in (("00.png,", "to train on"), ("25.png,", "to validate with")):
        (manifest.parent / "unreadable.csv").write_text(manifest.read_text().replace(f"\n{old}", "\nempty.png,"))
        config = make_config(manifest.parent / "unreadable.csv")
        with pytest.raises(Explain2MeError, match=rf"1 of \d+ images {use} cannot be used, first 'empty\.png'"):
            read_splits(config, config.training)


@pytest.mark.parametrize(
    ("trace", "kind", "message"),
    [
        ("explain2me.errors.DivergedError: no number: lower it", DivergedError, "no number: lower it"),
        ("OSError: [Errno 28] No space left on device", OSError, "No space left"),
        ("PermissionError: [Errno 13] Permission denied: 'a'", PermissionError, "Permission denied"),
        (
            "torch.OutOfMemoryError: CUDA out of memory",
            Explain2MeError,
            "CUDA out of memory; the epochs that were whole",
        ),
        ("RuntimeError: something else", ManifestError, "something else"),
    ],
)
def test_what_another_process_raised_is_raised_here(trace, kind, message):
    found = _as_raised(ManifestError(f"Caught it in process 0.\nOriginal Traceback:\n  line 1\n{trace}\n"))
    assert type(found) is kind
    assert message in str(found)


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


@pytest.mark.slow
def test_two_processes_share_one_training(tmp_path, manifest, capfd):
    lines = manifest.read_text().replace(",test,", ",val,", 1)  # 5 images in two batches, and 4 in one
    (manifest.parent / "nine.csv").write_text(lines)
    training = one(make_config(manifest.parent / "nine.csv", devices=2, batch_size=4, epochs=2), tmp_path, 1)
    train_detector(training)
    assert capfd.readouterr() == ("", "")
    card = json.loads((training.folder / CARD).read_text())
    assert len(card["curve"]) == 2
    splits = read_splits(training.config, training.settings)
    assert splits.validation is not None
    detector = load_detector(ARCHITECTURE, training.folder / "last.safetensors", num_classes=2, input_size=SIZE)
    images = torch.stack([Examples(splits.validation, (SIZE, SIZE), "bilinear")[0, i].image for i in range(9)])
    labels = splits.validation.labels
    with torch.no_grad():  # over the images of both
        logits = detector.model(detector.preprocess(images))
    last = card["curve"][-1]
    assert last["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert last["val_auroc"] == roc_auc_score(labels == splits.classes.index("fake"), logits.diff()[:, 0])


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_with_the_same_bits(tmp_path, manifest):
    config = make_config(manifest, devices=2, batch_size=4, epochs=3, augmentation={"flip": True})
    whole, broken = one(config, tmp_path / "whole", 1), one(config, tmp_path / "broken", 1)
    train_detector(whole)
    code = (
        "import json, sys; from pathlib import Path\n"
        "from explain2me.config.schema import parse_config; from explain2me.train.study import trainings\n"
        "from explain2me.train.trainer import train_detector\n"
        "if __name__ == '__main__':\n"
        "    train_detector(trainings(parse_config(json.loads(sys.argv[1])), Path(sys.argv[2]))[1])\n"
    )
    script = tmp_path / "train.py"  # its processes import it again
    script.write_text(code)
    command = [sys.executable, script, config.model_dump_json(), tmp_path / "broken"]
    with subprocess.Popen(command, start_new_session=True) as process:
        while not (broken.folder / RESUME).exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    assert not broken.done
    train_detector(broken)
    for name in ("best.safetensors", "last.safetensors", "metrics.csv"):
        assert (broken.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


@pytest.mark.slow
def test_what_one_of_two_processes_raises_is_said_in_a_line(tmp_path, manifest):
    config = make_config(manifest, devices=2, batch_size=4, optimizer={"learning_rate": 1e30})
    with pytest.raises(Explain2MeError, match="the loss is not finite in epoch 1"):
        train_missing(config, tmp_path, on_step=lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["timm:legacy_xception", "timm:inception_v3", "torchvision:inception_v3"])
def test_architectures_at_299(tmp_path, manifest, architecture):
    config = make_config(manifest, architectures=[architecture], input_size=None, epochs=1, batch_size=4, sample=None)
    training = one(config, tmp_path, 1)
    train_detector(training)
    detector = load_detector(architecture, training.checkpoint, num_classes=2)
    assert detector.input_size == (299, 299)
    if "xception" in architecture:
        assert detector.mean == detector.std == (0.5, 0.5, 0.5)


def test_a_training_can_be_counted_though_its_config_holds_a_dict(tmp_path: Path) -> None:
    from explain2me.workers import Recovery

    config = parse_config(
        {
            "name": "x",
            "data": {"manifest": "m", "sample": {"a": 1}},
            "training": {"architectures": ["timm:test_resnet"]},
        }
    )
    training = trainings(config, tmp_path)[0]
    assert Recovery().died(training) == [training]


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "ray"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trainings_in_workers_give_the_same_weights(manifest: Path, tmp_path: Path, executor: str) -> None:
    if executor == "ray":
        pytest.importorskip("ray", reason="the extra ray is not installed")
    one_config = make_config(manifest, epochs=1)
    two_config = make_config(manifest, epochs=1, workers=2).model_copy(
        update={"compute": one_config.compute.model_copy(update={"executor": executor})}
    )
    assert train_missing(one_config, tmp_path / "one") == []
    told = []
    assert train_missing(two_config, tmp_path / "two", on_step=lambda *args: told.append(args)) == []
    assert [(done, total) for done, total, _ in told] == [(1, 2), (2, 2)]
    assert {text.partition(", epoch 1: train_loss")[0] for *_, text in told} == {
        f"{training.detector} run 0" for training in trainings(two_config, tmp_path)
    }
    if executor == "ray":
        from explain2me.workers import ray

        ray.close()
    for training in trainings(one_config, tmp_path / "one"):
        other = tmp_path / "two" / training.folder.relative_to(tmp_path / "one")
        assert (other / CARD).exists()
        weights = [load_file(folder / "best.safetensors") for folder in (training.folder, other)]
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)
