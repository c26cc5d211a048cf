"""The study of examples/faces-study.toml and the page of its results."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
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
        ("ffhq_1024png", "real", ("test",)),
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
    sets = {"data.manifest": noise / "manifest.csv", "summary.bootstrap": 20}
    for i, detector in enumerate(map("-".join, faces.DETECTORS)):
        sets[f"detectors.{i}.checkpoints"] = study / "training" / detector / "run*" / "best.safetensors"
        sets[f"detectors.{i}.input_size"] = SIZE
    settings = [part for name, value in sets.items() for part in ("--set", f"{name}={value}")]
    every = noise / "every"
    code, _, err = call("run", ROOT / "docs" / "results" / "faces-every.toml", "--out", every, *settings)
    assert code == 0, err
    here = noise / "results"
    here.mkdir()
    (here / "faces.md").write_text(f"before\n{faces.BEGIN}\nto be replaced\n{faces.END}\nafter\n")
    faces.main(study, every, REFERENCE, here=here, guide=noise / "maps")
    text = (here / "faces.md").read_text()
    assert re.fullmatch(rf"before\n{faces.BEGIN}\n.*{faces.END}\nafter\n", text, re.S)
    assert "to be replaced" not in text
    for detector in map("-".join, faces.DETECTORS):
        # guide, Table 1, Table 2, with chance levels, the heads of AUROC and of the calls, two runs
        assert text.count(f"| {detector} |") == 1 + 5 + 1 + 9 + 2 + 2
    for model in faces.ARCHITECTURES:
        assert len(re.findall(rf"\| {model} \| .* (?:significant|agrees|disagrees|published|change) \|\n", text)) == 12
    published = "0.879 ± 0.129 "  # of the paper's Table 1
    assert re.search(rf"\| stability \| resnet50-cyborg \| -?\d\.\d+ ± \d\.\d+ \| {published}\|", text)
    assert "| 0.716 | 0.600 | 0.851 |" in text  # of its Table 2
    compare_with_the_summary(faces, here / "faces")


def compare_with_the_summary(faces: ModuleType, folder: Path) -> None:
    """Where both have a number it is the same, though they come by other ways."""
    runs, measures = pd.read_csv(folder / "runs.csv"), pd.read_csv(folder / "measures.csv")
    runs, measures = (table[table.similarity.isna() | (table.similarity == "ssim")] for table in (runs, measures))
    by = ["detector", "measure", "variant", "group", "source"]
    compared = set()
    for (detector, measure, variant, group, source), part in runs.groupby(by):
        row = measures[(measures.detector == detector) & (measures.measure == measure) & (measures.variant == variant)]
        row = row[(row.condition == group) & (row.source == source) & (row.label != "all")]
        if len(row) and (part.n == part.n.iloc[0]).all():
            assert row["mean"].item() == pytest.approx(part["mean"].mean(), abs=1e-4, nan_ok=True), (measure, group)
            compared.add((measure, group))
    of_table = {(key[0], key[2]) for *_, key in faces.MEASURES.values()} | {
        ("resilience", "shifts"),
        ("resilience", "rotations"),
    }
    assert of_table <= compared
    aurocs, performance = pd.read_csv(folder / "auroc.csv"), pd.read_csv(folder / "performance.csv")
    of_run = performance[(performance.positives == "all") & (performance.negatives == "all")]
    aurocs = aurocs[(aurocs.positives == "all") & (aurocs.run != "mean")]
    assert len(aurocs) == 4 * 2 * 2  # detectors, runs, scores
    for _, row in aurocs.iterrows():
        same = of_run[(of_run.detector == row.detector) & (of_run.run == row.run) & (of_run.score == row.score)]
        assert same[same.condition == "clean"].auroc.item() == pytest.approx(row.auroc)


def test_differences_and_verdicts_by_hand(faces: ModuleType) -> None:
    pairs = pd.DataFrame(
        {"run": ["0", "0", "1"], "other_run": ["1", "2", "2"], "mean": [0.5, 0.7, 0.8], "chance": [0.0, 0.4, 0.5]}
    )
    assert faces.pseudo_values(pairs, "mean") == pytest.approx([0.5 + 0.7 - 0.8, 0.5 + 0.8 - 0.7, 0.7 + 0.8 - 0.5])
    assert faces.pseudo_values(pairs.assign(other_run=""), "mean") == [0.5, 0.7, 0.8]
    mean, low, high = faces.difference([0.1, 0.2, 0.3], [0.4, 0.4, 0.7])
    assert (mean, (high - low) / 2) == pytest.approx((0.3, 4.302653 * 0.1 / 3**0.5))
    assert [faces.verdict(paper, (0.3, 0.1, 0.5)) for paper in (0.2, -0.2, 0.0, None)] == [
        "agrees", "disagrees", "the paper finds no change", "not published",
    ]  # fmt: skip
    assert (
        faces.verdict(0.2, (0.3, -0.1, 0.7))
        == faces.verdict(0.2, (0.3, float("nan"), float("nan")))
        == "not significant"
    )
    source = {"detector": "d", "measure": "noise", "variant": "fixed", "group": "g", "run": "0", "other_run": ""}
    source["similarity"] = "ssim"
    values = {"ffhq": (0.9, 0.2), "stylegan": (0.4, 0.2), "stylegan2": (0.6, 0.4), "ffhq_1024png": (7, 7)}
    runs = pd.DataFrame([source | {"source": name, "mean": m, "chance": c} for name, (m, c) in values.items()])
    found = faces.unit_values(runs, "d", ("noise", "fixed", "g"))
    assert found["mean"].item() == pytest.approx(0.2 * 0.9 + 0.8 * 0.5)
    assert found.corrected.item() == pytest.approx((0.58 - 0.28) / (1 - 0.28))


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the paper's tables are not here: ../shared/reference")
def test_what_the_paper_finds(faces: ModuleType) -> None:
    tables = [faces.read(REFERENCE / f"paper_table{i}.csv") for i in (1, 2)]
    assert faces.published_difference("stability", "resnet50", *tables) == pytest.approx(0.929 - 0.392)
    assert faces.published_difference("flips", "densenet121", *tables) == pytest.approx(0.640 - 0.690)
    assert faces.published_difference("focus, rest blurred", "resnet50", *tables) is None  # not in the paper's table
    assert faces.published_difference("flip_LR", "resnet50", *tables) is None
