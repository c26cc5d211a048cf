"""Two small runs with their reports: an ordinary one, and one whose names are hostile. One run serves many tests."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from explain2me.config.load import load_config
from explain2me.report.material import Material, gather
from explain2me.report.write import KINDS, write_report
from explain2me.run.folder import Run
from explain2me.stages.explain import explain_run
from explain2me.stages.measure import measure_run
from explain2me.stages.summarise import summarise_run

EVIL = [
    '"><img src=x onerror=evil()>',
    "</script><script>evil()</script>",
    "[red]x[/red]",
    "=cmd()|'x'!A1",
    "a$b$%&_{}\\",
]


def _make_run(folder, toml, *, report=True):
    (folder / "config.toml").write_text(toml)
    run = explain_run(load_config(folder / "config.toml"), folder / "run")
    measure_run(run, run.config)
    summarise_run(run, run.config)
    if report:
        write_report(run, run.config)
    return run


@pytest.fixture(scope="session")
def reported(make_once, images, weights, detector_table):
    text = f'name = "tiny"\n{detector_table("first-detector", f"{weights}/seed[01].safetensors")}'
    text += detector_table("second", f"{weights}/seed[12].safetensors")
    text += f'[data]\nmanifest = "{images}"\n[summary]\nbootstrap = 50\n[report]\nimages = 2\n'
    text += '[measures]\nnoise = {levels = [0.05, 0.5]}\nsimilarity = ["ssim", "pearson"]\n'
    text += '[compute]\ndevice = "cpu"\nbatch_size = 8\n'
    return Run(make_once("reported", lambda folder: _make_run(folder, text)) / "run")


@pytest.fixture(scope="session")
def hostile(make_once, weights):
    """A run whose files, sources, labels and detectors have names that would run something somewhere."""

    def fill(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(KINDS, "pdf", lambda figure, stream: None)
            _make_hostile_run(folder, weights)

    return Run(make_once("hostile", fill) / "run")


def _make_hostile_run(folder, weights):
    rng = np.random.default_rng(0)
    lines = ["path,label,source,image_id"]
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        cells = [f"{i}.png", EVIL[i % 2], EVIL[2 + i % 3], f"{EVIL[i % 5]}{i}"]
        lines.append(",".join('"' + cell.replace('"', '""') + '"' for cell in cells))
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    names = [name.replace("/", "|") for name in EVIL[:2]]
    text = f"name = {json.dumps(EVIL[0].replace('/', '|'))}\n[data]\nmanifest = 'manifest.csv'\npositive = {json.dumps(EVIL[0])}\n"
    for i, name in enumerate(names):
        text += f"[[detectors]]\nname = {json.dumps(name)}\narchitecture = 'timm:test_resnet'\ninput_size = 96\n"
        text += f"checkpoints = '{weights}/seed[{i}{i + 1}].safetensors'\n"
    _make_run(folder, text + "[summary]\nbootstrap = 20\n[report]\nimages = 1\n[compute]\ndevice = 'cpu'\n")


@pytest.fixture(scope="session")
def make_run():
    """(folder, TOML text) -> a run with its report, or without it: report=False."""
    return _make_run


@pytest.fixture(scope="session")
def gathered(reported) -> Material:
    """What the report of the ordinary run is made from; not to be changed."""
    material = gather(Run(reported.folder), images_per_measure=2)
    for name in ("measures", "differences", "performance", "quarantine", "precision"):
        getattr(material.tables, name)
    return material


@pytest.fixture
def material(gathered) -> Material:
    """A copy of it that a test may change."""
    tables = copy.copy(gathered.tables)
    for name in ("measures", "differences", "performance", "quarantine", "precision"):
        setattr(tables, name, getattr(gathered.tables, name).copy())
    own = {name: copy.deepcopy(getattr(gathered, name)) for name in ("dead", "dead_of_runs", "one_class", "map_sizes")}
    return dataclasses.replace(gathered, tables=tables, **own)
