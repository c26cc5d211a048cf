"""How long does the report of a large run take, and how large is its page? 4 detectors x 10 runs x 1,000 images.

``python benchmarks/report.py``. The maps are made up (blobs that move with the image, and with the run by chance) and the
images are smooth random colours; scores and summaries are those that explain2me makes of them.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from bench import make_images

from explain2me.config.load import parse_config
from explain2me.report.write import write_report
from explain2me.run.conditions import conditions_for
from explain2me.run.files import write_json, write_parquet
from explain2me.run.folder import open_run
from explain2me.run.plan import plan
from explain2me.stages.begin import begin_run
from explain2me.stages.measure import measure_run
from explain2me.stages.shards.rows import Batch, Explained, _table
from explain2me.stages.summarise import summarise_run

LIMIT_SECONDS, LIMIT_BYTES = 60, 5_000_000


def main() -> None:
    """Make the run, time its report; exit code 1 when a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--detectors", type=int, default=4)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="explain2me-bench-") as scratch:
        run = make_run(Path(scratch), options.detectors, options.runs, options.images)
        started = time.perf_counter()
        page = write_report(run, run.config)
        seconds, size = time.perf_counter() - started, page.stat().st_size
    print(
        f"report: {seconds:.1f} s (at most {LIMIT_SECONDS}), page: {size / 1e6:.2f} MB (at most {LIMIT_BYTES / 1e6:g})"
    )
    raise SystemExit(seconds > LIMIT_SECONDS or size > LIMIT_BYTES)


def make_run(folder: Path, num_detectors: int, num_runs: int, num_images: int):
    """A whole run folder; its detectors are one small network as far as the plan knows."""
    manifest = make_images(folder / "images", num_images, side=96)
    detectors = [
        {"name": f"resnet50-{i}", "architecture": "timm:test_resnet", "random_runs": 1, "input_size": 224}
        for i in range(num_detectors)
    ]
    config = parse_config(
        {
            "name": "large",
            "data": {"manifest": str(manifest)},
            "detectors": [d | {"name": d["name"]} for d in detectors],
            "measures": {"stability": False},
            "compute": {"device": "cpu"},
        }
    )
    run = begin_run(config, folder / "run")
    record = json.loads((folder / "run" / "run.json").read_text())
    record["config"]["measures"]["stability"] = num_runs > 1
    record["models"] = [
        model.__dict__ | {"run": f"run{r:02d}", "weights_sha256": f"{m}-{r}"}
        for m, model in enumerate(run.models)
        for r in range(num_runs)
    ]
    write_json(record, folder / "run" / "run.json")
    run = open_run(folder / "run")
    for shard in plan(run):
        write_parquet(part(run, shard), shard.path(run.folder))
    measure_run(run, run.config)
    summarise_run(run, run.config)
    return run


def part(run, shard) -> pa.Table:
    """Maps of one shard: a blob whose place depends on the image, the model and a little on the condition."""
    import torch

    count = shard.stop - shard.start
    images = np.arange(shard.start, shard.stop)
    grid = np.arange(7)
    results = {}
    for c, condition in enumerate(conditions_for(run.config.measures, shard.model.input_size)):
        rng = np.random.default_rng([c, int(shard.model.weights_sha256.replace("-", ""))])
        places = np.random.default_rng(1).random((len(run.image_table), 2))[images] * 6 + rng.normal(0, 0.7, (count, 2))
        rows = np.exp(-((grid - places[:, :1]) ** 2) / 3)
        columns = np.exp(-((grid - places[:, 1:]) ** 2) / 3)
        maps = torch.from_numpy(
            (rows[:, :, None] * columns[:, None] + 0.02 * rng.random((count, 7, 7))).astype(np.float32)
        )
        labels = torch.tensor([run.classes.index(x) for x in run.image_table["label"].to_pylist()])[images]
        logits = torch.from_numpy(rng.normal(0, 1, (count, 2)).astype(np.float32))
        logits[torch.arange(count), labels] += 0.7
        classes = torch.stack([logits.argmax(1), labels], dim=1)
        batch = Batch(torch.from_numpy(images), torch.empty(0), [], labels, torch.ones(count, dtype=torch.bool))
        explained = Explained(maps, maps, classes, logits, torch.ones(count, dtype=torch.bool))
        results[condition] = [(batch, explained)]
    return _table(replace(shard.model), results)


if __name__ == "__main__":
    main()
