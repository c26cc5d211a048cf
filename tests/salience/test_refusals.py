"""Models, layers, images and classes that Grad-CAM refuses, and what it says."""

import pytest
import timm
import torch
from small_networks import pictures, small
from torch import Tensor, nn

from explain2me.errors import LayerError
from explain2me.salience.gradcam import GradCAM


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
        with pytest.raises(LayerError, match=r"'stem' is compiled; give the model from before"):
            GradCAM(model, layer).__enter__()
    GradCAM(model, "last").__enter__()


def test_a_map_may_be_dead_with_a_right_prediction():
    model, images = small("mean", 2), pictures()
    nn.init.constant_(model.head[0].weight, -1.0)
    with GradCAM(model) as cam:
        maps, logits = cam(images)
    assert logits.isfinite().all()
    assert (maps == 0).all()


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
        (torch.tensor([0, 1]), r"with N = 3, got torch.int64 of shape \(2,\); give one row for each image"),
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
