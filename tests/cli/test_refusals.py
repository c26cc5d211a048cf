"""Wrong manifests, configs and checkpoints: one line each, and nothing is written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from refused import refused
from safetensors.torch import load_file, save_file

Call = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,real\n", "expected a column 'path'"),
        ("path,label,source\n", "no rows"),
        ("path,label\nreal/camera/000.png,real\nreal/camera/000.png,real\n", "on line 2 already"),
        ("path,label\nreal/camera/000.png,real\nreal/camera/001.png\n", "expected 2 fields"),
        ("path,label\nreal/camera/000.png,real\nreal/camera/001.png,real\n", "expected images of at least two labels"),
    ],
    ids=["column", "rows", "duplicate", "fields", "one label"],
)
def test_a_wrong_manifest_is_refused(
    call: Call, write_config: Callable[..., Path], images: Path, tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "manifest.csv").write_text(text)
    refused(call("run", write_config(data='manifest = "manifest.csv"')), message)
    assert not Path("runs").exists()


def test_a_missing_manifest_is_refused(call: Call, write_config: Callable[..., Path]) -> None:
    refused(call("run", write_config(data='manifest = "none.csv"')), "none.csv")


def test_an_unknown_label_is_refused(call: Call, write_config: Callable[..., Path], images: Path) -> None:
    data = f'manifest = "{images}"\nclasses = ["rael", "fake"]'
    refused(call("run", write_config(data=data)), "got the label 'real'", "did you mean 'rael'?")


def test_an_unknown_positive_class_is_refused(call: Call, write_config: Callable[..., Path], images: Path) -> None:
    data = f'manifest = "{images}"\npositive = "fakee"'
    refused(call("run", write_config(data=data)), "data.positive: expected one of the labels", "did you mean 'fake'?")


def test_a_missing_split_is_refused(call: Call, write_config: Callable[..., Path], images: Path) -> None:
    refused(call("run", write_config(data=f'manifest = "{images}"\nsplit = "tets"')), "'tets'", "'test'")


def test_no_usable_image_is_refused(call: Call, write_config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_text("path,label\na.png,real\nb.png,fake\n")
    refused(call("run", write_config(data='manifest = "manifest.csv"')), "none of the 2 images", "can be used")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("measures.nois=true", "unknown key 'measures.nois': did you mean 'noise'?"),
        ("compute.batch_size=many", "compute.batch_size: input should be a valid integer, got 'many'"),
        ("measures.entropie=true", "did you mean 'entropy' or 'noise'?"),
        ("detectors.0.architecture=timm:test_resnt", "did you mean 'test_resnet'"),
        ("detectors.0.architecture=timmm:test_resnet", "timm:"),
        ("detectors.0.layer=stages.99", "stages."),
        ("detectors.0.input_size=[64,96]", "needs a square input, got 64x96"),
        ("compute.device=cuda:7", "CUDA"),
        ("salience.target=nobody", "salience.target: expected predicted, true or a class, got 'nobody'"),
    ],
)
def test_a_wrong_config_is_refused(call: Call, write_config: Callable[..., Path], change: str, message: str) -> None:
    if "cuda" in change and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    refused(call("run", write_config(), "--set", change), message)
    assert not Path("runs").exists()


def test_one_run_and_stability_is_refused(
    call: Call, write_config: Callable[..., Path], weights: Path, detector_table: Callable[..., str]
) -> None:
    config = write_config(detectors=detector_table("solo", f"{weights}/seed0.safetensors"))
    refused(call("run", config), "needs at least 2 of each detector, 'solo' has 1", "measures.stability = false")
    assert call("check", config, "--set", "measures.stability=false")[0] == 0


class Malicious:
    """Unpickling this would leave a file behind."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("canary", "w")


@pytest.mark.parametrize("suffix", ["pt", "pth", "pkl", "safetensors"])
def test_a_pickle_with_code_is_refused_and_runs_nothing(
    call: Call, write_config: Callable[..., Path], detector_table: Callable[..., str], suffix: str
) -> None:
    for i in range(2):
        torch.save({"state_dict": Malicious()}, f"evil{i}.{suffix}")
    refused(call("run", write_config(detectors=detector_table("evil", f"evil*.{suffix}"))), "evil0")
    assert not Path("canary").exists()


def test_wrong_checkpoints_are_refused(
    call: Call, write_config: Callable[..., Path], weights: Path, detector_table: Callable[..., str]
) -> None:
    good = load_file(weights / "seed0.safetensors")
    Path("w").mkdir()

    def attempt(state: dict[str, torch.Tensor]) -> tuple[int, str, str]:
        for i in range(2):
            save_file(state, f"w/{i}.safetensors")
        return call("run", write_config(detectors=detector_table("d", "w/*.safetensors")))

    refused(attempt(good | {"fc.weight": good["fc.weight"] * float("nan")}), "'d'", "fc.weight")
    refused(attempt(timm.create_model("test_resnet", num_classes=5).state_dict()), "'d'", "5", "2")
    refused(attempt(timm.create_model("test_efficientnet", num_classes=2).state_dict()), "'d'", "test_resnet")
    refused(
        call("run", write_config(detectors=detector_table("d", "none/*.safetensors"))), "no file matches checkpoints"
    )
    Path("w/0.safetensors").write_bytes(b"not a checkpoint")
    refused(call("run", write_config(detectors=detector_table("d", "w/*.safetensors"))), "0.safetensors")
    assert not Path("runs").exists()


@pytest.mark.parametrize("command", ["study", "train"])
def test_a_config_without_training_is_refused(call: Call, write_config: Callable[..., Path], command: str) -> None:
    code, _, error = call(command, write_config())
    assert code == 2
    assert (
        "training is missing: this config has nothing to train; add a table [training], or call `explain2me run`"
        in error
    )
