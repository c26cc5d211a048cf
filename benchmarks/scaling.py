"""What sharing the work costs: two workers against one, shards, and engines. Ratios and seconds of one machine.

python benchmarks/scaling.py [--images 64] [--rounds 2] [--no-ray]
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from explain2me.config.load import load_config
from explain2me.config.schema import Config
from explain2me.run.plan import plan
from explain2me.stages.explain import explain_run
from explain2me.stages.shards.commit import commit_shard
from explain2me.workers import Engine, run_tasks


def main() -> None:
    """Print everything as it is found, and all of it as JSON at the end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--architecture", default="torchvision:resnet18")
    parser.add_argument("--no-ray", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["explain2me.stages.explain"])
    forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        found = two_workers(folder, options) | shards(folder) | engines(folder, ray=not options.no_ray)
    print(json.dumps(found, indent=1))


def write_images(folder: Path, count: int, size: int) -> None:
    """JPEG files of noise, half of them of each label."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("real" if i % 2 else "fake") / "noise" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(path)


def config_of(folder: Path, name: str, architecture: str, size: int, measures: str, **compute: object) -> Config:
    """One detector with random weights over the images of ``folder``/name."""
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in compute.items())
    path = folder / f"{name}.toml"
    path.write_text(
        f'name = "{name}"\n[data]\nmanifest = "{name}"\n[[detectors]]\nname = "a"\narchitecture = "{architecture}"\n'
        f"random_runs = 1\ninput_size = {size}\n[measures]\nstability = false\n{measures}\n"
        f'[compute]\ndevice = "cpu"\nthreads = 1\n{lines}\n'
    )
    return load_config(path)


def two_workers(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """One thread each; rounds alternate, the fastest counts."""
    write_images(folder / "scaling", options.images, 224)
    config = config_of(folder, "scaling", options.architecture, 224, "", batch_size=8, shard_size=8)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    list(run_tasks(_nothing, ["a", "b"], Engine(workers=2)))  # the server of the workers has its imports done
    for i in range(options.rounds):
        for workers, times in seconds.items():
            started = time.perf_counter()
            compute = config.compute.model_copy(update={"workers": workers})
            explain_run(config.model_copy(update={"compute": compute}), folder / f"run-{i}-{workers}")
            times.append(time.perf_counter() - started)
            print(f"{workers} worker(s): {times[-1]:.2f} s", flush=True)
    ratio = min(seconds[1]) / min(seconds[2])
    print(f"two workers against one: {ratio:.2f}x")
    return {"seconds_by_workers": seconds, "two_workers_speedup": ratio}


def _nothing(task: str) -> None:
    """An empty task."""


def shards(folder: Path) -> dict[str, float]:
    """What a shard costs beyond its forward passes: tiny images, a tiny network, one condition."""
    count = 1000
    write_images(folder / "many", count, 32)
    measures = "noise = false\nresilience = false\nfocus = false"
    seconds = {}
    for size in (count, 1):
        config = config_of(folder, "many", "timm:test_resnet", 32, measures, batch_size=1, shard_size=size)
        run = folder / f"many-{size}"
        started = time.perf_counter()
        opened = explain_run(config, run)
        seconds[size] = time.perf_counter() - started
    each = (seconds[1] - seconds[count]) / (count - 1)
    print(f"1,000 shards of one image against one of 1,000: {each * 1000:.2f} ms a shard more")
    for path in (folder / "many").rglob("*.jpg"):
        path.unlink()
    empty = plan(opened)[:100]
    for shard in empty:
        shard.path(opened.folder).unlink()
    started = time.perf_counter()
    for shard in empty:
        commit_shard(opened.folder, shard)
    nothing = (time.perf_counter() - started) / len(empty)
    print(f"a shard without a usable image: {nothing * 1000:.2f} ms")
    return {"ms_for_each_of_1000_shards": each * 1000, "ms_for_an_empty_shard": nothing * 1000}


def engines(folder: Path, *, ray: bool) -> dict[str, float]:
    """Empty tasks through each engine: the start, and each task."""
    found = {}
    kinds = {"local, this process": Engine(), "local, 2 workers": Engine(workers=2)}
    if ray:
        kinds["ray, 2 workers"] = Engine("ray", workers=2, threads=1)
    for name, engine in kinds.items():
        started = time.perf_counter()
        ends = [time.perf_counter() for _ in run_tasks(_nothing, [str(i) for i in range(1000)], engine)]
        start, each = ends[0] - started, (ends[-1] - ends[99]) / 900
        print(f"{name}: start {start:.2f} s, then {each * 1000:.2f} ms a task")
        found |= {f"{name}: start s": start, f"{name}: ms a task": each * 1000}
    return found


if __name__ == "__main__":
    main()
