"""Compiled models give the same maps; the part after the cut is not compiled."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from explain2me import GradCAM, load_detector, open_run
from explain2me.config.load import load_config
from explain2me.errors import LayerError
from explain2me.salience.compiling import Compiled, compile_before
from explain2me.stages.explain import explain_run

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
pytestmark = pytest.mark.filterwarnings("ignore")  # inductor's own


def compiled_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Compiled)}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@needs_compiler
@pytest.mark.parametrize(
    ("architecture", "layer", "compiled"),
    [
        pytest.param(
            "timm:test_resnet",
            "auto",
            {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"},
            marks=pytest.mark.slow,
        ),
        pytest.param("timm:test_vit", "auto", {"patch_embed", "blocks.0"}, marks=pytest.mark.slow),
        pytest.param("timm:test_resnet", "layer2", {"conv1", "bn1", "layer1"}, marks=pytest.mark.slow),
        pytest.param("torchvision:densenet121", "auto", {"features"}, marks=pytest.mark.slow),
    ],
)
def test_maps_are_those_of_the_model_as_it_was(architecture: str, layer: str, compiled: set[str]) -> None:
    detector = load_detector(architecture, num_classes=2, seed=1)
    images = torch.rand(2, 3, *detector.input_size)
    with GradCAM(detector.model, layer) as cam:
        maps, logits = cam(images)
        layer_name = cam.layer
    compile_before(detector.model, images, layer)
    assert compiled_names(detector.model) >= compiled
    with GradCAM(detector.model, layer) as cam:
        again, compiled_logits = cam(images)
        assert cam.layer == layer_name
    torch.testing.assert_close(again, maps, rtol=1e-3, atol=1e-4 * float(maps.max()))
    torch.testing.assert_close(compiled_logits, logits, rtol=1e-3, atol=1e-4)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_pads_its_last_batch_and_is_another_run(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config(measures="resilience = false\nfocus = false\nstability = false")
    runs = [
        explain_run(load_config(config, sets), tmp_path / str(i))
        for i, sets in enumerate(([], ["compute.compile=true"]))
    ]
    frames = [run.maps().to_pandas().set_index(["run", "image", "condition"]) for run in runs]
    assert len(frames[0]) == len(frames[1]) == 2 * 26 * 2
    for name in ("map", "logits"):
        a, b = (torch.tensor(frame[name].tolist()) for frame in frames)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    names = [{path.name for path in open_run(run.folder).part_paths(run.models[0])} for run in runs]
    assert not names[0] & names[1]


def test_a_failing_compiler_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    detector = load_detector("timm:test_resnet", num_classes=2)
    with pytest.raises(LayerError, match=r"cannot be compiled.*no compiler.*compute\.compile = false"):
        compile_before(detector.model, torch.rand(2, 3, 160, 160))


def test_a_compiler_that_changes_the_maps_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda run, **_: lambda *inputs: run(*inputs).flip(-1) * 3)
    detector = load_detector("timm:test_resnet", num_classes=2)
    with pytest.raises(LayerError, match=r"does not give the same maps, .* when compiled"):
        compile_before(detector.model, torch.rand(2, 3, 160, 160))


def test_more_parts_than_pytorch_compiles_one_function_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = torch._dynamo.testing.CompileCounter()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, **options: real(run, backend=counter, **options))
    count = torch._dynamo.config.recompile_limit + 2
    parts = [Compiled(nn.Linear(4, width + 1)) for width in range(count)]
    for _ in range(2):
        for part in parts:
            part(torch.rand(2, 4))
    assert counter.frame_count == count
