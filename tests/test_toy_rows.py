"""A new measure and a new method need one file and one row: the command line then does the rest."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

FILE = """
import torch

def peak(maps, estimator):
    return maps.amax((1, 2)) / maps.sum((1, 2)).clamp_min(1e-12)

def overlap(maps, other_maps, kind, input_size, *, similarity):
    return torch.minimum(maps, other_maps).sum((1, 2)) / torch.maximum(maps, other_maps).sum((1, 2))

class Brightness:
    def __init__(self, model, layer):
        self.model, self.layer = model, "input"

    def __enter__(self):
        self.model.eval()
        return self

    def __exit__(self, *error):
        pass

    @torch.no_grad()
    def explain(self, images, choose):
        logits = self.model(images)
        maps = torch.nn.functional.adaptive_avg_pool2d(images.mean(1), 4) + 2
        return maps[:, None].expand(-1, choose(logits).shape[1], -1, -1), logits
"""

PROGRAM = """
import json, sys
folder = sys.argv[1]
sys.path.insert(0, folder)
from explain2me.salience.methods import METHODS, Method
from explain2me.statistics.scores import MEASURES, VARIANTS, Measure, Score

def add(name, of, function, variants, condition, **more):
    scores = (Score(name, name, condition, higher_is_better=True),)
    words = dict(title=name, question="How high?", meaning="Higher is higher.")
    MEASURES[name] = Measure(
        name=name, of=of, function=f"toy:{function}", variants=variants, scores=scores, **words, **more
    )

add("toy_map", "map", "peak", ("largest",), "clean")
add("toy_level", "perturbation", "overlap", VARIANTS, "level", perturbation="corruption")
add("toy_pairs", "pairs", "overlap", VARIANTS, "clean")
METHODS["toy"] = Method("toy", "Toy", "toy:Brightness", 1, False, "nobody")

from explain2me.cli import main
config, out = f"{folder}/config.toml", f"{folder}/run"
for command in (["check", config], ["run", config, "--out", out], ["show", out]):
    sys.argv = ["explain2me", *command]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (command, stop.code)

from explain2me import open_run
run = open_run(out)
tables = {"scores": run.scores(), "maps": run.maps(), "summary": run.summary()}
tables |= {name: run.summary(name) for name in ("differences", "toy_pairs_matrix")}
for name, table in tables.items():
    table.to_pandas().to_pickle(f"{folder}/{name}.pickle")
print(json.dumps([model.layer for model in run.models]))
"""

MEASURES = """
resilience = false
focus = false
noise = {kind = 'gaussian', levels = [0.05, 0.1]}
toy_map = true
toy_level = {kind = 'gaussian', levels = [0.05]}
toy_pairs = true
"""


class Toys(NamedTuple):
    """What the run with the new rows holds."""

    scores: pd.DataFrame
    maps: pd.DataFrame
    summary: pd.DataFrame
    differences: pd.DataFrame
    matrix: pd.DataFrame
    layers: list[str]

    def of(self, measure: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        """Scores, summary and differences of one measure; what holds for every new measure is checked."""
        rows = tuple(table[table.measure == measure] for table in (self.scores, self.summary, self.differences))
        scores, summary, differences = rows
        assert scores.value.between(0, 1).all()
        assert set(scores.variant) == set(summary.variant) == set(differences.variant)
        assert set(differences.detector) == {"a"}
        return scores, summary, differences


@pytest.fixture(scope="session")
def toys(make_once, images, weights, detector_table) -> Toys:
    """A process of its own, which has three more measures and one more method in its tables."""

    def fill(folder: Path) -> None:
        (folder / "toy.py").write_text(FILE)
        detectors = "".join(
            detector_table(n, f"{weights}/seed[{s}].safetensors") for n, s in (("a", "01"), ("b", "12"))
        )
        (folder / "config.toml").write_text(
            f'name = "toys"\n{detectors}[data]\nmanifest = "{images}"\n[measures]{MEASURES}[salience]\nmethod = "toy"\n'
            '[summary]\nbootstrap = 10\n[compute]\ndevice = "cpu"\n[report]\nafter_run = false\nimages = 1\n'
        )
        command = [sys.executable, "-c", PROGRAM, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (folder / "layers.json").write_text(done.stdout.splitlines()[-1])

    folder = make_once("toy-rows", fill)
    names = ("scores", "maps", "summary", "differences", "toy_pairs_matrix")
    tables = [pd.read_pickle(folder / f"{name}.pickle") for name in names]
    return Toys(*tables, layers=json.loads((folder / "layers.json").read_text()))


def test_a_new_measure_of_single_maps_is_one_file_and_one_row(toys: Toys) -> None:
    scores, _, _ = toys.of("toy_map")
    cells = np.stack(toys.maps[toys.maps.condition == "clean"]["map"].to_numpy())
    np.testing.assert_allclose(sorted(scores.value), sorted(cells.max(1) / cells.sum(1)), rtol=1e-6)
    assert scores.chance.isna().all()


def test_a_new_measure_of_a_perturbation_is_one_file_and_one_row(toys: Toys) -> None:
    scores, summary, _ = toys.of("toy_level")
    assert set(scores.condition) == {"gaussian@0.05"}
    assert set(toys.summary.condition[toys.summary.measure == "noise"]) == {"gaussian@0.05", "gaussian@0.1"}
    assert summary.chance.between(0, 1).all()
    assert len(toys.maps) == 3 * (toys.maps.condition == "clean").sum()  # a condition of two measures is made once


def test_a_new_measure_of_pairs_of_runs_is_one_file_and_one_row(toys: Toys) -> None:
    scores, _, _ = toys.of("toy_pairs")
    assert set(scores.run) == {"seed0", "seed1"}
    assert set(scores.other_run) == {"seed1", "seed2"}
    pairs = {("a", "seed0"), ("a", "seed1"), ("b", "seed1"), ("b", "seed2")}
    assert set(zip(toys.matrix.detector, toys.matrix.run, strict=True)) == pairs


def test_a_new_method_is_one_file_and_one_row(toys: Toys) -> None:
    assert set(toys.layers) == {"input"}
    assert len(toys.maps["map"].iloc[0]) == 16
    assert {"entropy", "noise", "stability"} <= set(toys.scores.measure)
    assert np.isclose(toys.summary["mean"][toys.summary.measure == "stability"], 1).all()
    assert len(toys.differences)
