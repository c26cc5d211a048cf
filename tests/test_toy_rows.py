"""A new measure and a new method need one file and one row: the command line then does the rest."""

import subprocess
import sys
from pathlib import Path

import pytest

REPORT_IS_DERIVED = False
"""Whether the report reads the table of measures. If so, a new measure goes through `run`, `show` and `report`, too."""
STAGES = (("check", "CONFIG"), ("explain", "CONFIG", "--out", "RUN"), ("measure", "RUN"), ("summarise", "RUN"))
WITH_REPORT = (("check", "CONFIG"), ("run", "CONFIG", "--out", "RUN"), ("report", "RUN"), ("show", "RUN"))

PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
{rows}
from explain2me.cli import main

for command in {commands}:
    sys.argv = ["explain2me", *({{"CONFIG": {config!r}, "RUN": {out!r}}}.get(word, word) for word in command)]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (command, stop.code)

import numpy as np
import pyarrow.compute as pc
from explain2me import open_run
run = open_run({out!r})
maps = run.maps().filter(pc.equal(run.maps()["condition"].cast("string"), "clean"))
scores, summary, differences = run.scores().to_pandas(), run.summary().to_pandas(), run.summary("differences").to_pandas()
"""

MEASURE_FILE = """
import torch

def peak(maps, estimator):
    return maps.amax((1, 2)) / maps.sum((1, 2)).clamp_min(1e-12)

def overlap(maps, other_maps, kind, input_size, *, similarity):
    return torch.minimum(maps, other_maps).sum((1, 2)) / torch.maximum(maps, other_maps).sum((1, 2))
"""

METHOD_FILE = """
import torch

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

MEASURE_ROW = """
from explain2me.statistics.scores import CLEAN, MEASURES, VARIANTS, Measure, Score
MEASURES["toy"] = Measure(
    name="toy", title="Toy", question="How high?", meaning="Higher is higher.", of={of!r}, function="toy:{function}",
    variants={variants}, scores=(Score("toy", "toy", {condition!r}, higher_is_better=True),), {more}
)
"""

METHOD_ROW = """
from explain2me.salience.methods import METHODS, Method
METHODS["toy"] = Method("toy", "Toy", "toy:Brightness", 1, False, "nobody")
"""

OFF = "entropy = false\nnoise = false\nresilience = false\nfocus = false\nstability = false"
ONLY_SCORES = """
assert set(scores.measure) == set(summary.measure) == {"toy"}
assert scores.value.between(0, 1).all() and set(scores.variant) == set(summary.variant) == set(differences.variant) - {
    "softmax", "released"}
assert set(differences[differences.measure == "toy"].detector) == {"a"}
"""
KINDS = {
    "map": (
        {"of": "map", "function": "peak", "variants": "('largest',)", "condition": "clean", "more": ""},
        "toy = true",
        ONLY_SCORES + "cells = np.stack(maps['map'].to_numpy())\n"
        "assert np.allclose(sorted(scores.value), sorted(cells.max(1) / cells.sum(1)))\n"
        "assert scores.chance.isna().all()\n",
    ),
    "perturbation": (
        {
            "of": "perturbation",
            "function": "overlap",
            "variants": "VARIANTS",
            "condition": "level",
            "more": "perturbation='corruption'",
        },
        "toy = {kind = 'gaussian', levels = [0.05]}\nnoise = {kind = 'gaussian', levels = [0.05, 0.1]}",
        "assert set(scores.measure) == set(summary.measure) == {'noise', 'toy'}\n"
        "assert set(scores.condition[scores.measure == 'toy']) == {'gaussian@0.05'}\n"
        "assert set(summary.condition[summary.measure == 'noise']) == {'gaussian@0.05', 'gaussian@0.1'}\n"
        "assert summary.chance[summary.measure == 'toy'].between(0, 1).all()\n"
        "assert len(run.maps()) == 3 * len(maps)\n",
    ),
    "pairs": (
        {"of": "pairs", "function": "overlap", "variants": "VARIANTS", "condition": "clean", "more": ""},
        "toy = true",
        ONLY_SCORES + "assert set(scores.run) == {'seed0', 'seed1'} and set(scores.other_run) == {'seed1', 'seed2'}\n"
        "matrix = run.summary('toy_matrix').to_pandas()\n"
        "assert set(zip(matrix.detector, matrix.run)) == {('a', 'seed0'), ('a', 'seed1'), ('b', 'seed1'), ('b', 'seed2')}\n",
    ),
}


def run_program(tmp_path: Path, file: str, rows: str, config: Path, checks: str, *, commands) -> None:
    (tmp_path / "toy.py").write_text(file)
    settings = {"folder": str(tmp_path), "config": str(config), "out": str(tmp_path / "run"), "rows": rows}
    program = PROGRAM.format(commands=commands, **settings) + checks
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def two_detectors(detector_table, weights: Path) -> str:
    return detector_table("a", f"{weights}/seed[01].safetensors") + detector_table(
        "b", f"{weights}/seed[12].safetensors"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_measure_is_one_file_and_one_row(kind, tmp_path, write_config, weights, detector_table) -> None:
    row, settings, checks = KINDS[kind]
    off = "\n".join(line for line in OFF.splitlines() if line.split(" =")[0] not in fields_of(settings))
    config = write_config(detectors=two_detectors(detector_table, weights), measures=f"{off}\n{settings}")
    commands = WITH_REPORT if REPORT_IS_DERIVED else STAGES
    run_program(tmp_path, MEASURE_FILE, MEASURE_ROW.format(**row), config, checks, commands=commands)


def fields_of(settings: str) -> set[str]:
    return {line.split(" =")[0] for line in settings.splitlines()}


def test_a_new_method_is_one_file_and_one_row(tmp_path, write_config, weights, detector_table) -> None:
    measures = "noise = false\nresilience = false\nfocus = false"
    extra = '[salience]\nmethod = "toy"'
    config = write_config(detectors=two_detectors(detector_table, weights), measures=measures, extra=extra)
    checks = (
        "assert {model.layer for model in run.models} == {'input'}\n"
        "assert len(maps['map'][0]) == 16 and set(scores.measure) == {'entropy', 'stability'}\n"
        "assert np.isclose(summary['mean'][(summary.measure == 'stability')], 1).all()\n"
        "assert len(differences)\n"
    )
    run_program(tmp_path, METHOD_FILE, METHOD_ROW, config, checks, commands=WITH_REPORT)
