"""How fast is a run, beside the bare forward passes that it needs and beside other ways to do the same work.

``python benchmarks/bench.py`` (``make bench``); needs the extra ``cams`` and no data. README.md says what (a) to (e) are.
"""

import argparse
import copy
import functools
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peers
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import explain2me.stages.explain
from explain2me import GradCAM, load_detector, open_run
from explain2me.config.load import parse_config
from explain2me.config.schema import Config
from explain2me.detectors.load import Detector
from explain2me.images.batches import batches
from explain2me.run.conditions import conditions_for, perturb
from explain2me.run.folder import Run
from explain2me.salience.gradcam import predicted_classes
from explain2me.stages.explain import explain_run
from explain2me.stages.measure import measure_run
from explain2me.stages.summarise import summarise_run

ARCHITECTURES = ("torchvision:resnet50", "torchvision:densenet121")
PACKAGES = (
    "explain2me", "torch", "torchvision", "torchcam", "captum", "grad-cam", "scikit-image", "scipy", "numpy", "pillow",
)  # fmt: skip
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
LIMITS = {
    "b/a": "<= 1.15",
    "c/b": ">= 2",
    "c/b bfloat16": ">= 4",
    "fixed, share of (b)": "< 0.02",
}
"""What is wanted, by name of the ratio."""

PAIRS = {
    "b/a": ("b", "a"),
    "c/a": ("c", "a"),
    "c/b": ("c", "b"),
    "c tuned/b": ("c tuned", "b"),
    "b/a bfloat16": ("b bfloat16", "a bfloat16"),
    "c/b bfloat16": ("c", "b bfloat16"),
    "c tuned/b bfloat16": ("c tuned", "b bfloat16"),
}
Seconds = dict[str, float]
console = Console()


def main() -> None:
    """Measure, print the tables, write the JSON file."""
    options = _options()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=UserWarning)  # of the peers
    bfloat16 = _wants_bfloat16(options)
    result: dict[str, Any] = {"machine": machine(), "options": vars(options), "architectures": {}}
    console.print(f"{result['machine']['processor']}, {options.threads} threads, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="explain2me-bench-") as scratch:
        manifest = make_images(Path(scratch) / "images", options.images, side=options.side)
        for architecture in options.architectures:
            found = bench(architecture, manifest, Path(scratch), options, bfloat16=bfloat16)
            result["architectures"][architecture] = found
            print_stages(architecture, found, options)
    result["machine"]["load_after"] = os.getloadavg()[0]
    print_ratios(result["architectures"])
    Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"raw times: {options.json}")


def bench(
    architecture: str, manifest: Path, scratch: Path, options: argparse.Namespace, *, bfloat16: bool
) -> dict[str, Any]:
    """Everything about one architecture: raw seconds, stages and ratios."""
    config = make_config(architecture, manifest, options.batch)
    detector = load_detector(architecture, num_classes=2, seed=config.seed)
    plain = copy.deepcopy(detector.model).eval()
    model = detector.model.eval().to(memory_format=torch.channels_last)
    layer = peers.TARGET_LAYER[architecture]
    num_conditions = len(conditions_for(config.measures, detector.input_size))
    passes = num_conditions * -(-options.images // options.batch)
    inputs = float_batch(options.batch, detector.input_size)
    files = sorted(manifest.glob("*/*/*.jpg"))
    name = architecture.partition(":")[2]
    stages: dict[str, list[Seconds]] = {}
    folders: dict[str, Path] = {}

    def ours(precision: str, where: str) -> None:
        wanted = make_config(architecture, manifest, options.batch, precision)
        folders[where] = _fresh(scratch / f"{name}-{where}")
        stages.setdefault(where, []).append(our_run(wanted, folders[where]))

    def others(where: str, num_images: int, *, tuned: bool) -> None:
        folder = folders[where] = _fresh(scratch / f"{name}-peers")
        found = peers.peer_run(plain, layer, files[:num_images], folder, batch_size=options.batch, tuned=tuned)
        stages.setdefault(where, []).append({stage: s * options.images / num_images for stage, s in found.items()})

    contenders: dict[str, Callable[[], None]] = {
        "a": functools.partial(bare, model, inputs, passes),
        "b": functools.partial(ours, "float32", "b"),
        "c": functools.partial(others, "c", options.peer_images, tuned=False),
        "c tuned": functools.partial(others, "c tuned", options.tuned_images, tuned=True),
    }
    if bfloat16:
        explain2me.stages.explain.PRECISION_IMAGES = 1  # a fixed cost, not one of each image
        contenders["a bfloat16"] = functools.partial(bare, model, inputs, passes, torch.bfloat16)
        contenders["b bfloat16"] = functools.partial(ours, "bfloat16", "b bfloat16")
    warm_up(architecture, model, plain, layer, inputs, scratch / f"{name}-warm")
    wall, cpu = interleave(contenders, options.rounds, what=name)
    for where, num_images in (("c", options.peer_images), ("c tuned", options.tuned_images)):
        for seconds in (wall, cpu):
            seconds[where] = [value * options.images / num_images for value in seconds[where]]
    with GradCAM(model) as cam:
        makers = map_contenders(model, plain, layer, inputs, cam)
        maps, _ = interleave(makers, options.map_rounds, what=f"{name}, one batch of maps")
    heads = head_seconds(model, inputs, repeats=options.map_rounds)
    slow_files = files[:: max(1, len(files) // options.slow_images)][: options.slow_images]
    slow = rebuilt(architecture, plain, layer, slow_files, scratch / f"{name}.pt")
    found: dict[str, Any] = {
        "passes": passes,
        "conditions": num_conditions,
        "seconds": wall,
        "cpu_seconds": cpu,
        "stages": stages,
        "parts": parts(detector, config, files),
        "map_seconds_a_batch": maps,
        "head_seconds_a_batch": heads,
        "e_seconds": slow,
        "b_and_tuned_c_differ_by": differences(folders["b"], folders["c tuned"]),
    }
    return found | {"ratios": ratios(found, options)}


def bare(model: nn.Module, inputs: Tensor, passes: int, dtype: torch.dtype = torch.float32) -> None:
    """(a) The forward passes of a run and nothing else."""
    for _ in range(passes):
        with torch.no_grad(), _autocast(dtype):
            model(inputs)


def our_run(config: Config, folder: Path) -> Seconds:
    """(b) A run from files to summaries; seconds by stage."""
    marks = {"start": time.perf_counter()}

    def on_start(run: Run, num_all: int, num_missing: int) -> None:
        marks["prepare"] = time.perf_counter()

    run = explain_run(config, folder, on_start=on_start)
    marks["explain"] = time.perf_counter()
    measure_run(run, config)
    marks["measure"] = time.perf_counter()
    summarise_run(run, config)
    marks["summarise"] = time.perf_counter()
    names = list(marks)
    return {name: marks[name] - marks[before] for before, name in itertools.pairwise(names)}


def warm_up(architecture: str, model: nn.Module, plain: nn.Module, layer: str, inputs: Tensor, folder: Path) -> None:
    """First calls load code and choose kernels: neither is part of the comparison."""
    bare(model, inputs, 1)
    manifest = make_images(folder / "images", 2, side=64)
    our_run(make_config(architecture, manifest, len(inputs)), folder / "run")
    peers.peer_run(plain, layer, sorted(manifest.glob("*/*/*.jpg")), folder / "peers", batch_size=2, tuned=True)


def map_contenders(
    model: nn.Module, plain: nn.Module, layer: str, inputs: Tensor, cam: GradCAM
) -> dict[str, Callable[[], object]]:
    """(d) The map of one batch: bare forward pass, ours, and the libraries in torch's own layout and in ours."""
    with torch.no_grad():
        classes = model(inputs).argmax(1)
    contiguous = inputs.contiguous()
    cam(inputs)  # finds its layer once

    found: dict[str, Callable[[], object]] = {
        "bare forward": functools.partial(bare, model, inputs, 1),
        "bare forward, default layout": functools.partial(bare, plain, contiguous, 1),
        "explain2me": functools.partial(cam, inputs),
    }
    for library, make in peers.map_makers(plain, layer).items():
        found[f"{library}, default layout"] = functools.partial(make, contiguous, classes)
    for library, make in peers.map_makers(model, layer).items():
        found[library] = functools.partial(make, inputs, classes)
    return found


def head_seconds(model: nn.Module, inputs: Tensor, *, repeats: int) -> dict[str, list[float]]:
    """Seconds from the logits of a batch to its maps, for one class and for two that differ on every image."""
    found: dict[str, list[float]] = {"one class": [], "two classes": []}
    with GradCAM(model) as cam:
        for _, (name, seconds) in ((i, item) for i in range(repeats) for item in found.items()):
            seen = 0.0

            def choose(logits: Tensor, num_classes: int = 1 + (name == "two classes")) -> Tensor:
                nonlocal seen
                first = predicted_classes(logits)
                classes = torch.stack([first, 1 - first][:num_classes], dim=1)
                seen = time.perf_counter()
                return classes

            cam.explain(inputs, choose)
            seconds.append(time.perf_counter() - seen)
    return found


def rebuilt(architecture: str, model: nn.Module, layer: str, files: Sequence[Path], weights: Path) -> Seconds:
    """(e) One image at a time, the model built and its weights read for each; seconds by stage, all images."""
    torch.save(model.state_dict(), weights)

    def rebuild() -> nn.Module:
        fresh = load_detector(architecture, num_classes=2).model
        fresh.load_state_dict(torch.load(weights, weights_only=True))
        return fresh.eval()

    started = time.perf_counter()
    stages = peers.one_at_a_time(rebuild, layer, files)
    return stages | {"all": time.perf_counter() - started}


def differences(ours: Path, theirs: Path) -> dict[str, float]:
    """Largest difference of a score between (b) and the tuned (c), by measure: do both do the same work? Noise is drawn anew."""
    keys = ["image", "variant", "condition"]
    mine = open_run(ours).scores().select([*keys, "measure", "value"]).to_pandas().astype(dict.fromkeys(keys, str))
    mine["condition"] = mine["condition"].str.replace(r"^(shift_.*)@.*", r"\1", regex=True)
    other = pd.read_parquet(theirs / "scores.parquet", columns=[*keys, "value"]).astype(dict.fromkeys(keys, str))
    both = mine.merge(other, on=keys, suffixes=("", "_other"), validate="1:1")
    both["difference"] = (both["value"] - both["value_other"]).abs()
    return {str(name): float(v) for name, v in both.groupby("measure", observed=True)["difference"].max().items()}


def parts(detector: Detector, config: Config, files: Sequence[Path]) -> Seconds:
    """Seconds for all images of what (b) does beside forward passes, each part on its own."""
    clock = peers.Clock()
    conditions = conditions_for(config.measures, detector.input_size)
    names = [path.name for path in files]
    with clock("build the model twice"):
        for _ in range(2):
            load_detector(config.detectors[0].architecture, num_classes=2, seed=config.seed)
    with clock("decode"):
        found = [batch.images for batch in _decoded(files, detector, config)]
    for i, images in enumerate(found):
        maps = torch.rand(len(images), 7, 7, generator=torch.Generator().manual_seed(i))
        with clock("noise, transforms, blur"):
            changed = [
                pixels for _, pixels in perturb(images, conditions, clean_maps=maps, seed=7, ids=names[: len(images)])
            ]
        with clock("preprocess"):
            for pixels in (images, *changed):
                detector.preprocess(pixels)
    return clock.seconds


def ratios(found: Mapping[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """The numbers of the table: medians of per-round ratios."""
    wall, maps, heads = found["seconds"], found["map_seconds_a_batch"], found["head_seconds_a_batch"]
    cpu = found["cpu_seconds"]
    result = {name: _ratio(wall[over], wall[under]) for name, (over, under) in PAIRS.items() if under in wall}
    result |= {
        f"{name}, processor time": _ratio(cpu[over], cpu[under]) for name, (over, under) in list(PAIRS.items())[:4]
    }
    second = statistics.median(_minus(heads["two classes"], heads["one class"])) * found["passes"]
    scores = statistics.median(stages["measure"] for stages in found["stages"]["b"]) / 2
    result["fixed, share of (b)"] = second / statistics.median(wall["b"])
    result["fixed with its scores, share of (b), at most"] = (second + scores) / statistics.median(wall["b"])
    for name in maps:
        if name != "bare forward":
            result[f"map: {name} / bare forward"] = _ratio(maps[name], maps["bare forward"])
    each = [seconds / options.images for seconds in wall["b"]]
    return result | {"e/b, an image": found["e_seconds"]["all"] / options.slow_images / statistics.median(each)}


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, *, what: str
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall-clock and processor seconds of each contender: A B C A B C ..., since machines are shared and drift."""
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, work in contenders.items():
            with console.status(f"{what}: round {number + 1} of {rounds}, {name}"):
                started = time.perf_counter(), time.process_time()
                work()
                wall[name].append(time.perf_counter() - started[0])
                cpu[name].append(time.process_time() - started[1])
    return wall, cpu


def make_images(folder: Path, count: int, *, side: int) -> Path:
    """Smooth random colour images as JPEG of quality 90 under label/source/; returns the folder."""
    generator = np.random.default_rng(7)
    for i in range(count):
        blobs = Image.fromarray(generator.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        grain = generator.normal(0, 4, (side, side, 3))
        pixels = np.asarray(blobs.resize((side, side), Image.Resampling.BICUBIC)) + grain
        label = ("fake/generator", "real/camera")[i >= count / 2]
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / label / f"{i:05d}.jpg", quality=90)
    return folder


def make_config(architecture: str, manifest: Path, batch_size: int, precision: str = "float32") -> Config:
    """The default measures of a run with one model of random weights; stability needs two and is off."""
    detector = {"name": architecture.partition(":")[2], "architecture": architecture, "random_runs": 1}
    return parse_config(
        {
            "name": "bench",
            "data": {"manifest": str(manifest)},
            "detectors": [detector],
            "measures": {"stability": False},
            "compute": {"device": "cpu", "precision": precision, "batch_size": batch_size},
        }
    )


def float_batch(count: int, input_size: tuple[int, int]) -> Tensor:
    """Random preprocessed images (count, 3, H, W), channels last."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 3, *input_size, generator=generator).to(memory_format=torch.channels_last)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    processor, flags = _processor()
    return {
        "processor": processor or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "vector_units": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16"}),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "load_before": os.getloadavg()[0],
    }


def print_stages(architecture: str, found: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Where the time of (b) and (c) goes."""
    table = Table(
        title=f"{architecture}: {options.images} images x {found['conditions']} conditions", title_justify="left"
    )
    for column in ("", "seconds (median)", "share"):
        table.add_column(column, justify="left" if not column else "right")
    wall = {name: statistics.median(seconds) for name, seconds in found["seconds"].items()}
    table.add_row("(a) bare forward passes", f"{wall['a']:.2f}", "")
    _add_stages(table, "(b) explain2me", wall["b"], found["stages"]["b"])
    table.add_row("  inside, on its own", "", "")
    for name, seconds in found["parts"].items():
        table.add_row(f"    {name}", f"{seconds:.2f}", f"{seconds / wall['b']:.1%}")
    for name, title in (("c", "(c) TorchCAM, scikit-image, SciPy"), ("c tuned", "(c) tuned")):
        _add_stages(table, title, wall[name], found["stages"][name])
    slow = found["e_seconds"]
    scaled = [{name: seconds * options.images / options.slow_images for name, seconds in slow.items() if name != "all"}]
    _add_stages(table, "(e) one at a time", slow["all"] * options.images / options.slow_images, scaled)
    console.print(table)
    differ = ", ".join(f"{name} {value:.1g}" for name, value in found["b_and_tuned_c_differ_by"].items())
    console.print(f"scores of (b) and the tuned (c) differ by at most: {differ}")


def print_ratios(architectures: Mapping[str, Mapping[str, Any]]) -> None:
    """One row a ratio, one column an architecture."""
    table = Table(title="ratios (medians over rounds)", title_justify="left")
    table.add_column("")
    for name in architectures:
        table.add_column(name.partition(":")[2], justify="right")
    table.add_column("wanted, ResNet50")
    for name in next(iter(architectures.values()))["ratios"]:
        cells = [f"{found['ratios'][name]:.3f}" for found in architectures.values()]
        table.add_row(name, *cells, LIMITS.get(name, ""))
    console.print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=32, help="images of (a) and (b)")
    parser.add_argument("--peer-images", type=int, default=4, help="images of (c), scaled to --images")
    parser.add_argument(
        "--tuned-images", type=int, help="images of (c) tuned, scaled to --images; default: half of them"
    )
    parser.add_argument("--slow-images", type=int, default=1, help="images of (e)")
    parser.add_argument("--batch", type=int, default=16, help="batch size of all but (e)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of (a), (b), (c)")
    parser.add_argument("--map-rounds", type=int, default=3, help="rounds of (d)")
    parser.add_argument("--side", type=int, default=256, help="side of the JPEG files in pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch; default: all cores")
    parser.add_argument("--only", choices=[name.partition(":")[2] for name in ARCHITECTURES], help="one architecture")
    parser.add_argument("--quick", action="store_true", help="few images, one round")
    parser.add_argument("--bfloat16", action="store_true", help="also bfloat16 where the processor has to emulate it")
    parser.add_argument("--json", default="bench.json", help="file for the raw times")
    options = parser.parse_args()
    if options.quick:
        options.images, options.batch, options.rounds, options.map_rounds, options.peer_images = 8, 4, 1, 1, 2
    options.peer_images = min(options.peer_images, options.images)
    options.tuned_images = min(options.tuned_images or max(2, options.images // 2), options.images)
    options.architectures = [name for name in ARCHITECTURES if options.only is None or name.endswith(options.only)]
    return options


def _wants_bfloat16(options: argparse.Namespace) -> bool:
    _, flags = _processor()
    if options.bfloat16 or flags.intersection(BFLOAT16_FLAGS):
        return True
    console.print(
        "bfloat16 left out: this processor has none (no AVX512-BF16, no AMX) and would emulate it; --bfloat16 asks for it"
    )
    return False


def _processor() -> tuple[str, set[str]]:
    """Name and feature flags, as Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "", set()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return facts.get("model name", ""), set((facts.get("flags") or facts.get("Features") or "").split())


def _decoded(files: Sequence[Path], detector: Detector, config: Config) -> Iterable[Any]:
    size = detector.input_size
    return batches(files, size=size, batch_size=config.compute.batch_size, interpolation=detector.interpolation)


def _autocast(dtype: torch.dtype) -> AbstractContextManager[None]:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def _add_stages(table: Table, title: str, whole: float, rounds: Sequence[Seconds]) -> None:
    table.add_row(title, f"{whole:.2f}", "")
    for name in rounds[0]:
        seconds = statistics.median(stages[name] for stages in rounds)
        table.add_row(f"  {name}", f"{seconds:.2f}", f"{seconds / whole:.1%}")


def _ratio(over: Sequence[float], under: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def _minus(more: Sequence[float], less: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(more, less, strict=True)]


def _fresh(stem: Path) -> Path:
    """A folder name that is not taken."""
    return next(path for i in range(10_000) if not (path := stem.with_name(f"{stem.name}-{i}")).exists())


if __name__ == "__main__":
    main()
