"""Class activation maps in training: Grad-CAM before ReLU, with gradients."""

import pytest
import torch
from small_trainings import ARCHITECTURE, SIZE

from explain2me.detectors.load import load_detector
from explain2me.train.cams import class_activation_maps, find_features


@pytest.mark.parametrize("architecture", ["torchvision:resnet18", "torchvision:densenet121", "timm:test_resnet"])
def test_class_activation_maps_are_grad_cam_before_relu(architecture):
    from explain2me import GradCAM

    detector = load_detector(architecture, num_classes=3, seed=1)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    reader = find_features(detector.model, (64, 64))
    classes = torch.tensor([2, 0])
    with torch.no_grad():
        logits, features = reader(images)
        maps = class_activation_maps(
            features,
            detector.model.get_classifier().weight
            if "timm" in architecture
            else list(detector.model.modules())[-1].weight,
            classes,
        )
    with GradCAM(detector.model) as cam:
        wanted, wanted_logits = cam(images, classes)
    torch.testing.assert_close(logits, wanted_logits)
    torch.testing.assert_close(maps.relu() / maps[0].numel(), wanted, rtol=1e-4, atol=1e-6)


def test_features_carry_gradients_into_the_whole_network():
    model = load_detector(ARCHITECTURE, num_classes=2, seed=1).model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reader = find_features(model, (SIZE, SIZE))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    _, features = reader(torch.randn(2, 3, SIZE, SIZE))
    (gradient,) = torch.autograd.grad(features.square().sum(), next(model.parameters()))
    assert gradient.any()
