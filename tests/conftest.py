"""Shared fixtures: a tiny image folder, tiny real networks with checkpoints, and whole small runs.

What takes long is made once in a session, for all test processes; a test that changes it takes a copy.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

if TYPE_CHECKING:
    from explain2me.run.folder import Run

SHARED = Path(__file__).resolve().parents[2] / "shared"
ARCHITECTURE = "timm:test_resnet"
SIZE = 96
LONGEST = ("test_tutorial", "test_kills", "test_crashes", "test_study", "test_toy_rows", "test_pipeline")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background by a shell; some tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first: at the end one worker would do one while the other waits."""
    items.sort(key=lambda item: not any(name in item.nodeid for name in LONGEST))


@pytest.fixture(autouse=True, scope="session")
def _no_wait_for_the_disk() -> Iterator[None]:
    """Replace ``os.fsync`` by nothing: waiting for the disk takes most of some tests. Tests of syncing patch it themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random weights of a test are the same whatever ran before it: some of the others give no live map."""
    torch.manual_seed(1)


def _make_images(folder: Path, *, counts: dict[tuple[str, str], int], size: int = SIZE) -> Path:
    """Write small PNG files and a manifest: fakes carry a bright square, so that nothing is degenerate."""
    rng = np.random.default_rng(0)
    lines = ["path,label,source,split"]
    for (label, source), count in counts.items():
        for i in range(count):
            pixels = rng.integers(0, 160, (size // 8, size // 8, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR)
            if label == "fake":
                left = int(rng.integers(0, size // 2))
                image.paste((250, 240, 230), (left, left, left + size // 4, left + size // 4))
            path = folder / label / source / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            lines.append(f"{label}/{source}/{i:03d}.png,{label},{source},test")
    manifest = folder / "manifest.csv"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Make a folder once for all test processes of a session: (name, fill) -> folder."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        folder, made = shared / name, shared / f"{name}.made"
        with FileLock(shared / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                made.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def images(make_once: MakeOnce) -> Path:
    """Manifest of 26 images: 9 real of one source, 12 and 5 fake of two. Not to be changed: see ``rewrite_manifest``."""
    counts = {("real", "camera"): 9, ("fake", "gan_a"): 12, ("fake", "gan_b"): 5}
    return make_once("images", lambda folder: _make_images(folder, counts=counts)) / "manifest.csv"


@pytest.fixture
def rewrite_manifest(images: Path, tmp_path: Path) -> Callable[..., Path]:
    """Another manifest of the same images: (change of its text, name) -> manifest with absolute paths."""

    def rewrite(change: Callable[[str], str], name: str = "rewritten.csv") -> Path:
        head, *lines = images.read_text().splitlines()
        text = "\n".join([head, *(f"{images.parent}/{line}" for line in lines)]) + "\n"
        (tmp_path / name).write_text(change(text))
        return tmp_path / name

    return rewrite


@pytest.fixture(scope="session")
def weights(make_once: MakeOnce, images: Path) -> Path:
    """Folder with three checkpoints of a small real network, two classes, random features under a balanced head."""
    return make_once("weights", lambda folder: _make_weights(folder, images))


def _make_weights(folder: Path, images: Path) -> None:
    import timm
    from safetensors.torch import save_file

    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = timm.create_model(ARCHITECTURE.partition(":")[2], num_classes=2)
            _balance(model, images)
        save_file(model.state_dict(), folder / f"seed{seed}.safetensors")


def _balance(model: torch.nn.Module, manifest: Path) -> None:
    """Give random features a head whose maps are live for both classes and whose predictions are mixed."""
    paths = sorted(manifest.parent.rglob("*.png"))
    pixels = torch.stack([torch.from_numpy(np.asarray(Image.open(path)).copy()) for path in paths])
    model.eval()
    with torch.no_grad():
        features = model.forward_features((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).mean((0, 2, 3))
        weight = torch.randn(len(features))
        weight -= features * (weight @ features) / (features @ features)
        model.fc.weight.copy_(torch.stack([-weight, weight]))
        model.fc.bias.zero_()


@pytest.fixture(scope="session")
def make_images() -> Callable[..., Path]:
    """Write images and a manifest: (folder, *, counts={(label, source): n}, size) -> manifest."""
    return _make_images


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def command() -> Command:
    """Call the command line in the folder where we are; returns exit code, output and errors."""
    return _command


def _command(*arguments: object) -> tuple[int, str, str]:
    from explain2me import cli

    output, errors = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
        pytest.raises(SystemExit) as stop,
    ):
        patch.setattr(sys, "argv", ["explain2me", *map(str, arguments)])
        cli.main()
    return int(stop.value.code or 0), output.getvalue(), errors.getvalue()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Call the command line in a fresh folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    return _command


WriteConfig = Callable[..., Path]


@pytest.fixture
def write_config(tmp_path: Path, images: Path, weights: Path) -> WriteConfig:
    """Write a TOML file; keyword arguments replace whole tables, ``extra`` is appended."""
    return lambda **tables: _write_config(tmp_path, images, weights, **tables)


def _write_config(folder: Path, images: Path, weights: Path, **tables: str) -> Path:
    parts = {
        "top": 'name = "tiny"\nseed = 7',
        "data": f"manifest = {json.dumps(str(images))}",
        "detectors": _detector_table("a", f"{weights}/seed[01].safetensors"),
        "measures": "",
        "summary": "bootstrap = 50",
        "compute": 'device = "cpu"\nbatch_size = 8\nshard_size = 10',
        "report": "after_run = false",
    } | tables
    text = parts["top"] + "\n" + parts["detectors"] + "\n"
    text += "".join(f"[{name}]\n{parts[name]}\n" for name in ("data", "measures", "summary", "compute", "report"))
    path = folder / "config.toml"
    path.write_text(text + parts.get("extra", ""))
    return path


@pytest.fixture
def no_pdf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the PDF files of figures empty: embedding their fonts takes half of the time of a small report."""
    from explain2me.report.write import KINDS

    monkeypatch.setitem(KINDS, "pdf", lambda figure, stream: None)


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="session")
def finished_folder(make_once: MakeOnce, command: Command, images: Path, weights: Path) -> Path:
    """The run of ``write_config()``, as the command `run` made it, in ``run``; what that printed is in ``output``."""

    def fill(folder: Path) -> None:
        config = _write_config(folder, images, weights)
        code, output, errors = command("run", config, "--out", folder / "run")
        assert (code, errors) == (0, "")
        (folder / "output").write_text(output)

    return make_once("finished", fill)


@pytest.fixture
def finished_run(finished_folder: Path) -> "Run":
    """A run with all tables, two training runs of one detector: to read only."""
    from explain2me import open_run

    return open_run(finished_folder / "run")


@pytest.fixture
def copied_run(finished_folder: Path, tmp_path: Path) -> "Run":
    """A copy of ``finished_run`` to change, where the command line puts the run of ``write_config()``."""
    from explain2me import open_run

    shutil.copytree(finished_folder / "run", tmp_path / "runs" / "tiny")
    return open_run(tmp_path / "runs" / "tiny")


@pytest.fixture(scope="session")
def run_stages() -> Callable[..., "Run"]:
    """Explain, measure and summarise: (config file, folder, *sets) -> run."""
    return _run_stages


def _run_stages(config: Path, folder: Path, *sets: str) -> "Run":
    from explain2me.config.load import load_config
    from explain2me.stages.explain import explain_run
    from explain2me.stages.measure import measure_run
    from explain2me.stages.summarise import summarise_run

    run = explain_run(load_config(config, sets), folder)
    measure_run(run, run.config)
    summarise_run(run, run.config)
    return run


@pytest.fixture(scope="session")
def compared_run(make_once: MakeOnce, images: Path, weights: Path) -> "Run":
    """Two detectors, of two and three training runs, and two similarities: to read only."""
    from explain2me import open_run

    def fill(folder: Path) -> None:
        detectors = _detector_table("a", f"{weights}/seed[01].safetensors")
        detectors += _detector_table("b", f"{weights}/seed[012].safetensors")
        measures = 'similarity = ["ssim", "pearson"]'
        _run_stages(_write_config(folder, images, weights, detectors=detectors, measures=measures), folder / "run")

    return open_run(make_once("compared", fill) / "run")


@pytest.fixture(scope="session")
def bfloat16_run(make_once: MakeOnce, images: Path, weights: Path) -> "Run":
    """Three training runs of one detector in bfloat16: to read only."""
    from explain2me import open_run

    def fill(folder: Path) -> None:
        detectors = _detector_table("a", f"{weights}/seed[012].safetensors")
        compute = 'device = "cpu"\nbatch_size = 8\nprecision = "bfloat16"'
        _run_stages(
            _write_config(folder, images, weights, detectors=detectors, compute=compute, summary="bootstrap = 0"),
            folder / "run",
        )

    return open_run(make_once("bfloat16", fill) / "run")


@pytest.fixture(scope="session")
def detector_table() -> Callable[..., str]:
    """The TOML table of one detector: (name, checkpoints, *, architecture, size) -> text."""
    return _detector_table


def _detector_table(name: str, checkpoints: str, *, architecture: str = ARCHITECTURE, size: int = SIZE) -> str:
    return (
        f'[[detectors]]\nname = {json.dumps(name)}\narchitecture = "{architecture}"\ninput_size = {size}\n'
        f"checkpoints = {json.dumps(checkpoints)}\n"
    )
