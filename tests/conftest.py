"""Shared fixtures: a tiny image folder, tiny real networks with checkpoints, and a whole small run."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SHARED = Path(__file__).resolve().parents[2] / "shared"
ARCHITECTURE = "timm:test_resnet"
SIZE = 96
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background by a shell; some tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first: at the end one worker would do it while the other waits."""
    items.sort(key=lambda item: "test_tutorial" not in item.nodeid)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random weights of a test are the same whatever ran before it: some of the others give no live map."""
    torch.manual_seed(1)


@pytest.fixture(scope="session")
def shared_faces() -> Path:
    """The folder of real faces beside the repository, or a skip."""
    folder = SHARED / "data" / "faces"
    if not folder.is_dir():
        pytest.skip("real faces are not here: ../shared/data/faces is absent")
    return folder


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


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifest of 26 images: 9 real of one source, 12 and 5 fake of two."""
    counts = {("real", "camera"): 9, ("fake", "gan_a"): 12, ("fake", "gan_b"): 5}
    return _make_images(tmp_path_factory.mktemp("images"), counts=counts)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Folder with three checkpoints of a small real network, two classes, random features under a balanced head."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")
    for seed in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = timm.create_model(ARCHITECTURE.partition(":")[2], num_classes=2)
            _balance(model, images)
        save_file(model.state_dict(), folder / f"seed{seed}.safetensors")
    return folder


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


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Call the command line in a fresh folder; returns exit code, output and errors."""
    from explain2me import cli

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["explain2me", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out, output.err

    return run


WriteConfig = Callable[..., Path]


@pytest.fixture
def write_config(tmp_path: Path, images: Path, weights: Path) -> WriteConfig:
    """Write a TOML file; keyword arguments replace whole tables, ``extra`` is appended."""

    def write(**tables: str) -> Path:
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
        path = tmp_path / "config.toml"
        path.write_text(text + parts.get("extra", ""))
        return path

    return write


@pytest.fixture(scope="session")
def detector_table() -> Callable[..., str]:
    """The TOML table of one detector: (name, checkpoints, *, architecture, size) -> text."""
    return _detector_table


def _detector_table(name: str, checkpoints: str, *, architecture: str = ARCHITECTURE, size: int = SIZE) -> str:
    return (
        f'[[detectors]]\nname = {json.dumps(name)}\narchitecture = "{architecture}"\ninput_size = {size}\n'
        f"checkpoints = {json.dumps(checkpoints)}\n"
    )
