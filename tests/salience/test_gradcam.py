"""Grad-CAM against a naive full backward pass in float64 and against TorchCAM: classes, heads and layers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from small_networks import ENDS, close, every_class, naive, pictures, small
from torch import Tensor, nn

from explain2me.errors import LayerError
from explain2me.salience.gradcam import GradCAM, gradcam, predicted_classes


@pytest.mark.parametrize("hidden", [False, True], ids=["linear", "nonlinear"])
@pytest.mark.parametrize("end", ENDS)
def test_auto_is_the_tensor_that_enters_the_end_and_matches_a_full_backward_pass(end, hidden):
    model, images = small(end, hidden=hidden).double(), pictures(dtype=torch.float64)
    classes = every_class(images, 3)
    with GradCAM(model) as cam:
        maps, logits = cam(images, classes)
    close(maps, naive(model, model.act, images, classes), rtol=1e-12)
    assert torch.equal(logits, model.eval()(images))


def test_a_tensor_that_is_used_before_it_is_pooled_gets_its_whole_gradient():
    model, images = small("attention").double(), pictures(dtype=torch.float64)
    classes = every_class(images, 3)
    with GradCAM(model, "act") as cam:
        close(cam(images, classes).maps, naive(model, model.act, images, classes), rtol=1e-12)


@pytest.mark.parametrize("layer", ["stem.0", "stem.3", "gate", "last", "act"])
def test_any_named_layer_matches_a_full_backward_pass(layer):
    model, images = small(hidden=True).double(), pictures(dtype=torch.float64)
    if layer == "gate":
        with (
            GradCAM(model, layer) as cam,
            pytest.raises(LayerError, match=r"output of gate has shape .* not a spatial map"),
        ):
            cam(images)
        return
    classes = every_class(images, 3)
    with GradCAM(model, layer) as cam:
        maps, _ = cam(images, classes)
    untouched = small(hidden=True).double()
    for part in untouched.modules():  # the reference needs the layer's output before the in-place ReLU behind it
        if isinstance(part, nn.ReLU):
            part.inplace = layer == "act"
    close(maps, naive(untouched, untouched.get_submodule(layer), images, classes), rtol=1e-12)


def test_a_module_used_several_times_counts_where_it_is_used_last():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.relu(self.conv(x) + x)
            return self.head(x.mean((2, 3)))

    model, images = Shared().double(), pictures(dtype=torch.float64)
    classes = every_class(images, 2)
    with GradCAM(model, "relu") as cam:
        close(cam(images, classes).maps, naive(model, model.relu, images, classes), rtol=1e-12)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("name", "layer"), [("resnet50", "layer4"), ("densenet121", "features")])
def test_auto_equals_torchcam(name, layer, n):
    methods = pytest.importorskip("torchcam.methods")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = torchvision.models.get_model(name, weights=None, num_classes=5).eval()
    images = pictures(n, 96, 128)
    with GradCAM(model) as cam:
        maps, logits = cam(images)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with methods.GradCAM(model, layer, input_shape=(3, 96, 128)) as peer:
        scores = model(images)
        (want,) = peer(scores.argmax(1).tolist(), scores, normalized=False)
    assert maps.shape[1:] == (3, 4)
    close(maps, want.detach().double().numpy())
    torch.testing.assert_close(logits, scores.detach(), rtol=1e-5, atol=1e-5)


def test_the_pure_function_by_hand():
    activations = torch.tensor([[[[1.0, 2.0], [0.0, 4.0]], [[1.0, 0.0], [3.0, 0.0]]]])
    gradients = torch.tensor([[[[4.0, 0.0], [0.0, 0.0]], [[0.0, -8.0], [0.0, 0.0]]]])
    assert gradcam(activations, gradients).tolist() == [[[0.0, 2.0], [0.0, 4.0]]]
    assert gradcam(activations.bfloat16(), gradients.bfloat16()).dtype == torch.float32
    assert gradcam(activations.double(), gradients.double()).dtype == torch.float64


@pytest.mark.parametrize(("a", "g"), [((2, 3, 4, 4), (2, 3, 4, 5)), ((3, 4, 4), (3, 4, 4))])
def test_the_pure_function_refuses_other_shapes(a, g):
    with pytest.raises(ValueError, match=r"must have the same shape \(N, C, h, w\), got \("):
        gradcam(torch.zeros(a), torch.zeros(g))


class Squeeze(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits.squeeze()


@pytest.mark.parametrize("flat", [False, True], ids=["(N, 1)", "(N,)"])
def test_a_single_logit_speaks_for_class_1_and_against_class_0(flat):
    model, images = small(num_logits=1).double(), pictures(6, dtype=torch.float64)
    classes = every_class(images, 2)
    want = naive(model, model.act, images, classes)
    if flat:
        model.head.append(Squeeze())
    with GradCAM(model) as cam:
        maps, logits = cam(images, classes)
        close(cam(images[:1], classes[:1]).maps, want[:1], rtol=1e-12)  # squeezed to a scalar
        predicted, _ = cam(images)
    close(maps, want, rtol=1e-12)
    assert logits.shape == (6, 1)
    chosen = (logits[:, 0] > 0).long()
    assert torch.equal(predicted, maps[torch.arange(6), chosen])
    assert not torch.equal(maps[:, 0], maps[:, 1])


@pytest.mark.parametrize("num_logits", [1, 2, 7])
def test_no_classes_means_the_predicted_class(num_logits):
    model, images = small(num_logits=num_logits), pictures(5)
    with GradCAM(model) as cam:
        maps, logits = cam(images)
        again, _ = cam(images, predicted_classes(logits))
    assert maps.shape == (5, 6, 8)
    assert torch.equal(maps, again)
    assert torch.equal(predicted_classes(torch.tensor([[0.0], [1e-9], [-3.0]])), torch.tensor([0, 1, 0]))


def test_several_classes_are_the_single_ones_side_by_side():
    model, images = small(hidden=True), pictures(4)
    classes = torch.tensor([[0, 2, 0, 1], [1, 1, 1, 2], [2, 0, 2, 2], [0, 1, 0, 0]])
    with GradCAM(model) as cam:
        maps, _ = cam(images, classes)
        single = torch.stack([cam(images, column).maps for column in classes.unbind(1)], 1)
    assert torch.equal(maps, single)
    assert torch.equal(maps[:, 0], maps[:, 2])
    assert not torch.equal(maps[:, 0], maps[:, 1])


def test_the_classes_may_depend_on_the_logits_in_one_forward_pass():
    model, images = small(), pictures(4)
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    with GradCAM(model) as cam:
        cam(images)
        passes.clear()
        maps, logits = cam.explain(images, lambda logits: logits.argsort(1)[:, :2])
        assert len(passes) == 1
        least, _ = cam(images, logits.argmin(1))
    assert torch.equal(maps[:, 0], least)
    assert not logits.requires_grad
    assert not maps.requires_grad


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = small(), wrap

    def forward(self, images: Tensor) -> Any:
        return self.wrap(self.inner(images))


class Output(NamedTuple):
    logits: Tensor
    aux_logits: Tensor | None


@pytest.mark.parametrize(
    "wrap", [lambda x: Output(x, None), lambda x: {"logits": x, "loss": None}, lambda x: x[:, :, None, None]]
)
def test_obvious_logits_are_understood(wrap):
    with GradCAM(Wrapped(wrap)) as cam:
        maps, logits = cam(pictures())
    assert logits.shape == (3, 3)
    assert maps.shape == (3, 6, 8)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda x: (x, x), r"must return logits \(N, num_logits\), got a tuple of 2; wrap it"),
        (lambda x: {"out": x}, r"got a dict with the keys \['out'\]"),
        (lambda x: x[:2], r"must return logits of shape \(3, num_logits\), got torch.float32 of shape \(2, 3\)"),
        (lambda x: x[:, :, None].repeat(1, 1, 2), r"of shape \(3, 3, 2\)"),
        (lambda x: x.argmax(1), r"got torch.int64 of shape \(3,\)"),
    ],
)
def test_other_outputs_are_refused(wrap, message):
    with GradCAM(Wrapped(wrap)) as cam, pytest.raises(ValueError, match=message):
        cam(pictures())


def test_height_and_width_are_not_swapped():
    conv, linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2)
    nn.init.constant_(conv.weight, 0.1)
    nn.init.constant_(linear.weight, 1.0)
    images = torch.zeros(1, 3, 8, 20)
    images[:, :, 2:4, 16:18] = 5.0
    with GradCAM(nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)) as cam:
        maps, _ = cam(images)
    assert maps.shape == (1, 4, 10)
    assert divmod(int(maps.argmax()), 10) == (1, 8)


@pytest.mark.parametrize("end", ["adaptive", "tokens"])
def test_one_open_cam_takes_images_of_several_sizes_and_says_which_layer(end):
    name = {"adaptive": "adaptive_avg_pool2d (N, 12, {}, {})", "tokens": "mean (N, {}, 12)"}[end]
    with GradCAM(small(end)) as cam:
        assert cam.layer == "auto"
        for h, w in [(4, 6), (8, 3), (4, 6)]:
            assert cam(pictures(2, 2 * h, 2 * w)).maps.shape == (2, h, w)
            cells = (h, w) if end == "adaptive" else (h * w,)
            assert cam.layer == "auto: input of " + name.format(*cells)


def test_the_recorded_layer_does_not_depend_on_the_batch():
    with GradCAM(small(), "last") as cam:
        seen = {cam(pictures(n)).maps.shape[0]: cam.layer for n in (1, 4)}
    assert set(seen.values()) == {"output of last (N, 12, 6, 8)"}
