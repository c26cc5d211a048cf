"""Grad-CAM against a naive full backward pass in float64 and against TorchCAM; heads, layers, traps and manners."""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from explain2me.errors import LayerError
from explain2me.salience.gradcam import GradCAM, gradcam, predicted_classes
from explain2me.salience.grids import token_grid


def naive(
    model: nn.Module,
    module: nn.Module,
    images: Tensor,
    classes: Tensor,
    to_nchw: Callable[[Tensor], Tensor] = lambda x: x,
) -> np.ndarray:
    """Maps (N, K, h, w) from the formula: one full backward pass for each image and class, summed in numpy."""
    kept: list[Tensor] = []
    handle = module.register_forward_hook(lambda *arguments: kept.append(arguments[-1]))
    modes = {part: part.training for part in model.modules()}
    model.eval()
    maps = np.zeros((*classes.shape, 0, 0))
    for n in range(len(images)):
        for k, c in enumerate(classes[n].tolist()):
            kept.clear()
            logits = model(images[n : n + 1]).reshape(1, -1)
            score = (logits[0, 0] if c else -logits[0, 0]) if logits.shape[1] == 1 else logits[0, c]
            (gradient,) = torch.autograd.grad(score, kept[-1])
            a, g = (to_nchw(x.detach())[0].double().numpy() for x in (kept[-1], gradient))
            cam = np.zeros(a.shape[1:])
            for channel in range(len(a)):
                cam += g[channel].mean() * a[channel]
            if maps.size == 0:
                maps = np.zeros((*classes.shape, *cam.shape))
            maps[n, k] = np.maximum(cam, 0)
    handle.remove()
    for part, training in modes.items():
        part.training = training
    return maps


def close(got: Tensor, want: np.ndarray, rtol: float = 1e-5) -> None:
    """Equal to ``rtol`` of the largest value; neither side may be all zero."""
    assert got.shape == want.shape
    assert np.abs(want).max() > 0
    np.testing.assert_allclose(got.double().numpy(), want, rtol=0, atol=rtol * np.abs(want).max())


class Body(nn.Module):
    """A small CNN with every trap: squeeze-and-excitation pooling before the end, in-place ReLU behind the last map."""

    def __init__(self, end: str, head: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        self.gate = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 12, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.end = end
        self.drop = nn.Dropout(0.5)
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        x = self.act(self.last(x))
        ends: dict[str, Callable[[], Tensor]] = {
            "adaptive": lambda: F.adaptive_avg_pool2d(x, 1).flatten(1),
            "avg_pool": lambda: F.avg_pool2d(x, x.shape[2:]).flatten(1),
            "mean": lambda: x.mean((2, 3)),
            "mean keyword": lambda: torch.mean(x, dim=(-1, -2)),
            "flat mean": lambda: x.flatten(2).mean(-1),
            "nhwc": lambda: x.permute(0, 2, 3, 1).mean((1, 2)),
            "tokens": lambda: x.flatten(2).transpose(1, 2).mean(1),
            "max": lambda: F.adaptive_max_pool2d(x, 1).flatten(1),
            "avg and max": lambda: 0.5 * F.adaptive_avg_pool2d(x, 1).flatten(1) + 0.5 * x.amax((2, 3)),
            "einsum": lambda: torch.einsum("nchw->nc", x),
            "attention": lambda: torch.cat([x.mean((2, 3)), (x * x[:, :1].sigmoid()).sum((2, 3))], 1)[:, 6:18],
            "flatten": lambda: x.flatten(1),
        }
        return self.head(self.drop(ends[self.end]()))


ENDS = [
    "adaptive",
    "avg_pool",
    "mean",
    "mean keyword",
    "flat mean",
    "nhwc",
    "tokens",
    "max",
    "avg and max",
    "einsum",
    "flatten",
]


def small(end: str = "adaptive", num_logits: int = 3, *, hidden: bool = False, seed: int = 0, cells: int = 48) -> Body:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        width = 12 * (cells if end == "flatten" else 1)
        parts = [nn.Linear(width, 7), nn.GELU(), nn.Linear(7, num_logits)] if hidden else [nn.Linear(width, num_logits)]
        return Body(end, nn.Sequential(*parts))


def pictures(n: int = 3, h: int = 12, w: int = 16, *, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(n * 1000 + h), dtype=dtype)


def every_class(images: Tensor, num_classes: int) -> Tensor:
    return torch.arange(num_classes).expand(len(images), num_classes)


# ------------------------------------------------------------------ exactness


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
    with pytest.raises(ValueError, match=r"must have one shape \(N, C, h, w\), got \("):
        gradcam(torch.zeros(a), torch.zeros(g))


# ---------------------------------------------------------------------- heads


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


# ------------------------------------------------------------- shapes, layers


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


def test_an_unknown_layer_offers_the_nearest_names():
    with pytest.raises(LayerError, match=r"Body has no layer 'lats'; did you mean 'last'"), GradCAM(small(), "lats"):
        pass


@pytest.mark.parametrize("layer", ["head", "head.0", "stem.2 "])
def test_a_layer_without_a_map_says_so(layer):
    if layer.endswith(" "):
        with pytest.raises(LayerError, match="no layer"):
            GradCAM(small(), layer).__enter__()
        return
    with (
        GradCAM(small(), layer) as cam,
        pytest.raises(LayerError, match=rf"{layer} has shape \(3, 3\).*before pooling"),
    ):
        cam(pictures())


def test_a_layer_that_the_pass_does_not_reach_says_so():
    model = small()
    model.unused = nn.Conv2d(3, 3, 1)
    with GradCAM(model, "unused") as cam, pytest.raises(LayerError, match="was not reached"):
        cam(pictures())


def test_a_layer_that_the_logits_do_not_depend_on_says_so():
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.aside = small(), nn.Conv2d(3, 3, 1)

        def forward(self, images: Tensor) -> Tensor:
            self.aside(images)
            return self.inner(images)

    with GradCAM(Aside(), "aside") as cam, pytest.raises(LayerError, match="do not depend on the output of aside"):
        cam(pictures())


def test_images_too_small_for_a_map_are_refused_and_no_earlier_pooling_is_taken():
    model = timm.create_model("test_efficientnet", num_classes=2)
    with (
        GradCAM(model) as cam,
        pytest.raises(LayerError, match=r"more than one cell.*\(N, 3, 32, 32\); give larger images"),
    ):
        cam(pictures(2, 32, 32))


def test_a_model_without_any_map_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with GradCAM(model) as cam, pytest.raises(LayerError, match="layer 'auto': no map"):
        cam(pictures())


@pytest.mark.parametrize("really", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_model_is_refused_with_advice(really):
    model = small()
    if really:
        model.stem.compile()
    else:
        model.stem._compiled_call_impl = model.stem._call_impl
    for layer in ("auto", "stem", "stem.0"):
        with pytest.raises(LayerError, match=r"'stem' is compiled; give the model as it was"):
            GradCAM(model, layer).__enter__()
    GradCAM(model, "last").__enter__()


def test_a_map_may_be_dead_with_a_right_prediction():
    model, images = small("mean", 2), pictures()
    nn.init.constant_(model.head[0].weight, -1.0)
    with GradCAM(model) as cam:
        maps, logits = cam(images)
    assert logits.isfinite().all()
    assert (maps == 0).all()


# -------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 3, 8, 8), r"N at least 1, got torch.float32 of shape \(0, 3, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"shape \(N, C, H, W\).*got torch.float32 of shape \(3, 8, 8\); .*images\[None\]"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"floating point.*got torch.uint8.*Detector.preprocess"),
    ],
)
def test_wrong_images(images, message):
    with GradCAM(small()) as cam, pytest.raises(ValueError, match=message):
        cam(images)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (torch.tensor([0, 1]), r"with N = 3, a row for each image, got torch.int64 of shape \(2,\)"),
        (torch.tensor([[0, 1, 2, 0]]), r"got torch.int64 of shape \(1, 4\)"),
        (torch.tensor([0.0, 1.0, 1.0]), r"must be integers.*got torch.float32"),
        (torch.tensor([True, True, False]), r"must be integers.*got torch.bool"),
        (torch.zeros(3, 0, dtype=torch.long), r"shape \(3, 0\)"),
        (torch.tensor([0, 3, 1]), r"classes must be in 0..2 for 3 logits, got values from 0 to 3"),
        (torch.tensor([[0], [-1], [1]]), r"got values from -1 to 1"),
    ],
)
def test_wrong_classes(classes, message):
    with GradCAM(small()) as cam:
        with pytest.raises(ValueError, match=message):
            cam(pictures(), classes)
        with pytest.raises(ValueError, match="classes must be"):
            cam.explain(pictures(), lambda _: classes)


def test_class_2_of_a_single_logit_is_refused():
    with GradCAM(small(num_logits=1)) as cam, pytest.raises(ValueError, match=r"in 0..1 for 1 logits"):
        cam(pictures(), torch.tensor([0, 1, 2]))


# ------------------------------------------------------- leaves all as found


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
    with pytest.raises(RuntimeError, match="inside its block only"):
        cam(pictures())
    with cam:
        with pytest.raises(RuntimeError, match="open already"):
            cam.__enter__()
        want = cam(pictures()).maps
    with pytest.raises(RuntimeError, match="inside its block only"):
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


def test_a_thousand_batches_leak_nothing():
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
                for _ in range(500):
                    opened(images, classes)
                alive = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
            finally:
                gc.enable()
            assert alive <= before
            assert tensors() <= before
        assert state_of(model)[4] == hooks


# ------------------------------------------------------------------- precision


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
        pytest.raises(LayerError, match=r"does not run under a torch.no_grad\(\) of its own"),
    ):
        cam(pictures())


def test_memory_format_changes_nothing_but_the_last_bits():
    model, images = small(hidden=True), pictures()
    with GradCAM(model) as cam:
        want = cam(images)
        model.to(memory_format=torch.channels_last)
        got = cam(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(got.maps, want.maps, rtol=1e-5, atol=1e-7)


# -------------------------------------------------------------- architectures


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def tokens(prefix: int) -> Callable[[Tensor], Tensor]:
    def to_nchw(x: Tensor) -> Tensor:
        side = round((x.shape[1] - prefix) ** 0.5)
        return x[:, prefix:].transpose(1, 2).unflatten(2, (side, side))

    return to_nchw


QUICK = [
    # architecture, side, the module whose output enters pooling, its layout, cells
    ("torchvision:resnet18", 64, "layer4", None, 2),
    ("torchvision:densenet121", 64, "features", None, 2),
    ("torchvision:efficientnet_b0", 64, "features", None, 2),
    ("torchvision:mobilenet_v3_small", 64, "features", None, 2),
    ("torchvision:swin_t", 64, "norm", nhwc, 2),
    ("timm:resnet10t", 64, "layer4", None, 2),
    ("timm:convnext_atto", 64, "stages", None, 2),
    ("timm:legacy_xception", 96, "act4", None, 3),
    ("timm:vit_tiny_patch16_224", 224, "blocks.11.norm1", tokens(1), 14),
    ("timm:deit_tiny_distilled_patch16_224", 224, "blocks.11.norm1", tokens(2), 14),
    ("timm:test_vit", 160, "blocks.5.norm1", tokens(1), 10),
    ("timm:test_vit2", 160, "norm", tokens(1), 10),
    ("timm:test_vit3", 160, "norm", tokens(1), 10),
    ("timm:test_mambaout", 160, "stages", nhwc, 5),
]
SWEEP = [
    ("torchvision:resnet50", 64, "layer4", None, 2),
    ("torchvision:convnext_tiny", 64, "features", None, 2),
    ("torchvision:mobilenet_v2", 64, "features", None, 2),
    ("torchvision:inception_v3", 128, "Mixed_7c", None, 2),
    ("torchvision:shufflenet_v2_x0_5", 64, "conv5", None, 2),
    ("torchvision:regnet_y_400mf", 64, "trunk_output", None, 2),
    ("torchvision:googlenet", 64, "inception5b", None, 2),
    ("torchvision:mnasnet0_5", 64, "layers", None, 2),
    ("torchvision:squeezenet1_1", 64, "classifier.2", None, 3),
    ("torchvision:vgg11", 64, "avgpool", None, 7),
    ("torchvision:vit_b_32", 224, "encoder.layers.encoder_layer_11.ln_1", tokens(1), 7),
    ("torchvision:swin_v2_t", 64, "norm", nhwc, 2),
    ("timm:densenet121", 64, "features", None, 2),
    ("timm:efficientnet_b0", 64, "bn2", None, 2),
    ("timm:mobilenetv3_small_050", 64, "blocks", None, 2),
    ("timm:xception41", 96, "act", None, 3),
    ("timm:inception_v3", 128, "Mixed_7c", None, 2),
    ("timm:vgg11", 224, "features", None, 7),
    ("timm:swin_tiny_patch4_window7_224", 224, "norm", nhwc, 7),
    ("timm:test_vit4", 160, "norm", tokens(1), 10),
    ("timm:pit_ti_distilled_224", 224, "transformers.2.blocks.3.norm1", tokens(2), 7),
    ("timm:mixer_s32_224", 224, "norm", tokens(0), 7),
    ("timm:xcit_nano_12_p16_224", 224, "cls_attn_blocks.1.norm1", tokens(1), 14),
    ("timm:pvt_v2_b0", 64, "stages", None, 2),
    ("timm:test_convnext", 160, "stages", None, 5),
    ("timm:test_efficientnet", 160, "bn2", None, 5),
    ("timm:test_resnet", 160, "layer4", None, 5),
]


@pytest.mark.parametrize(
    ("architecture", "side", "layer", "to_nchw", "cells"),
    [pytest.param(*case, id=case[0]) for case in QUICK]
    + [pytest.param(*case, id=case[0], marks=pytest.mark.slow) for case in SWEEP],
)
def test_auto_finds_the_layer_of_every_architecture(architecture, side, layer, to_nchw, cells):
    library, _, name = architecture.partition(":")
    options = {"init_weights": False, "aux_logits": False} if library == "torchvision" and name in AUXILIARY else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make = timm.create_model if library == "timm" else torchvision.models.get_model
        model = make(name, num_classes=4, **options).eval()
        head = [part for part in model.modules() if isinstance(part, nn.Linear | nn.Conv2d)][-1]
        nn.init.normal_(head.weight)  # some libraries start it at zero
    images = pictures(2, side, side)
    classes = torch.tensor([[0, 1], [2, 3]])
    with torch.no_grad():
        bare = model(images)
    with GradCAM(model) as cam:
        maps, logits = cam(images, classes)
        assert cam(images[:1], classes[:1]).maps.shape == (1, 2, cells, cells)
    assert maps.shape == (2, 2, cells, cells)
    torch.testing.assert_close(logits, bare, rtol=1e-5, atol=1e-5)  # not equal: attention has a fast path of its own
    close(maps, naive(model, model.get_submodule(layer), images, classes, to_nchw or (lambda x: x)), rtol=2e-4)


AUXILIARY = ("inception_v3", "googlenet")


@pytest.mark.slow
def test_transformers_with_registers_and_non_square_images():
    for name, size, cells in [
        ("vit_small_patch14_reg4_dinov2", (56, 84), (4, 6)),
        ("vit_tiny_patch16_224", (64, 96), (4, 6)),
        ("swin_tiny_patch4_window7_224", (224, 448), (7, 14)),
    ]:
        model = timm.create_model(name, num_classes=3, img_size=size)
        with GradCAM(model) as cam:
            maps, _ = cam(pictures(2, *size), torch.tensor([[0, 1, 2], [0, 1, 2]]))
        assert maps.shape == (2, 3, *cells)
        assert maps.flatten(2).sum(2).gt(0).any(1).all()


@pytest.mark.parametrize("num_prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("told", [False, True])
def test_prefix_tokens_of_every_shape_of_image(num_prefix, told):
    for h in range(3, 24):
        for w in range(3, 24):
            grid = token_grid(num_prefix + h * w, (16 * h, 16 * w), num_prefix if told else None)
            assert grid == ("NLC", h, w, num_prefix)


def test_tokens_of_images_that_are_no_multiples_of_the_patch():
    for height in range(200, 601, 20):
        for width in range(200, 601, 20):
            for h, w in ((height // 32, width // 32), (-(-height // 32), -(-width // 32))):
                assert token_grid(h * w, (height, width), None) == ("NLC", h, w, 0)
                assert token_grid(h * w + 1, (height, width), 1) == ("NLC", h, w, 1)


def test_a_layer_behind_which_only_the_class_token_counts_is_refused():
    model = timm.create_model("test_vit", num_classes=2)
    with (
        GradCAM(model, "blocks.5") as cam,
        pytest.raises(LayerError, match=r"class token of the .* only, not on its grid"),
    ):
        cam(pictures(2, 160, 160))
    with GradCAM(model, "blocks.4") as cam:
        assert cam(pictures(2, 160, 160), every_class(pictures(2), 2)).maps.flatten(1).sum(1).gt(0).all()
