"""Is memory flat in the number of images, and does GradCAM leak?

``python benchmarks/memory.py`` makes its own small JPEG files; each run is a process of its own. Exit code 1 when a
limit is passed.
"""

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ARCHITECTURE = "timm:test_resnet"
INPUT_SIZE = 64
MAX_RATIO = 1.10
MAX_GROWTH = 1.02
console = Console()


def main() -> int:
    """Measure, print the table; 1 when a limit is passed."""
    options = _options()
    if options.child:
        print(json.dumps(_run(options.child) if options.child != "gradcam" else _gradcam(options.batches)))
        return 0
    from bench import make_images  # not in the children: its imports would hide a growth

    few, many = sorted(options.images)
    with tempfile.TemporaryDirectory(prefix="explain2me-memory-") as scratch:
        for count in (few, many):
            make_images(Path(scratch) / str(count), count, side=96)
        runs = {count: _child(f"{scratch}/{count}") for count in (few, many)}
    cam = _child("gradcam", "--batches", str(options.batches))
    ratio = runs[many]["peak_mib"] / runs[few]["peak_mib"]
    growth = cam["rss_mib_end"] / cam["rss_mib_start"]
    tensors = cam["tensors_end"] - cam["tensors_start"]
    table = Table(title=f"memory, {ARCHITECTURE} at {INPUT_SIZE}", title_justify="left")
    for column in ("", "found", "wanted"):
        table.add_column(column)
    for count, run in runs.items():
        table.add_row(
            f"peak of a run of {count} images, two models", f"{run['peak_mib']:.0f} MiB, {run['seconds']:.0f} s", ""
        )
    table.add_row("ratio of the peaks", f"{ratio:.3f}", f"<= {MAX_RATIO}")
    table.add_row(f"GradCAM: memory after {options.batches} batches / after 100", f"{growth:.3f}", f"<= {MAX_GROWTH}")
    table.add_row("GradCAM: live tensors more", str(tensors), "0")
    table.add_row("GradCAM: hooks left", str(cam["hooks"]), "0")
    console.print(table)
    result = {"runs": runs, "ratio": ratio, "gradcam": cam}
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(ratio > MAX_RATIO or growth > MAX_GROWTH or tensors > 0 or cam["hooks"] > 0)


def _run(manifest: str) -> dict[str, float]:
    """A whole run with two models, all measures and all summaries; peak of this process in MiB."""
    import torch

    from explain2me.config.load import parse_config
    from explain2me.stages.explain import explain_run
    from explain2me.stages.measure import measure_run
    from explain2me.stages.summarise import summarise_run

    torch.set_num_threads(1)  # the network is too small for more
    detector = {"name": "tiny", "architecture": ARCHITECTURE, "random_runs": 2, "input_size": INPUT_SIZE}
    tree: dict[str, Any] = {"name": "memory", "data": {"manifest": manifest}, "detectors": [detector]}
    config = parse_config(tree | {"compute": {"device": "cpu"}})
    started = time.perf_counter()
    stages = {"start_mib": _peak()}
    run = explain_run(config, Path(f"{manifest}-run"))
    stages["explain_mib"] = _peak()
    measure_run(run, config)
    stages["measure_mib"] = _peak()
    summarise_run(run, config)
    return stages | {"peak_mib": _peak(), "seconds": time.perf_counter() - started}


def _gradcam(num_batches: int) -> dict[str, float]:
    """Memory and live tensors after 100 batches and at the end, with hooks left on the model."""
    import torch

    from explain2me import GradCAM, load_detector

    torch.set_num_threads(1)
    model = load_detector(ARCHITECTURE, num_classes=2).model
    images = torch.randn(8, 3, INPUT_SIZE, INPUT_SIZE)
    classes = torch.tensor([[0, 1]]).expand(8, 2)
    found: dict[str, float] = {}
    for number in range(num_batches):
        if number == min(100, num_batches // 2):
            found |= {"rss_mib_start": _rss(), "tensors_start": _tensors()}
        with GradCAM(model) as cam:
            cam(images, classes)
    found |= {"rss_mib_end": _rss(), "tensors_end": _tensors()}
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return found | {"hooks": sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)}


def _child(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", *arguments]
    with console.status(f"running {arguments[0]}"):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _peak() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with the size of the parent
        found = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(found.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _rss() -> float:
    gc.collect()
    return psutil.Process(os.getpid()).memory_info().rss / 2**20


def _tensors() -> int:
    import torch

    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, nargs=2, default=(200, 2000), help="images of the two runs")
    parser.add_argument("--batches", type=int, default=1000, help="batches through GradCAM")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
