"""The study of examples/faces-study.toml and the page of its results."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "examples" / "faces-study.toml"
REFERENCE = ROOT.parent / "shared" / "reference"
SIZE = 64


@pytest.fixture(scope="module")
def faces() -> ModuleType:
    """docs/results/faces.py."""
    spec = importlib.util.spec_from_file_location("faces", ROOT / "docs" / "results" / "faces.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """Noise under the names of the faces' sources, and a map to guide by."""
    rng = np.random.default_rng(0)
    lines = "path,label,source,split\n"
    for source, label, splits in (
        ("ffhq", "real", ("train", "val", "test")),
        ("stylegan", "fake", ("train", "val", "test")),
        ("stylegan2", "fake", ("test",)),
    ):
        for split in splits:
            for i in range(4):
                name = f"{source}-{split}-{i}.png"
                Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)).save(tmp_path / name)
                lines += f"{name},{label},{source},{split}\n"
    (tmp_path / "manifest.csv").write_text(lines)
    (tmp_path / "maps").mkdir()
    Image.fromarray(rng.integers(0, 255, (SIZE, SIZE), dtype=np.uint8)).save(tmp_path / "maps" / "one.png")
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the paper's tables are not here: ../shared/reference")
def test_a_small_study_becomes_the_tables_of_the_page(noise: Path, faces: ModuleType, call) -> None:
    study = noise / "study"
    small = {
        "data.manifest": noise / "manifest.csv",
        "data.sample": 4,
        "training.strategies.1.salience": f"mean-of:{noise / 'maps'}",
        "training.runs": 2,
        "training.epochs": 1,
        "training.batch_size": 4,
        "training.input_size": SIZE,
    }
    settings = [part for name, value in small.items() for part in ("--set", f"{name}={value}")]
    code, _, err = call("study", CONFIG, "--out", study, *settings)
    assert code == 0, err
    here = noise / "results"
    here.mkdir()
    (here / "faces.md").write_text(f"before\n{faces.BEGIN}\nold\n{faces.END}\nafter\n")
    faces.main(study, REFERENCE, here)
    text = (here / "faces.md").read_text()
    assert re.fullmatch(rf"before\n{faces.BEGIN}\n.*{faces.END}\nafter\n", text, re.S)
    assert "old" not in text
    for model, training in faces.DETECTORS:
        detector = f"{model}-{training}"
        assert text.count(f"| {detector} |") == 5 + 6 + 1 + 2  # measures; with chance levels; transforms; its two runs
    rows = faces.read(here / "faces" / "measures.csv")
    row = faces.find(rows, "resnet50-cyborg", ("stability", "predicted", "ssim", "clean"), "real")
    published = "0.879 ± 0.129 "  # of the paper's Table 1
    assert f"| stability | resnet50-cyborg | {faces.mean_std(row)} | {published}|" in text
    assert "| 0.716 | 0.600 | 0.851 |" in text  # of its Table 2
    pairs = [("paper: all", "all"), ("all", "all"), ("stylegan", "all"), ("stylegan2", "all"), ("all", "ffhq")]
    assert re.findall(r"^\| (.*) fakes \| (.*) reals \|", text, re.M) == pairs
