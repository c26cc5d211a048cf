"""Grad-CAM leaves the model unchanged, whatever the mode, precision and memory format."""

import gc
from typing import Any

import pytest
import torch
from small_networks import Body, close, every_class, pictures, small
from torch import Tensor, nn

from explain2me.errors import LayerError
from explain2me.salience.gradcam import GradCAM


def state_of(model: nn.Module) -> list[Any]:
    return [
        [part.training for part in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        [(key, value.clone()) for key, value in model.state_dict().items()],
        [
            len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks)
            for part in model.modules()
        ],
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
    ]


def mixed() -> Body:
    """A model in mixed modes, with frozen parameters, a gradient and a foreign hook."""
    model = small()
    model.train()
    model.stem.eval()
    model.gate.requires_grad_(False)
    model.last.weight.grad = torch.ones_like(model.last.weight)
    model.last.register_forward_hook(lambda *_: None)
    return model


def same(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor):
        return torch.equal(before, after)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(same, before, after))
    return before == after


@pytest.mark.parametrize("layer", ["auto", "last"])
def test_the_model_is_left_as_found(layer):
    model = mixed()
    before = state_of(model)
    with GradCAM(model, layer) as cam:
        assert not any(part.training for part in model.modules())
        cam(pictures())
        cam(pictures(), every_class(pictures(), 3))
        assert same(before[1:], state_of(model)[1:])  # between calls, too
    assert same(before, state_of(model))


@pytest.mark.parametrize("layer", ["auto", "last", "head"])
@pytest.mark.parametrize("fault", ["forward", "classes", "block", "choose"])
def test_the_model_is_left_as_found_after_an_exception(layer, fault):
    model = mixed()
    before = state_of(model)
    with pytest.raises((RuntimeError, ValueError, LayerError)), GradCAM(model, layer) as cam:
        if fault == "forward":
            cam(torch.zeros(2, 5, 8, 8))
        elif fault == "classes":
            cam(pictures(), torch.tensor([0, 9, 0]))
        elif fault == "choose":
            cam.explain(pictures(), lambda logits: (_ for _ in ()).throw(RuntimeError("no")))
        raise RuntimeError("in the block")
    assert same(before, state_of(model))


def test_random_numbers_drawn_by_the_model_are_put_back():
    class Noisy(Body):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images + 0.1 * torch.randn_like(images))

    model = Noisy("mean", nn.Linear(12, 2))
    before = torch.get_rng_state()
    with GradCAM(model) as cam:
        first, again = cam(pictures()), cam(pictures())
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.maps, again.maps)


def test_calls_outside_the_block_and_a_second_entry_are_refused():
    cam = GradCAM(small())
    with pytest.raises(RuntimeError, match="only inside its block"):
        cam(pictures())
    with cam:
        with pytest.raises(RuntimeError, match="open already"):
            cam.__enter__()
        want = cam(pictures()).maps
    with pytest.raises(RuntimeError, match="only inside its block"):
        cam(pictures())
    with cam:
        assert torch.equal(cam(pictures()).maps, want)


def test_blocks_may_be_nested_on_one_model():
    model = small().train()
    with GradCAM(model, "last") as outer:
        alone = outer(pictures()).maps
        with GradCAM(model) as inner:
            inner(pictures())
            assert torch.equal(outer(pictures()).maps, alone)
        assert not model.training
    assert model.training
    assert model.stem.training


@pytest.mark.parametrize("layer", ["auto", "last"])
def test_no_grad_and_inference_mode_around_a_call_change_nothing(layer):
    model, images = small(hidden=True), pictures()
    with GradCAM(model, layer) as cam:
        want = cam(images)
        for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with context:
                for batch in (images, images.clone()):
                    maps, logits = cam(batch)
                    assert torch.equal(maps, want.maps)
                    assert torch.equal(logits, want.logits)
                    assert not maps.is_inference()


@pytest.mark.parametrize("layer", ["auto", "0"])
def test_images_made_in_inference_mode(layer):
    model, images = nn.Sequential(nn.Identity(), small()), pictures()
    with GradCAM(model, layer) as cam:
        want = cam(images)
    with torch.inference_mode():
        made = images * 1
        with GradCAM(model, layer) as cam:
            got = cam(made)
        assert made.is_inference()
    assert torch.equal(got.maps, want.maps)
    assert torch.equal(got.logits, want.logits)


def test_images_that_ask_for_gradients_get_none():
    images = pictures().requires_grad_()
    with GradCAM(small()) as cam:
        maps, _ = cam(images)
    assert images.grad is None
    assert not maps.requires_grad


def test_hundreds_of_batches_leak_nothing():
    model, images = small("avg and max"), pictures(2)
    classes = every_class(images, 2)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    with GradCAM(model) as cam, GradCAM(model, "stem.0") as named:
        hooks = state_of(model)[4]
        for opened in (cam, named):
            opened(images, classes)
            before = tensors()
            gc.disable()  # what only the collector frees would pile up on a GPU
            try:
                for _ in range(100):
                    opened(images, classes)
                alive = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
            finally:
                gc.enable()
            assert alive <= before
            assert tensors() <= before
        assert state_of(model)[4] == hooks


@pytest.mark.parametrize("layer", ["auto", "last"])
def test_half_precision_gives_float32_maps(layer):
    model, images = small(hidden=True), pictures()
    classes = every_class(images, 3)
    with GradCAM(model, layer) as cam:
        want = cam(images, classes)
        with torch.autocast("cpu", torch.bfloat16):
            mixed_precision = cam(images, classes)
            assert torch.is_autocast_enabled("cpu")
    with GradCAM(model.bfloat16(), layer) as cam:
        half = cam(images.bfloat16(), classes)
    for got in (mixed_precision, half):
        assert got.maps.dtype == got.logits.dtype == torch.float32
        assert (got.maps - want.maps).abs().max() < 0.1 * want.maps.max()


def test_under_autocast_the_head_is_in_float32():
    model, images = small(), pictures()
    kept: list[Tensor] = []
    model.act.register_forward_hook(lambda *arguments: kept.append(arguments[-1].float()))
    with GradCAM(model) as cam, torch.autocast("cpu", torch.bfloat16):
        maps, logits = cam(images, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(logits, model.head(kept[-1].mean((2, 3))).detach(), rtol=1e-6, atol=1e-6)
    weights = model.head[0].weight[0].detach() / 48
    close(maps, torch.einsum("nchw,c->nhw", kept[-1], weights).relu().detach().numpy())


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(n, 8, 1) for n in (3, 8, 8))
        self.head = nn.Linear(16, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        return self.head(torch.cat([self.one(x), self.two(x)], 1).mean((2, 3)))


def test_a_layer_on_one_of_several_branches_under_autocast_says_so():
    model = Branches()
    with torch.autocast("cpu", torch.bfloat16):
        with GradCAM(model, "one") as cam, pytest.raises(LayerError, match=r"output of one .* one of several branches"):
            cam(pictures())
        with GradCAM(model) as cam:
            assert cam(pictures()).maps.any()
    with GradCAM(model, "one") as cam:
        assert cam(pictures()).maps.any()


def test_a_backbone_under_no_grad_says_so():
    class Frozen(Branches):
        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                x = torch.cat([self.stem(images)] * 2, 1).mean((2, 3))
            return self.head(x)

    with (
        GradCAM(Frozen()) as cam,
        pytest.raises(LayerError, match=r"have no gradient with .* not run inside torch.no_grad\(\)"),
    ):
        cam(pictures())


def test_memory_format_changes_nothing_but_the_last_bits():
    model, images = small(hidden=True), pictures()
    with GradCAM(model) as cam:
        want = cam(images)
        model.to(memory_format=torch.channels_last)
        got = cam(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got.maps, want.maps, rtol=1e-5, atol=1e-7)
