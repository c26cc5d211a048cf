"""A planted experiment: two cues in training, one of which is gone in the test. Does guidance do what is claimed of it?

In training a coloured patch in a corner (the shortcut) and a texture inside a known region (the true cue) both tell the
class. In the test the patch has a random colour. Guided detectors are shown the region.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from explain2me.config.load import parse_config
from explain2me.stages.explain import explain_run
from explain2me.stages.measure import measure_run
from explain2me.stages.summarise import summarise_run
from explain2me.train.study import plan_study, train_missing

SIZE, REGION, PATCH = 160, slice(112, 160), slice(0, 96)
SIDE = REGION.stop - REGION.start
COLOURS = {"real": (60, 90, 220), "fake": (220, 90, 60)}
COUNTS = {"train": 120, "test": 60}


def draw(label: str, patch: str, rng: np.random.Generator) -> np.ndarray:
    """Noise, a patch in the upper left corner, and stripes of the class's direction in the region at the lower right."""
    pixels = rng.normal(128, 30, (SIZE, SIZE, 3))
    pixels[PATCH, PATCH] = COLOURS[patch] + rng.normal(0, 10, 3)
    stripes = 45 * np.sign(np.sin(2 * np.pi * (np.arange(SIDE) / 16 + rng.random())))
    pixels[REGION, REGION] += (stripes[:, None] if label == "fake" else stripes[None])[..., None]
    return pixels.clip(0, 255).astype(np.uint8)


def write_images(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    human = np.zeros((SIZE, SIZE), np.float32)
    human[REGION, REGION] = 1
    folder.mkdir()
    np.save(folder / "human.npy", human)
    lines = ["path,label,source,split,salience"]
    for split, count in COUNTS.items():
        for i in range(count):
            label = ("real", "fake")[i % 2]
            patch = label if split == "train" else str(rng.choice(["real", "fake"]))
            Image.fromarray(draw(label, patch, rng)).save(folder / f"{split}{i:03d}.png")
            lines.append(f"{split}{i:03d}.png,{label},{split},{split},{'human.npy' if split == 'train' else ''}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"


@pytest.mark.slow
def test_guided_training_looks_at_the_true_cue_and_the_measures_tell(tmp_path):
    config = parse_config(
        {
            "name": "planted",
            "data": {"manifest": str(write_images(tmp_path / "images")), "split": "test"},
            "training": {
                "architectures": ["timm:test_byobnet"],
                "strategies": [
                    {"name": "plain"},
                    {"name": "guided", "loss": "cyborg", "cam_class": "true", "alpha": 0.3},
                    {"name": "blended", "loss": "cyborg", "cam_class": "true", "alpha": 0.3, "entropy_weight": 0.3},
                ],
                "runs": 5,
                "split": "train",
                "input_size": SIZE,
                "epochs": 20,
                "batch_size": 12,
                "optimizer": {"learning_rate": 0.05, "weight_decay": 1e-4, "schedule": "cosine"},
                "device": "cpu",
                "workers": 2,
            },
            "summary": {"bootstrap": 100},
            "compute": {"device": "cpu", "workers": 2},
        }
    )
    assert train_missing(plan_study(config, tmp_path)) == []
    run = explain_run(plan_study(config, tmp_path).comparison, tmp_path / "run")
    measure_run(run, run.config)
    summarise_run(run, run.config)
    found = {name: figures(run, f"test_byobnet-{name}") for name in ("plain", "guided", "blended")}
    for name, numbers in found.items():
        numbers["focus"] = focus(numbers)
        print(name, {key: round(value, 3) for key, value in numbers.items()})
    plain = found["plain"]
    for guided in (found["guided"], found["blended"]):
        assert guided["in region"] > plain["in region"] + 0.2
        assert guided["auroc"] > plain["auroc"]
        assert guided["stability"] > plain["stability"]
        assert guided["focus"] > plain["focus"]
    # CYBORG compares maps scaled min-max, so it is blind to an even background, which the entropy sees; the blend is not
    assert found["blended"]["entropy"] < min(plain["entropy"], found["guided"]["entropy"])


def focus(numbers: dict[str, float]) -> float:
    """As on the axis of the paper's Fig. 10: the mean of 1 - (salient removed) and (rest removed)."""
    return (1 - numbers["focus_salient"] + numbers["focus_nonsalient"]) / 2


def figures(run, detector: str) -> dict[str, float]:
    """Means over images and runs; ``in region`` is the share of the clean maps' mass on the true cue."""
    maps = run.maps().to_pandas()
    maps = maps[(maps.detector == detector) & (maps.condition == "clean")]
    clean = np.stack(maps["map"]).reshape(-1, 5, 5)
    clean = clean[clean.sum((1, 2)) > 0]
    share = (clean[:, 3:, 3:].sum((1, 2)) / clean.sum((1, 2))).mean()
    rows = run.summary().to_pandas()
    rows = rows[(rows.detector == detector) & (rows.label == "all") & (rows.source == "all")]
    rows = rows[rows.variant.isin(["spatial", "fixed"])]
    numbers = {
        row.condition if row.measure == "focus" else row.measure: row["mean"]
        for _, row in rows.iterrows()
        if row.measure != "resilience" or row.condition == "all"
    }
    performance = run.summary("performance").to_pandas()
    performance = performance[
        (performance.detector == detector) & (performance.condition == "clean") & (performance.run == "all")
    ]
    performance = performance[
        (performance.score == "softmax") & (performance.positives == "all") & (performance.negatives == "all")
    ]
    return {"in region": float(share), "auroc": float(performance.auroc.iloc[0])} | numbers
