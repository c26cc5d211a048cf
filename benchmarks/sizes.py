"""How do time and memory grow: with the images of a run before and beside its forward passes, with its detectors, with its sources?

``python benchmarks/sizes.py rows detectors sources``; needs no data. Each number is of a process of its own.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from memory import _peak
from rich.console import Console
from rich.table import Table

MODELS = 10
"""Models of the run that is planned."""
MOST_INDEXED = 1_000_000
"""Images that are read."""
console = Console(width=100)


def main() -> None:
    """Print a line for each number as it is found, all of them as a table, and as JSON at the end."""
    options = _options()
    if options.child:
        print(json.dumps(STEPS[options.child](Path(options.folder), options.size)))
        return
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="explain2me-sizes-", dir=options.scratch) as scratch:
        for part in options.parts:
            for size in getattr(options, part):
                for step in PARTS[part]:
                    found += measured(part, step, Path(scratch) / f"{part}-{size}", size)
    table = Table(title="time and memory of a process", title_justify="left")
    for name in ("part", "size", "step", "CPU s", "wall s", "peak MiB", "more"):
        table.add_column(name, justify="left" if name in ("part", "step", "more") else "right")
    for row in found:
        numbers = (f"{row['cpu']:.2f}", f"{row['wall']:.2f}", f"{row['mib']:.0f}")
        table.add_row(row["part"], f"{row['size']}", row["step"], *numbers, row["more"])
    console.print(table)
    print(json.dumps(found))


def measured(part: str, step: str, folder: Path, size: int) -> list[dict[str, Any]]:
    """One step in a process of its own, which says how long it took and what it found."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--child", step, "--folder", str(folder), "--size", str(size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        console.print(f"{part} {size} {step}: ended with {done.returncode}")
        return []
    rows = [{"part": part, "size": size, **row} for row in json.loads(done.stdout.splitlines()[-1])]
    for row in rows:
        console.print(
            f"{part} {size} {row['step']}: {row['cpu']:.2f} s CPU, {row['wall']:.2f} s, {row['mib']:.0f} MiB {row['more']}"
        )
    return rows


Rows = list[dict[str, Any]]


@contextlib.contextmanager
def clock(rows: Rows, step: str) -> Iterator[dict[str, Any]]:
    """Add seconds of the processor and of the clock, and the peak of memory so far."""
    row: dict[str, Any] = {"step": step, "more": ""}
    wall, cpu = time.perf_counter(), time.process_time()
    yield row
    rows.append(row | {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall, "mib": _peak()})


# ------------------------------------------------------------------------------------------------------------ rows


def listing(folder: Path, count: int) -> Rows:
    """What ``check`` does without models: a manifest of files that are not there."""
    from explain2me.config.compare import digest
    from explain2me.images.select import list_data, select_images
    from explain2me.stages.check import warnings_of

    lines = (f"{side}/{side}-{i % 2}/{i:08d}.jpg,{side},{side}-{i % 2}" for i in range(count) for side in [_label(i)])
    (folder / "manifest.csv").write_text("\n".join(["path,label,source", *lines]) + "\n")
    config = config_of(str(folder / "manifest.csv"))
    rows: Rows = [_nothing()]
    with clock(rows, "check a manifest"):
        listed = list_data(config.data)
        images, _, _ = select_images(config.data, config.seed, listed)
        digest(images.to_pylist())
        warnings_of(config, [], images, listed)
    return rows


def index(folder: Path, count: int) -> Rows:
    """List a folder of tiny images and read each of them."""
    from explain2me.images.select import list_data, select_images
    from explain2me.stages.index import index_run
    from explain2me.workers import Engine

    if count > MOST_INDEXED:
        return []
    write_images(folder / "images", count)
    config = config_of(str(folder / "images"))
    rows: Rows = [_nothing()]
    with clock(rows, "check a folder"):
        images = select_images(config.data, config.seed, list_data(config.data)).images
    with clock(rows, "index, 8 x 8 pixels"):
        index_run(images, folder / "images", folder / "run", Engine(threads=1), max_pixels=10**8)
    return rows


def write_planned(folder: Path, count: int) -> Rows:
    """A run folder with empty part files for all shards, as after a whole run."""
    from planning import write_run

    from explain2me.run.folder import open_run
    from explain2me.run.plan import plan

    write_run(folder / "planned", count, MODELS)
    for shard in plan(open_run(folder / "planned")):
        path = shard.path(folder / "planned")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return []


def opening(folder: Path, count: int) -> Rows:
    """Open a run, plan it, look at what is there."""
    from explain2me.run.folder import open_run
    from explain2me.run.plan import missing_of, plan

    rows: Rows = [_nothing()]
    with clock(rows, "open, with images.parquet"):
        run = open_run(folder / "planned")
        len(run.image_table)
    with clock(rows, "plan, 10 models") as row:
        shards = plan(run)
        row["more"] = f"{len(shards)} shards"
    with clock(rows, "look at what is there"):
        assert not missing_of(shards, run.folder)
    return rows


def write_images(folder: Path, count: int) -> None:
    """PNG files of 8 x 8 pixels, all different."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / _label(i) / f"source{i % 2}" / f"{i // 1000:04d}" / f"{i:08d}.png"
        if i < 4 or i % 1000 < 4:
            path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)


def _label(i: int) -> str:
    return "real" if i // 2 % 2 else "fake"


# ---------------------------------------------------------------------------------------------- detectors and sources


def write_detectors(folder: Path, count: int) -> Rows:
    """A whole run of ``count`` detectors, 2 runs each, 24 images of two sources; maps are made up."""
    write_maps(folder, num_detectors=count, sources=["gan", "camera"], per_source=12)
    return []


def write_sources(folder: Path, count: int) -> Rows:
    """A whole run of 3 detectors, 2 runs each, 4 images of each of ``count`` sources."""
    write_maps(folder, num_detectors=3, sources=[f"source{i:03d}" for i in range(count)], per_source=4)
    return []


def write_maps(folder: Path, *, num_detectors: int, sources: list[str], per_source: int) -> None:
    """The part files of a run, as if it had explained its images; half of the sources are fake."""
    from report import part

    from explain2me.run.files import write_json, write_parquet
    from explain2me.run.folder import open_run
    from explain2me.run.plan import plan
    from explain2me.stages.begin import begin_run

    _write_sources(folder / "images", sources, per_source)
    config = config_of(str(folder / "images"))
    first = begin_run(config, folder / "run").models[0]
    record = json.loads((folder / "run" / "run.json").read_text())
    names = [f"detector{i:04d}" for i in range(num_detectors)]
    record["config"]["detectors"] = [record["config"]["detectors"][0] | {"name": name} for name in names]
    record["config"]["measures"]["stability"] = True
    record["models"] = [
        first.__dict__ | {"detector": name, "run": f"run{r}", "weights_sha256": f"{d}-{r}"}
        for d, name in enumerate(names)
        for r in range(2)
    ]
    write_json(record, folder / "run" / "run.json")
    run = open_run(folder / "run")
    for shard in plan(run):
        write_parquet(part(run, shard), shard.path(run.folder))


def _write_sources(folder: Path, sources: list[str], per_source: int) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for s, source in enumerate(sources):
        place = folder / ("real" if s % 2 else "fake") / source
        place.mkdir(parents=True)
        for i in range(per_source):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(place / f"{i:03d}.png")


def score(folder: Path, _: int) -> Rows:
    """Stage 2."""
    from explain2me.stages.measure import measure_run

    return _stage(folder, "measure", lambda run: measure_run(run, run.config))


def summarise(folder: Path, _: int) -> Rows:
    """Stage 3."""
    from explain2me.stages.summarise import summarise_run

    rows = _stage(folder, "summarise", lambda run: summarise_run(run, run.config))
    import pyarrow.parquet as pq

    num_rows = pq.read_metadata(folder / "run/summary/differences.parquet").num_rows
    rows[-1]["more"] = f"{num_rows} differences"
    return rows


def report(folder: Path, _: int) -> Rows:
    """Stage 4."""
    from explain2me.report.write import write_report

    rows = _stage(folder, "report", lambda run: write_report(run, run.config))
    place = folder / "run/report"
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    rows[-1]["more"] = f"page {(place / 'index.html').stat().st_size / 1e6:.1f} MB, all {size / 1e6:.0f} MB"
    return rows


def show(folder: Path, _: int) -> Rows:
    """The tables on a terminal."""
    from explain2me.report.terminal import show_run

    text = io.StringIO()
    rows = _stage(folder, "show", lambda run: show_run(run, Console(file=text, width=100)))
    rows[-1]["more"] = f"{text.getvalue().count(chr(10))} lines"
    return rows


def _stage(folder: Path, name: str, work: Callable[[Any], object]) -> Rows:
    from explain2me.run.folder import open_run

    rows: Rows = []
    with clock(rows, name):
        work(open_run(folder / "run"))
    return rows


def config_of(manifest: str) -> Any:
    """One detector with random weights, few conditions."""
    from explain2me.config.load import parse_config

    detector = {"name": "d", "architecture": "timm:test_resnet", "random_runs": 1, "input_size": 32}
    return parse_config(
        {
            "name": "sizes",
            "data": {"manifest": manifest},
            "detectors": [detector],
            "measures": {"stability": False, "resilience": False},
            "compute": {"device": "cpu", "threads": 1, "batch_size": 8},
        }
    )


def _nothing() -> dict[str, Any]:
    """Memory of the process before the work: Python with its imports."""
    return {"step": "(imports)", "more": "", "cpu": 0.0, "wall": 0.0, "mib": _peak()}


PARTS = {
    "rows": ("listing", "index", "write_planned", "opening"),
    "detectors": ("write_detectors", "score", "summarise", "report", "show"),
    "sources": ("write_sources", "score", "summarise", "report", "show"),
}
STEPS: dict[str, Callable[[Path, int], Rows]] = {
    step.__name__: step
    for step in (
        listing, index, write_planned, opening, write_detectors, write_sources, score, summarise, report, show,
    )
}  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), help="rows, detectors, sources; all by default")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--detectors", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--sources", type=int, nargs="+", default=[10, 100, 300])
    parser.add_argument("--scratch", default=os.environ.get("TMPDIR"), help="folder for some gigabytes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
