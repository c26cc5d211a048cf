"""Trainings of a tiny real network, for the tests of what trains: configs, interrupts, and counts of opened files."""

import contextlib
import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from explain2me.config.load import parse_config
from explain2me.config.schema import Config
from explain2me.train.data import Splits, read_splits
from explain2me.train.loop import Network
from explain2me.train.study import plan_study
from explain2me.train.training import Training

ARCHITECTURE = "timm:test_resnet"
SIZE = 64
PLAIN = ({"name": "plain"},)


class Stop(Exception):
    """Stands for a kill."""


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


def one(config: Config, out: Path, index: int = 0) -> Training:
    return plan_study(config, out).trainings[index]


def all_splits(config: Config, index: Path | None = None) -> Splits:
    return read_splits(plan_study(config, Path()).listed, config.data.max_pixels, index)


def stop_after(steps: int) -> Callable[[int, int, str], None]:
    def on_step(done: int, total: int, text: str) -> None:
        if done == steps:
            raise Stop

    return on_step


def spoil_the_weights() -> None:
    """Make the weights of every training under way in this process NaN."""
    for thing in gc.get_objects():
        if type(thing) is Network:
            next(thing.model.parameters()).data.fill_(float("nan"))


@contextlib.contextmanager
def opened_files(folder: Path) -> Iterator[Counter[str]]:
    """Count how often this process opens each file below a folder."""
    counts: Counter[str] = Counter()
    active = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:  # Python cannot remove it
        if active and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.fsdecode(arguments[0])
            if path.startswith(f"{folder}/"):
                counts[path.removeprefix(f"{folder}/")] += 1

    sys.addaudithook(hook)
    try:
        yield counts
    finally:
        active = False
