"""The losses against an independent float64 NumPy version, finite differences and values worked by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from explain2me.train.losses import cam_entropy, cross_entropy, guided_loss, human_difference, minmax


def numpy_loss(logits, labels, cams, human_maps, alpha, entropy_weight, class_weights=None):
    """From the formula, one image at a time; human maps have the size of the CAMs."""
    losses, weights = [], []
    for z, label, cam, human in zip(logits, labels, cams, human_maps, strict=True):
        ce = np.log(np.exp(z - z.max()).sum()) - (z[label] - z.max())
        loss = ce
        scaled = np.zeros_like(cam) if np.ptp(cam) == 0 else (cam - cam.min()) / np.ptp(cam)
        if np.isfinite(human).all() and np.ptp(human) > 0:
            wanted = (human - human.min()) / np.ptp(human)
            loss = alpha * ce + (1 - alpha) * np.mean((scaled - wanted) ** 2)
        positive = np.maximum(cam, 0)
        if positive.sum() > 0:
            p = positive.ravel() / positive.sum()
            loss += entropy_weight * -sum(x * math.log(x) for x in p if x > 0) / math.log(len(p))
        losses.append(loss)
        weights.append(1.0 if class_weights is None else class_weights[label])
    return float(np.dot(losses, weights) / np.sum(weights))


def example(num_images=6, num_classes=2, side=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_images, num_classes, generator=generator, dtype=dtype)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    cams = torch.randn(num_images, side, side, generator=generator, dtype=dtype)
    human = torch.rand(num_images, side, side, generator=generator, dtype=dtype)
    return logits, labels, cams, human


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.7])
@pytest.mark.parametrize("num_classes", [2, 5])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "class-weights"])
def test_against_numpy(alpha, entropy_weight, num_classes, weighted):
    logits, labels, cams, human = example(num_classes=num_classes)
    human[1] = torch.nan  # no human map
    human[2] = 0.25  # flat
    cams[3] = 2.0  # flat
    human[4, 2, 2] = torch.inf
    weights = torch.rand(num_classes, dtype=torch.float64) + 0.5 if weighted else None
    found = guided_loss(
        logits, labels, cams=cams, human_maps=human, alpha=alpha, entropy_weight=entropy_weight, class_weights=weights
    )
    arrays = (logits.numpy(), labels.numpy(), cams.numpy(), human.numpy())
    wanted = numpy_loss(*arrays, alpha, entropy_weight, None if weights is None else weights.numpy())
    assert found.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(("alpha", "entropy_weight"), [(0.4, 0.0), (1.0, 0.6), (0.4, 0.6)])
def test_gradients_against_finite_differences(alpha, entropy_weight):
    logits, labels, cams, human = example(num_images=3, side=3)
    human[1] = torch.nan

    def loss(logits, cams):
        return guided_loss(logits, labels, cams=cams, human_maps=human, alpha=alpha, entropy_weight=entropy_weight)

    # corners are at the smallest and the largest cell and at 0: the cells are moved away from there
    for cam in cams:
        cam.view(-1)[cam.argmin()] -= 0.5
        cam.view(-1)[cam.argmax()] += 0.5
    cams += 0.05 * cams.sign()
    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(), cams.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_1_is_plain_cross_entropy_to_the_last_bit(dtype):
    logits, labels, cams, human = example(num_images=37, num_classes=3, dtype=dtype)
    logits.requires_grad_()
    found = guided_loss(logits, labels, cams=cams, human_maps=human, alpha=1.0)
    plain = F.cross_entropy(logits, labels)
    assert torch.equal(found, plain)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (found, plain)))


def test_no_human_map_at_all_is_plain_cross_entropy():
    logits, labels, cams, human = example()
    found = guided_loss(logits, labels, cams=cams, human_maps=torch.full_like(human, torch.nan), alpha=0.2)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels))


@pytest.mark.parametrize("what", ["flat CAM", "zero CAM", "flat human map", "zero human map", "no human map"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_finite(what, dtype):
    logits, labels, cams, human = example(dtype=torch.float32)
    if "CAM" in what:
        cams[:] = 3.0 if "flat" in what else 0.0
    else:
        human[:] = {"flat human map": 0.5, "zero human map": 0.0, "no human map": torch.nan}[what]
    logits, cams = logits.to(dtype).requires_grad_(), cams.to(dtype).requires_grad_()
    loss = guided_loss(logits, labels, cams=cams, human_maps=human, alpha=0.5, entropy_weight=0.3)
    gradients = torch.autograd.grad(loss, [logits, cams])
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    if "CAM" in what:
        assert not gradients[1].any()


@pytest.mark.parametrize("left", [1e-7, 1e-11])
def test_what_is_left_of_a_map_that_is_all_but_dead_does_not_rule_the_step(left):
    cams = torch.full((2, 7, 7), -1.0)
    cams[0, 0, :2] = torch.tensor([left, 3 * left])
    cams[1, 0, :2] = torch.tensor([0.1, 0.3])
    cams.requires_grad_()
    (gradient,) = torch.autograd.grad(cam_entropy(cams).sum(), cams)
    assert not gradient[0].any()
    assert 0.1 < gradient[1].abs().max() < 10


def test_the_scale_of_the_maps_does_not_matter():
    logits, labels, cams, human = example()
    same = guided_loss(logits, labels, cams=cams * 1e-4 + 7, human_maps=human * 255)
    torch.testing.assert_close(same, guided_loss(logits, labels, cams=cams, human_maps=human))
    same = guided_loss(logits, labels, cams=cams * 1e-4, alpha=1.0, entropy_weight=0.5)
    torch.testing.assert_close(same, guided_loss(logits, labels, cams=cams, alpha=1.0, entropy_weight=0.5))


def test_the_entropy_is_that_of_the_measure():
    from explain2me.measures import entropy

    cams = torch.randn(9, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(cam_entropy(cams), entropy(cams.relu(), estimator="spatial"))
    assert cam_entropy(-cams.abs()).eq(0).all()


def test_human_maps_are_resized_to_the_cams():
    cams = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    human = torch.zeros(1, 8, 8)
    human[0, :4, 4:] = 9.0
    difference, says_where = human_difference(cams, human)
    assert difference.item() < 0.05
    assert human_difference(cams, human.flip(2))[0].item() > 0.4
    assert says_where.all()
    human[0, 0, 7] = 100.0  # resized first, then scaled: the brightest pixel alone decides nothing
    resized = F.interpolate(human[None], (2, 2), mode="bilinear", antialias=True)[0]
    assert human_difference(resized, human)[0].item() < 1e-12


def test_a_single_logit_is_the_loss_of_its_sigmoid():
    logits, labels = torch.tensor([[0.3], [-2.0]]), torch.tensor([1, 0])
    wanted = F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
    torch.testing.assert_close(cross_entropy(logits, labels), wanted)


def test_entropy_is_low_where_one_cell_stands_out():
    cams = torch.full((2, 7, 7), -0.5)
    cams[0, 3, 3] = 1.0
    cams[1] = torch.rand(7, 7) + 5.0
    focused, spread = cam_entropy(cams).tolist()
    assert focused == 0.0
    assert 0.8 < spread < 1.0


def test_minmax_of_a_map_that_varies_by_rounding_only():
    scaled, varies = minmax(torch.full((1, 3, 3), 1000.0) + 1e-4 * torch.rand(1, 3, 3))
    assert not varies.any()
    assert not scaled.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 1.5}, "alpha in"),
        ({"alpha": float("nan")}, "alpha in"),
        ({"entropy_weight": -1.0}, "entropy_weight >= 0"),
        ({"cams": None}, "needs cams"),
        ({"human_maps": torch.ones(2, 5, 5)}, r"human_maps must be floating point of shape \(6, h, w\)"),
        ({"cams": torch.ones(6, 5, 5, dtype=torch.uint8)}, "cams must be floating point"),
    ],
    ids=str,
)
def test_wrong_input(change, message):
    logits, labels, cams, human = example()
    with pytest.raises(ValueError, match=message):
        guided_loss(logits, labels, **({"cams": cams, "human_maps": human} | change))
