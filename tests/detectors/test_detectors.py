import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import explain2me.detectors.load
from explain2me import Detector, load_detector
from explain2me.detectors.cards import reading_warnings
from explain2me.detectors.checkpoints import read_checkpoint
from explain2me.errors import CheckpointError, ConfigError
from explain2me.run.record import Model

TINY = "timm:test_resnet"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return timm.create_model("test_resnet", num_classes=2).state_dict()


def prefixed(prefix: str) -> Callable[[State], object]:
    return lambda state: {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {
            "epoch": 7,
            "state_dict": state,
            "optimizer": {"state": {}, "param_groups": []},
        },  # CYBORG's scripts
        prefixed("module."),
        lambda state: {"epoch": 7, "state_dict": prefixed("module.")(state), "optimizer": {}},
        prefixed("module.model."),
        prefixed("_orig_mod.module."),
        lambda state: {"model": state},
        lambda state: {"checkpoint": 1, "model_state_dict": prefixed("model.")(state), "loss": torch.tensor(0.1)},
    ],
    ids=["plain", "cyborg", "parallel", "cyborg parallel", "lightning", "compiled", "model", "model_state_dict"],
)
@pytest.mark.parametrize("file_format", ["zip", "legacy"])
def test_nests_and_prefixes_are_taken_off(
    tmp_path: Path, state: State, wrap: Callable[[State], object], file_format: str
) -> None:
    torch.save(wrap(state), tmp_path / "w.pth", _use_new_zipfile_serialization=file_format == "zip")
    detector = load_detector(TINY, tmp_path / "w.pth", num_classes=2)
    for key, value in detector.model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not any(module.training for module in detector.model.modules())


def test_a_safetensors_file_under_any_name(tmp_path: Path, state: State) -> None:
    save_file(state, tmp_path / "w.pth")
    weights, sha256 = read_checkpoint(tmp_path / "w.pth")
    assert set(weights) == set(state)
    assert len(sha256) == 64


def test_classes_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    for count in (1, 2, 5):
        save_file(timm.create_model("test_resnet", num_classes=count).state_dict(), tmp_path / f"{count}.safetensors")
    num_classes = [load_detector(TINY, tmp_path / f"{count}.safetensors").num_classes for count in (1, 2, 5)]
    assert num_classes == [2, 2, 5]  # one logit separates two classes
    one = load_detector(TINY, tmp_path / "1.safetensors", num_classes=2)
    assert one.model(torch.zeros(1, 3, 160, 160)).shape == (1, 1)
    with pytest.raises(CheckpointError, match=r"has 5 classes \(fc.weight is of shape \(5, .*expected 2;"):
        load_detector(TINY, tmp_path / "5.safetensors", num_classes=2)
    with pytest.raises(CheckpointError, match=r"has 1 classes .*expected 3"):
        load_detector(TINY, tmp_path / "1.safetensors", num_classes=3)
    weights, _ = read_checkpoint(tmp_path / "2.safetensors")
    save_file(weights | {"fc.weight": torch.zeros(())}, tmp_path / "scalar.safetensors")
    with pytest.raises(CheckpointError, match=r"has 0 classes .*expected at least 1;"):
        load_detector(TINY, tmp_path / "scalar.safetensors")


def test_weights_that_do_not_fit_are_named(tmp_path: Path, state: State) -> None:
    path = tmp_path / "w.safetensors"
    save_file({key: value for key, value in state.items() if key != "conv1.0.weight"}, path)
    with pytest.raises(CheckpointError, match=r"1 of \d+ weights are missing \('conv1.0.weight'\)"):
        load_detector(TINY, path)
    save_file(state | {"extra": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"1 are unknown \('extra'\)"):
        load_detector(TINY, path)
    save_file(state | {"conv1.0.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"conv1.0.weight must be of shape .*, got \(2, 2\)"):
        load_detector(TINY, path)
    for kind in (torch.int8, torch.complex64, torch.bool):
        save_file(state | {"conv1.0.weight": state["conv1.0.weight"].to(kind)}, path)
        with pytest.raises(CheckpointError, match=rf"conv1.0.weight must hold floating point numbers, got {kind}"):
            load_detector(TINY, path)
    for bad in (torch.nan, torch.inf):
        spoiled = state["fc.bias"].clone()
        spoiled[1] = bad
        save_file(state | {"fc.bias": spoiled}, path)
        with pytest.raises(CheckpointError, match=r"1 of 2 values of fc.bias are not finite"):
            load_detector(TINY, path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"hello, I am a text", "is no whole checkpoint"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{not json", "is not a valid safetensors file"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff{", "is not a valid safetensors file"),
        (b"PK\x03\x04 broken", "is no whole checkpoint"),
        (b"\x80\x02\x95", r"is not a checkpoint that .* can read \(Unsupported operand 149\)"),
    ],
    ids=["empty", "text", "header", "length", "zip", "opcode"],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "w.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as error:
        load_detector(TINY, tmp_path / "w.pt")
    assert "\n" not in str(error.value)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("canary", "w")


def test_code_in_a_pickle_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malicious()}, "w.pth")
    with pytest.raises(
        CheckpointError, match=r"names the Python object \S+\.open and is refused: .* could run code; .*safetensors"
    ):
        load_detector(TINY, "w.pth")
    assert not Path("canary").exists()


@pytest.mark.parametrize("content", [{"epoch": 3}, {"state_dict": {}}, [1, 2], torch.zeros(3)], ids=str)
def test_files_without_weights_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="expected weights by name"):
        load_detector(TINY, tmp_path / "w.pth")


def test_a_dict_that_holds_itself_ends(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dictq\x01h\x00s.")
    with pytest.raises(CheckpointError):
        load_detector(TINY, tmp_path / "w.pth")
    nested: dict[str, object] = {}
    nested["state_dict"] = nested
    torch.save(nested, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"got a dict with the keys \['state_dict'\]"):
        load_detector(TINY, tmp_path / "w.pth")


def test_a_prefix_without_end_is_not_taken_off_for_ever(tmp_path: Path) -> None:
    save_file({"module." * 200_000 + str(i): torch.zeros(1) for i in range(5)}, tmp_path / "w.safetensors")
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="5 are unknown") as error:
        load_detector(TINY, tmp_path / "w.safetensors")
    assert time.monotonic() - started < 20
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_few_numbers_repeated_are_not_the_weights_of_a_billion_classes(tmp_path: Path, state: State, new: bool) -> None:
    spread = torch.zeros(1).as_strided((10**9, 64), (0, 0))
    torch.save(state | {"fc.weight": spread}, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match=r"'fc.weight' would take 256000000000 bytes, larger than the file"):
        load_detector(TINY, tmp_path / "w.pth")


@pytest.mark.parametrize(
    "value", [torch.zeros(2, 2).to_sparse(), torch.zeros(2, 2, device="meta")], ids=["sparse", "meta"]
)
def test_only_dense_tensors_are_weights(tmp_path: Path, state: State, value: torch.Tensor) -> None:
    torch.save(state | {"fc.bias": value}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"must be a dense tensor, got layout|cannot be read"):
        load_detector(TINY, tmp_path / "w.pth")


def test_a_zip_that_unpacks_to_more_than_itself_is_refused(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as old,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, bytes(10**8) if name.endswith("/data/0") else old.read(name))
    assert (tmp_path / "b.pth").stat().st_size < 2 * 10**6
    with pytest.raises(CheckpointError, match=r"would unpack to \d+ bytes, larger than the file"):
        load_detector(TINY, tmp_path / "b.pth")


@pytest.mark.parametrize("name", ["folder", "pipe", "/dev/zero"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name == "pipe":
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"cannot be read: expected a file, got a (folder|pipe|device)"):
        load_detector(TINY, path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnt50", "did you mean .*'resnet50'"),
        ("torchvision:densnet121", "did you mean .*'densenet121'"),
        ("torchvision:fasterrcnn_resnet50_fpn", "unknown architecture"),
        ("ResNet50", "got 'ResNet50'; did you mean 'timm:resnet50' or 'torchvision:resnet50'\\?"),
        ("timm/vit_tiny_patch16_224", "got 'timm/vit_tiny_patch16_224'; did you mean 'timm:vit_tiny_patch16_224'\\?"),
        ("resnet50.nonsense", "expected timm:NAME or torchvision:NAME, got 'resnet50.nonsense'$"),
        ("resnt", "expected timm:NAME or torchvision:NAME, got 'resnt'$"),
        ("timm:resnet50.a1_in1kk", "did you mean 'resnet50.a1_in1k'"),
    ],
)
def test_unknown_architectures_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_detector(name)


def test_pretrained_weights_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="timm has no pretrained weights of 'densenet264d'"):
        load_detector("timm:densenet264d", pretrained=True)


def test_pretrained_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", fail)
    with pytest.raises(
        CheckpointError, match=r"weights of torchvision:resnet18 cannot be loaded \(.*no network.*TORCH_HOME"
    ):
        load_detector("torchvision:resnet18", pretrained=True)


def test_pretrained_weights_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torchvision.models.get_model("resnet50").state_dict()
    asked = []
    monkeypatch.setattr(
        torchvision.models._api.WeightsEnum, "get_state_dict", lambda self, **_: asked.append(self.name) or weights
    )
    for pretrained in (True, "IMAGENET1K_V1"):
        load_detector("torchvision:resnet50", pretrained=pretrained)
    assert asked == ["IMAGENET1K_V2", "IMAGENET1K_V1"]


def test_preprocessing_is_the_models_own() -> None:
    detector = load_detector("torchvision:resnet18", num_classes=2)
    assert (detector.input_size, detector.interpolation) == ((224, 224), "bilinear")
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(detector.preprocess(images), (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"uint8 of shape \(N, 3, 224, 224\), got torch.uint8 of shape \(2, 3, 224, 112\)"
    ):
        detector.preprocess(images[..., ::2])
    half = load_detector("timm:legacy_xception", num_classes=2)
    assert (half.input_size, half.mean, half.std) == ((299, 299), (0.5,) * 3, (0.5,) * 3)


def test_inception_loads_with_and_without_its_auxiliary_head(tmp_path: Path) -> None:
    import torchvision

    for auxiliary in (True, False):
        model = torchvision.models.inception_v3(weights=None, num_classes=2, aux_logits=auxiliary, init_weights=False)
        torch.save(model.state_dict(), tmp_path / "w.pth")
        detector = load_detector("torchvision:inception_v3", tmp_path / "w.pth", num_classes=2)
        assert detector.input_size == (299, 299)
        assert isinstance(detector.model, nn.Module)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_a_checkpoint_fine_tuned_from_pretrained_weights_is_read_with_half_and_half(tmp_path: Path, name: str) -> None:
    there = torchvision.models.get_model(
        name, weights=None, num_classes=2, transform_input=True, init_weights=False
    ).eval()
    torch.save(there.state_dict(), tmp_path / "w.pth")
    imagenet = load_detector(f"torchvision:{name}", tmp_path / "w.pth")
    half = load_detector(f"torchvision:{name}", tmp_path / "w.pth", mean=(0.5,) * 3, std=(0.5,) * 3)
    images = torch.randint(0, 256, (2, 3, *half.input_size), dtype=torch.uint8)

    def first(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        outputs: list[torch.Tensor] = []
        conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        with torch.no_grad(), conv.register_forward_hook(lambda *arguments: outputs.append(arguments[-1])):
            model(images)
        return outputs[0]

    want = first(there, imagenet.preprocess(images))
    torch.testing.assert_close(first(half.model, half.preprocess(images)), want, rtol=1e-4, atol=1e-4)
    assert (first(imagenet.model, imagenet.preprocess(images)) - want).abs().max() > 0.1 * want.abs().max()

    def warnings_of(detector: Detector, checkpoint: str | None) -> list[str]:
        model = Model("a", "0", detector.architecture, checkpoint, 0, detector.weights_sha256, "", detector.input_size, 2,
                      detector.mean, detector.std, detector.interpolation)  # fmt: skip
        return reading_warnings([model], ["real", "fake"])

    (warning,) = warnings_of(imagenet, str(tmp_path / "w.pth"))
    assert "set mean = [0.5, 0.5, 0.5] and std = [0.5, 0.5, 0.5]" in warning
    assert warnings_of(half, str(tmp_path / "w.pth")) == warnings_of(imagenet, None) == []


def test_named_pretrained_weights_bring_their_own_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torchvision.models._api.WeightsEnum,
        "get_state_dict",
        lambda self, **_: torchvision.models.get_model("vit_b_16", image_size=self.meta["min_size"][0]).state_dict(),
    )
    read = {}
    for name in (True, "IMAGENET1K_V1", "IMAGENET1K_SWAG_E2E_V1"):
        detector = load_detector("torchvision:vit_b_16", pretrained=name)
        read[name] = (detector.input_size, detector.interpolation)
        assert detector.model.image_size == detector.input_size[0]
    assert read[True] == read["IMAGENET1K_V1"] == ((224, 224), "bilinear")
    assert read["IMAGENET1K_SWAG_E2E_V1"] == ((384, 384), "bicubic")
    with pytest.raises(
        ConfigError, match="takes inputs of 384x384 pixels only, got input_size 224x224; leave input_size"
    ):
        load_detector("torchvision:vit_b_16", pretrained="IMAGENET1K_SWAG_E2E_V1", input_size=224)
    features = explain2me.detectors.architectures.settings_of_weights("torchvision:vgg16", "IMAGENET1K_FEATURES")
    assert features["mean"] == pytest.approx((0.482, 0.459, 0.408), abs=1e-3)
    assert features["std"] == pytest.approx((1 / 255,) * 3)
    for other in (True, "NONE"):
        assert explain2me.detectors.architectures.settings_of_weights("torchvision:vgg16", other) == {}


def test_a_vision_transformer_reads_the_size_it_was_built_for() -> None:
    with torch.device("meta"):
        built = torchvision.models.vit_h_14(weights=None, num_classes=2)
    settings = explain2me.detectors.architectures.reading_settings("torchvision", "vit_h_14", built, False)
    assert settings["input_size"] == (224, 224)


def test_random_weights_are_seeded_and_the_global_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = (load_detector(TINY, num_classes=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert a.weights_sha256 == b.weights_sha256 != c.weights_sha256


def test_input_size_can_be_changed() -> None:
    vit = load_detector("timm:vit_tiny_patch16_224", num_classes=2, input_size=160)
    assert vit.model(vit.preprocess(torch.zeros(1, 3, 160, 160, dtype=torch.uint8))).shape == (1, 2)
