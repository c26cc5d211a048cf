"""What a run of millions of images costs before and beside its forward passes: the plan, the look at what is there.

python benchmarks/planning.py [--images 1000000] [--models 10]
"""

import argparse
import hashlib
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from explain2me.config.load import parse_config
from explain2me.run.files import write_parquet
from explain2me.run.folder import open_run
from explain2me.run.plan import missing_of, plan
from explain2me.run.record import Model
from explain2me.run.schema import IMAGES, SCHEMA_VERSION


def main() -> None:
    """Print seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--models", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        child = multiprocessing.get_context("spawn").Process(
            target=write_run, args=(folder, options.images, options.models)
        )
        child.start()  # its memory is not ours
        child.join()
        before = memory()
        started = time.perf_counter()
        run = open_run(folder)
        shards = plan(run)
        planned = time.perf_counter()
        for shard in shards:  # as after a whole run
            path = shard.path(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        touched = time.perf_counter()
        missing = missing_of(shards, folder)
        looked = time.perf_counter()
        assert not missing
        print(f"{options.images} images x {options.models} models = {len(shards)} shards")
        print(f"images.parquet: {(folder / 'images.parquet').stat().st_size / options.images:.0f} bytes an image")
        print(f"plan: {planned - started:.1f} s; look at what is there: {looked - touched:.1f} s")
        print(f"memory: {memory() - before:.0f} MiB more than before")


def memory() -> float:
    """Peak of resident memory, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_run(folder: Path, count: int, models: int) -> None:
    """A run folder without maps."""
    names = [f"fake/gan/{i:08d}.jpg" for i in range(count)]
    columns = {
        "image": range(count),
        "image_id": names,
        "path": names,
        "label": ["fake"] * count,
        "source": ["gan"] * count,
        "width": [224] * count,
        "height": [224] * count,
        "sha256": [hashlib.sha256(name.encode()).hexdigest() for name in names],
    }
    write_parquet(
        pa.table({k: pa.array(v, IMAGES.field(k).type) for k, v in columns.items()}), folder / "images.parquet"
    )
    detector = {"name": "d", "architecture": "timm:resnet50", "random_runs": models}
    compute = {"device": "cpu", "threads": 1}
    config = parse_config({"name": "x", "data": {"manifest": "m"}, "detectors": [detector], "compute": compute})
    rows = [
        Model(
            "d", f"r{i}", "timm:resnet50", None, i, str(i), "l", (224, 224), 2, (0.5,) * 3, (0.5,) * 3, "bicubic"
        ).__dict__
        for i in range(models)
    ]
    record = {"schema": SCHEMA_VERSION, "config": json.loads(config.model_dump_json()), "classes": ["real", "fake"]}
    (folder / "run.json").write_text(json.dumps(record | {"models": rows}))


if __name__ == "__main__":
    main()
