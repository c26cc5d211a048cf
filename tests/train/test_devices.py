"""Devices and processes of a training: several of them, signals, and what they raise."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from sklearn.metrics import roc_auc_score
from small_trainings import ARCHITECTURE, SIZE, Stop, all_splits, make_config, one, stop_after

from explain2me.detectors.cards import CARD
from explain2me.detectors.load import load_detector
from explain2me.errors import DivergedError, Explain2MeError
from explain2me.train.data import Examples
from explain2me.train.loop import train_detector
from explain2me.train.study import plan_study, train_missing
from explain2me.train.training import LAST, RESUME


@pytest.mark.slow
def test_two_processes_share_one_training(tmp_path, manifest, capfd):
    lines = manifest.read_text().replace(",test,", ",val,", 1)  # 5 images in two batches, and 4 in one
    (manifest.parent / "nine.csv").write_text(lines)
    config = make_config(manifest.parent / "nine.csv", devices=2, batch_size=4, epochs=2)
    training = one(config, tmp_path, 1)
    train_detector(training)
    assert capfd.readouterr() == ("", "")
    card = json.loads((training.folder / CARD).read_text())
    assert len(card["curve"]) == 2
    splits = all_splits(config)
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
        "from explain2me.config.load import parse_config; from explain2me.train.study import plan_study\n"
        "from explain2me.train.loop import train_detector\n"
        "if __name__ == '__main__':\n"
        "    train_detector(plan_study(parse_config(json.loads(sys.argv[1])), Path(sys.argv[2])).trainings[1])\n"
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
def test_what_one_of_two_processes_raises_is_raised_here(tmp_path, manifest):
    strategies = [{"name": "plain"}]
    config = make_config(manifest, devices=2, batch_size=4, strategies=strategies, optimizer={"learning_rate": 1e30})
    with pytest.raises(DivergedError, match=r"^[^\n]*the loss is not finite in epoch 1[^\n]*$"):
        train_missing(plan_study(config, tmp_path), on_step=lambda *_: None)
    training = one(make_config(manifest, devices=2, batch_size=4), tmp_path / "other")
    (training.folder / LAST).mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        train_detector(training)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["a process is killed", "interrupt"])
def test_no_process_outlives_a_training_of_several(tmp_path, manifest, end):
    training = one(make_config(manifest, devices=2, batch_size=4, epochs=1000), tmp_path)

    def stop() -> None:
        while not (training.folder / RESUME).exists():
            time.sleep(0.01)
        if end == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            multiprocessing.active_children()[0].kill()

    kind, message = (
        (KeyboardInterrupt, None) if end == "interrupt" else (Explain2MeError, "ended by itself .* are kept")
    )
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(kind, match=message):
        train_detector(training)
    thread.join()
    assert not multiprocessing.active_children()
    assert training.epochs_committed() > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_a_training_that_then_continues(tmp_path, manifest, number):
    training = one(make_config(manifest, epochs=2), tmp_path)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        train_detector(training, lambda done, *_: os.kill(os.getpid(), number) if done == 4 else None)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not training.done
    assert training.epochs_committed() == 1
    steps = []
    train_detector(training, lambda *told: steps.append(told[:2]))
    assert training.done
    assert steps == [(4, 6), (5, 6), (6, 6)]


def test_a_device_that_fails_is_not_a_damaged_checkpoint(tmp_path, manifest, monkeypatch):
    training = one(make_config(manifest, epochs=2), tmp_path)
    with pytest.raises(Stop):
        train_detector(training, stop_after(4))

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nand so on")

    with monkeypatch.context() as patch:
        patch.setattr("lightning.fabric.strategies.SingleDeviceStrategy.module_to_device", fail)
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
