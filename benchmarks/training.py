"""What does a step of training cost beside the same bare loop in PyTorch, and what does guidance add?

``python benchmarks/training.py`` (``make bench``); needs no data. Bare: forward, cross-entropy, backward and optimiser on
a batch that is ready. Ours: a step of ``explain2me train``, from files to the logged numbers, in memory after the first
epoch; with cross-entropy, with CYBORG (a human map for each image), and with low entropy of the map.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from bench import machine, make_images
from rich.console import Console
from rich.table import Table

from explain2me import load_detector
from explain2me.config.load import parse_config
from explain2me.train.loop import train_detector
from explain2me.train.study import plan_study

STRATEGIES = {
    "cross-entropy": {},
    "cyborg": {"loss": "cyborg"},
    "low entropy": {"entropy_weight": 0.1},
}
WANTED = {
    "cross-entropy / bare": "<= 1.10",
    "cyborg / cross-entropy": "<= 1.10",
    "low entropy / cross-entropy": "<= 1.10",
}
console = Console()


def main() -> None:
    """Measure, print the table, write the JSON file."""
    options = _options()
    torch.set_num_threads(options.threads)
    result = {"machine": machine(), "options": vars(options), "seconds_a_step": {}, "ratios": {}}
    table = Table(title="a step of training (medians over rounds)", title_justify="left")
    for name in ("architecture", "ratio", "found", "wanted"):
        table.add_column(name)
    for architecture in options.architectures:
        seconds = measure(architecture, options)
        result["seconds_a_step"][architecture] = seconds
        found = result["ratios"][architecture] = {
            "cross-entropy / bare": ratio(seconds, "cross-entropy", "bare"),
            **{f"{name} / cross-entropy": ratio(seconds, name, "cross-entropy") for name in list(STRATEGIES)[1:]},
        }
        for name, value in found.items():
            table.add_row(architecture, name, f"{value:.3f}", WANTED[name])
    console.print(table)
    result["machine"]["load_after"] = os.getloadavg()[0]
    Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def measure(architecture: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Median seconds of a step, by contender and round; contenders take turns."""
    found: dict[str, list[float]] = {name: [] for name in ("bare", *STRATEGIES)}
    with tempfile.TemporaryDirectory(prefix="explain2me-bench-") as scratch:
        manifest = write_manifest(Path(scratch), options.batch * options.steps)
        for number in range(options.rounds):
            for name in found:
                with console.status(f"{architecture}: round {number + 1} of {options.rounds}, {name}"):
                    if name == "bare":
                        found[name].append(bare(architecture, options))
                    else:
                        folder = Path(scratch) / f"{name}{number}"
                        found[name].append(ours(architecture, name, manifest, folder, options))
    return found


def bare(architecture: str, options: argparse.Namespace) -> float:
    """Median seconds of a step in plain PyTorch."""
    model = load_detector(architecture, num_classes=2, seed=7).model.to(options.device)
    model = model.to(memory_format=torch.channels_last).train()
    torch.backends.cudnn.benchmark = options.device == "cuda"  # as in our training
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    inputs = torch.randn(options.batch, 3, 224, 224, device=options.device).to(memory_format=torch.channels_last)
    labels = torch.arange(options.batch, device=options.device) % 2
    times = []
    for step in range(1 + options.steps):
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bfloat16"):
            loss = F.cross_entropy(model(inputs).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(now(options, wait=step in (0, options.steps)))
    return per_step(times, options)


def ours(architecture: str, name: str, manifest: Path, folder: Path, options: argparse.Namespace) -> float:
    """Median seconds of a step of the second epoch, when the images are in memory."""
    config = parse_config(
        {
            "name": "bench",
            "data": {"manifest": str(manifest), "split": "test"},
            "training": {
                "architectures": [architecture],
                "strategies": [{"name": name.replace(" ", "-")} | STRATEGIES[name]],
                "split": "train",
                "epochs": 2,
                "batch_size": options.batch,
                "precision": options.precision,
                "device": options.device,
                "augmentation": {"flip": True, "crop": 0.7},
            },
        }
    )
    times: list[float] = []

    def on_step(done: int, total: int, text: str) -> None:
        times.append(now(options, wait=done in (options.steps + 1, total)))

    train_detector(plan_study(config, folder).trainings[0], on_step)
    return per_step(times[options.steps :], options)


def now(options: argparse.Namespace, *, wait: bool) -> float:
    """Seconds; a GPU is waited for at the ends only, so that what waits for it in between is seen."""
    if options.device == "cuda" and wait:
        torch.cuda.synchronize()
    return time.perf_counter()


def per_step(times: list[float], options: argparse.Namespace) -> float:
    """Median seconds of a step; on a GPU their mean, since steps are queued there."""
    steps = np.diff(times)
    return float(np.mean(steps) if options.device == "cuda" else np.median(steps))


def write_manifest(folder: Path, count: int) -> Path:
    """Smooth random images with a human map each, and one image to test."""
    make_images(folder, count + 2, side=224)
    files = sorted(folder.glob("*/*/*.jpg"))
    human = np.random.default_rng(0).random((224, 224), dtype=np.float32)
    np.save(folder / "human.npy", human)
    lines = ["path,label,source,split,salience"]
    for i, path in enumerate(files):
        where = path.relative_to(folder).as_posix()
        split = "train" if 0 < i < len(files) - 1 else "test"
        lines.append(f"{where},{path.parts[-3]},{path.parts[-2]},{split},human.npy")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "manifest.csv"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architectures", nargs="+", default=["torchvision:resnet50", "torchvision:densenet121"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", default="bench-training.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
