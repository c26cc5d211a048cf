"""What a training was begun with, refusals of another one, and its card."""

import errno
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_trainings import ARCHITECTURE, SIZE, Stop, make_config, one, stop_after

import explain2me.train.loop
from explain2me.config.load import parse_config
from explain2me.detectors.cards import CARD
from explain2me.detectors.load import load_detector
from explain2me.errors import CheckpointError, Explain2MeError
from explain2me.train.data import Examples, list_splits, read_splits
from explain2me.train.loop import train_detector
from explain2me.train.record import refuse_other_trainings
from explain2me.train.study import check_study, plan_study, train_missing
from explain2me.train.training import RESUME, load_resume


def test_the_card_tells_what_each_stretch_of_epochs_was_made_with(tmp_path, manifest, monkeypatch):
    training = one(make_config(manifest), tmp_path)
    with pytest.raises(Stop):
        train_detector(training, stop_after(4))
    real = explain2me.train.loop.provenance
    monkeypatch.setattr("explain2me.train.loop.provenance", lambda *more: real(*more) | {"git": {"commit": "later"}})
    train_detector(training)
    card = json.loads((training.folder / CARD).read_text())
    assert (card["git"], card["from_epoch"]) == ({"commit": "later"}, 2)
    assert [(each["git"], each["from_epoch"]) for each in card["earlier"]] == [(real()["git"], 1)]
    assert card["device"] == "cpu"
    assert "lightning" in card["versions"]


def test_what_a_training_continues_from_must_be_its_own(tmp_path, manifest):
    config = make_config(manifest, epochs=2, runs=2)
    first, second = plan_study(config, tmp_path).trainings[:2]
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
    torch.save(
        {"epoch": 0, "global_step": 3, "pytorch-lightning_version": "2.6.6", "state_dict": {}}, second.folder / RESUME
    )
    assert second.epochs_committed() == 0
    with pytest.raises(
        CheckpointError, match=r"^[^\n]*resume\.ckpt is not as this version of explain2me writes it; [^\n]*$"
    ):
        train_detector(second)
    (second.folder / "training.json").write_text("{")
    with pytest.raises(Explain2MeError, match=r"training\.json cannot be read"):
        train_detector(second)


def test_a_disk_that_fails_to_read_the_state_of_a_training_says_nothing_about_the_file(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("explain2me.train.training.torch.load", fail)
    with pytest.raises(OSError, match="Input/output error"):
        load_resume(tmp_path / RESUME)


def test_a_folder_of_another_training_is_refused(study):
    tree = json.loads(study.config.model_dump_json())
    tree["training"]["batch_size"] = 4
    other = one(parse_config(tree), study.out)
    (other.folder / CARD).unlink()
    with pytest.raises(
        Explain2MeError, match=r"begun with another config or other data: training\.batch_size was 8, is 4"
    ):
        train_detector(other)


@pytest.mark.parametrize("change", [{"epochs": 2}, {"optimizer": {"learning_rate": 0.5}}, {"batch_size": 4}], ids=str)
def test_a_finished_training_of_another_config_is_no_result_of_this_one(finished_study, change):
    tree = json.loads(finished_study.config.model_dump_json())
    tree["training"] |= change
    with pytest.raises(Explain2MeError, match="begun with another config"):
        train_missing(plan_study(parse_config(tree), finished_study.out))


def test_more_runs_are_no_other_config(finished_study):
    tree = json.loads(finished_study.config.model_dump_json())
    tree["training"]["runs"] = 3
    every = plan_study(parse_config(tree), finished_study.out).trainings
    assert [training.done for training in every] == [True, True, False] * 3
    refuse_other_trainings(every)


def test_a_setting_that_was_added_since_had_its_default(study):
    for path in study.out.rglob("training.json"):
        record = json.loads(path.read_text())
        del record["training"]["class_balance"], record["training"]["optimizer"]["warmup_epochs"]
        del record["strategy"]["entropy_weight"]
        path.write_text(json.dumps(record))
    assert train_missing(plan_study(study.config, study.out)) == []
    tree = json.loads(study.config.model_dump_json())
    tree["training"]["class_balance"] = "weights"
    with pytest.raises(Explain2MeError, match="class_balance was 'none', is 'weights'"):
        train_missing(plan_study(parse_config(tree), study.out))


def test_one_study_trains_on_one_set_of_images(tmp_path, manifest, study):
    for folder in study.out.glob("training/*/run*"):
        if folder.parts[-2:] != ("test_resnet-plain", "run00"):
            shutil.rmtree(folder)
    other = tmp_path / "manifest.csv"
    lines = manifest.read_text().splitlines()
    elsewhere = [f"{manifest.parent}/{line}".replace(",map", f",{manifest.parent}/map") for line in lines[3:]]
    other.write_text("\n".join([lines[0], *elsewhere]) + "\n")
    changed = study.config.model_copy(update={"data": study.config.data.model_copy(update={"manifest": str(other)})})
    message = r"run00' holds a training begun with .* other data: data\.training\."
    for train in (
        lambda: train_missing(plan_study(changed, study.out)),
        lambda: train_detector(one(changed, study.out, 1)),  # as a worker does
    ):
        with pytest.raises(Explain2MeError, match=message):
            train()


def swap_classes(folder: Path, tree: dict) -> None:
    tree["data"]["classes"] = ["fake", "real"]


def leave_one_out(folder: Path, tree: dict) -> None:
    lines = (folder / "manifest.csv").read_text().splitlines()
    (folder / "manifest.csv").write_text("\n".join(line for line in lines if not line.startswith("03.png")) + "\n")


def change_a_label(folder: Path, tree: dict) -> None:
    text = (folder / "manifest.csv").read_text()
    (folder / "manifest.csv").write_text(text.replace("03.png,fake", "03.png,real"))


def change_a_human_map(folder: Path, tree: dict) -> None:
    Image.fromarray(np.eye(SIZE, dtype=np.uint8) * 255).save(folder / "map03.png")


def change_an_average_map(folder: Path, tree: dict) -> None:
    np.save(folder / "maps" / "a.npy", np.eye(8)[::-1])  # of the same size


def take_another_average_map(folder: Path, tree: dict) -> None:
    tree["training"]["strategies"][2]["salience"] = f"mean-of:{folder / 'others'}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_classes, r"plain/run00' holds .* data\.classes\.0 was 'real', is 'fake'"),
        (leave_one_out, r"plain/run00' holds .* data\.training\.by_label_and_source\.fake/camera was 12, is 11"),
        (change_a_label, r"plain/run00' holds .* data\.training\.by_label_and_source\.fake/camera was 12, is 11"),
        (change_a_human_map, r"guided/run00' holds .* human_maps\.sha256 was"),
        (change_an_average_map, r"averaged/run00' holds .* human_maps\.sha256 was"),
        (take_another_average_map, r"averaged/run00' holds .* human_maps\.folder was 'maps', is 'others'"),
    ],
)
def test_a_study_that_is_trained_is_not_compared_under_other_data(
    tmp_path, manifest, study, change, message, monkeypatch
):
    folder = tmp_path / "data"
    shutil.copytree(manifest.parent, folder)
    text = study.config.model_dump_json().replace(str(manifest.parent), str(folder))
    copied = parse_config(json.loads(text))
    with monkeypatch.context() as patch:
        patch.setattr("explain2me.train.record.read_splits", None)
        check_study(plan_study(copied, study.out))  # opens no image
        assert train_missing(plan_study(copied, study.out)) == []
    tree = json.loads(text)
    change(folder, tree)
    changed = parse_config(tree)
    for refuse in (check_study, train_missing):
        with pytest.raises(Explain2MeError, match=message):
            refuse(plan_study(changed, study.out))


def test_the_same_images_may_be_listed_otherwise(tmp_path, manifest, study):
    copy = tmp_path / "elsewhere"
    shutil.copytree(manifest.parent, copy)
    text = (copy / "manifest.csv").read_text()
    (copy / "manifest.csv").write_text(re.sub(r"^(\d\d)\.png", r"./\1.png", text, flags=re.MULTILINE))
    text = study.config.model_dump_json().replace(str(manifest.parent), str(copy))
    assert train_missing(plan_study(parse_config(json.loads(text)), study.out)) == []


def test_machines_that_began_at_the_same_moment_with_other_data_are_refused(tmp_path, manifest, finished_study):
    folder = tmp_path / "data"
    shutil.copytree(manifest.parent, folder)
    leave_one_out(folder, {})
    config, out = make_config(folder / "manifest.csv", epochs=1), tmp_path / "out"
    theirs = "training/test_resnet-guided/run00"

    def finished_by_the_other(*_: object) -> None:
        shutil.copytree(finished_study.out / theirs, out / theirs)

    with pytest.raises(Explain2MeError, match=r"guided/run00' holds .* data\.training"):
        train_missing(plan_study(config, out), shard=(0, 2), on_trained=finished_by_the_other)


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


def test_training_learns_and_its_card_tells(finished):
    training = finished.training
    card = json.loads((training.folder / CARD).read_text())
    assert card["metrics"]["val_accuracy"] >= 0.75
    assert card["metrics"] == card["curve"][card["best_epoch"] - 1]
    assert max(line["val_accuracy"] for line in card["curve"]) == card["metrics"]["val_accuracy"]
    assert card["curve"][-1]["train_loss"] < card["curve"][0]["train_loss"]
    assert card["data"]["training"]["by_label_and_source"] == {"fake/camera": 12, "real/camera": 12}
    assert card["human_maps"]["maps"] == 19
    assert torch.__version__.startswith(card["versions"]["torch"])
    assert str(training.folder.parents[2]) not in json.dumps(card)
    detector = load_detector(ARCHITECTURE, training.checkpoint, num_classes=2, input_size=SIZE)
    fresh = load_detector(ARCHITECTURE, num_classes=2, input_size=SIZE, seed=training.seed).model.state_dict()
    moved = [name for name, value in detector.model.state_dict().items() if not torch.equal(value, fresh[name])]
    assert any(name.endswith("running_mean") for name in moved)  # it was trained in training mode
    assert all(name in moved for name in fresh if name.endswith("weight"))
    splits = read_splits(list_splits(training.data, training.settings, 0), training.data.max_pixels)
    assert splits.validation is not None
    examples = Examples(splits.validation, (SIZE, SIZE), "bilinear")
    images = torch.stack([examples[0, i].image for i in range(len(examples))])
    with torch.no_grad():
        predicted = detector.model(detector.preprocess(images)).argmax(1)
    assert (predicted == splits.validation.labels).float().mean().item() == pytest.approx(
        card["metrics"]["val_accuracy"]
    )
