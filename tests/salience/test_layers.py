"""The layer that `auto` finds in every architecture, and the grids of tokens."""

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from small_networks import close, every_class, naive, pictures
from torch import Tensor, nn

from explain2me.errors import LayerError
from explain2me.salience.gradcam import GradCAM
from explain2me.salience.grids import token_grid


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
@pytest.mark.parametrize("known", [False, True])
def test_prefix_tokens_of_every_shape_of_image(num_prefix, known):
    for h in range(3, 24):
        for w in range(3, 24):
            grid = token_grid(num_prefix + h * w, (16 * h, 16 * w), num_prefix if known else None)
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
