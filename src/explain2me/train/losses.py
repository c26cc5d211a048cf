"""What training minimises: cross-entropy, human guidance (CYBORG) and low entropy of the map, from one forward pass.

Pure functions on tensors. A class activation map (CAM) is the weights of a class in the linear head times the feature
maps that enter global pooling; :mod:`explain2me.train.cams` keeps those of the pass that classifies anyway.

To add a loss: its name and options in ``StrategyConfig`` (``config/training.py``), its term here, its call in
``loss_of`` (``train/loop.py``), and ``needs_human_maps`` (``train/human_maps.py``) where it reads human maps.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

FLAT_RANGE = 1e-6
"""A map with max - min below this share of its largest magnitude says nothing, nor does one below DEAD_SUM: scaling would
magnify rounding."""


DEAD_SUM = 1e-12
"""A map whose cells add up to no more is dead."""


def guided_loss(
    logits: Float[Tensor, "N num_logits"],
    labels: Int[Tensor, " N"],
    *,
    cams: Float[Tensor, "N h w"] | None = None,
    human_maps: Float[Tensor, "N a b"] | None = None,
    alpha: float = 0.5,
    entropy_weight: float = 0.0,
    class_weights: Float[Tensor, " C"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over images of ``alpha CE + (1 - alpha) MSE(minmax(CAM), minmax(human map)) + entropy_weight S_entropy(CAM)``.

    Without ``human_maps`` the first two terms are cross-entropy alone, as they are for each image whose human map is
    not finite (NaN: there is none) or flat. A flat CAM is compared as zeros and gives no gradient; the entropy of one with
    (next to) nothing above 0 counts as 0. Everything is float32 or better. With nothing to guide (alpha 1 or no human
    maps, entropy_weight 0) this *is* ``torch.nn.functional.cross_entropy``. CYBORG: Boyd et al., WACV 2023. Entropy: the idea
    of Piland et al., arXiv 2303.00818, with the measure of 3.1 and as a further term.

    Args:
        logits: two or more, or a single one: the score of class 1, with the loss of a sigmoid.
        labels: 0..C-1.
        cams: of any sign, at native resolution; needed for guidance.
        human_maps: of any resolution and scale; resized to the CAMs.
        alpha: weight of cross-entropy, in [0, 1].
        entropy_weight: of the entropy of each CAM, which is in [0, 1]; at least 0.
        class_weights: of each class in the mean over images.

    Raises:
        ValueError: shapes that do not go together, or weights out of range.

    >>> logits, labels = torch.zeros(1, 2), torch.tensor([1])
    >>> cams = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    >>> guided_loss(logits, labels, cams=cams, human_maps=torch.tensor([[[0.0, 0.0], [0.0, 1.0]]]), alpha=0.0)
    tensor(0.5000)
    """
    _check(logits, labels, cams, human_maps, alpha, entropy_weight)
    if (human_maps is None or alpha == 1) and entropy_weight == 0:
        return cross_entropy(logits, labels, class_weights=class_weights)
    if cams is None:
        raise ValueError("guidance needs cams (N, h, w), got None; give the class activation maps of this pass")
    losses = F.cross_entropy(_two_logits(logits), labels, reduction="none")
    cams = cams.to(torch.promote_types(cams.dtype, torch.float32))
    if human_maps is not None and alpha < 1:
        differences, says_where = human_difference(cams, human_maps)
        losses = torch.where(says_where, alpha * losses + (1 - alpha) * differences, losses)
    if entropy_weight:
        losses = losses + entropy_weight * cam_entropy(cams)
    if class_weights is None:
        return losses.mean()
    weights = class_weights.to(losses)[labels]
    return (weights * losses).sum() / weights.sum()


def cross_entropy(
    logits: Float[Tensor, "N num_logits"],
    labels: Int[Tensor, " N"],
    *,
    class_weights: Float[Tensor, " C"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats; of a single logit that of its sigmoid. PyTorch's own, in float32 or better."""
    logits = _two_logits(logits)
    weight = None if class_weights is None else class_weights.to(logits)
    return F.cross_entropy(logits, labels, weight=weight)


def human_difference(
    cams: Float[Tensor, "N h w"], human_maps: Float[Tensor, "N a b"]
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
    """Mean squared difference of each CAM and human map, both scaled to [0, 1], and whether the human map says where.

    In [0, 1]; 0 = the model looks where people do. A human map that is not finite or flat says nothing; the difference
    is then finite and without meaning. Human maps are resized to the CAMs (bilinear, antialiased).
    """
    finite = human_maps.isfinite().all(2).all(1)
    known = torch.where(finite[:, None, None], human_maps, 0.0).to(cams.dtype)
    if known.shape[1:] != cams.shape[1:]:
        known = F.interpolate(known[:, None], cams.shape[1:], mode="bilinear", antialias=True)[:, 0]
    scaled, varies = minmax(known)
    return (minmax(cams)[0] - scaled).square().mean((1, 2)), finite & varies


def cam_entropy(cams: Float[Tensor, "N h w"]) -> Float[Tensor, " N"]:
    """Spatial entropy of each CAM after ReLU, in [0, 1]: 0 = all in one cell, 1 = spread evenly.

    The measure of 3.1 (eq. 1 and 3) itself, as a term of the loss: scaled min-max, as CYBORG compares it, a map would
    hide the even background that the measure sees. A CAM with nothing above 0 counts as 0, without a gradient, as does one
    whose positive part is below 1e-6 of the whole.

    >>> cam_entropy(torch.tensor([[[2.0, -1.0], [2.0, 0.0]]]))
    tensor([0.5000])
    """
    positive = cams.relu().flatten(1)
    total = positive.sum(1, keepdim=True)
    # The gradient is 1 / total. A map with almost no positive part would therefore dominate the step.
    live = total > (FLAT_RANGE * cams.abs().flatten(1).sum(1, keepdim=True)).clamp_min(DEAD_SUM)
    shares = positive / torch.where(live, total, 1.0)
    # 0 log 0 = 0, and its gradient is cut: x log x has none that is finite at 0
    logs = torch.where(shares > 0, shares, 1.0).log()
    entropies = -(shares * logs).sum(1) / math.log(max(positive.shape[1], 2))
    return torch.where(live[:, 0], entropies, 0.0)


def minmax(maps: Float[Tensor, "N h w"]) -> tuple[Float[Tensor, "N h w"], Bool[Tensor, " N"]]:
    """Each map, of any sign, scaled to [0, 1], and whether it varies; zeros without a gradient where it does not.

    >>> minmax(torch.tensor([[[-1.0, 3.0]], [[2.0, 2.0]]]))
    (tensor([[[0., 1.]],
             [[0., 0.]]]), tensor([ True, False]))
    """
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    varies = high - low > (FLAT_RANGE * torch.maximum(high.abs(), low.abs())).clamp_min(DEAD_SUM)
    scaled = (maps - low) / torch.where(varies, high - low, 1.0)
    return torch.where(varies, scaled, 0.0), varies[:, 0, 0]


def _two_logits(logits: Tensor) -> Tensor:
    """A single logit z as the two logits (0, z), whose softmax is its sigmoid."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits


def _check(
    logits: Tensor, labels: Tensor, cams: Tensor | None, human_maps: Tensor | None, alpha: float, entropy_weight: float
) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"expected logits (N, num_logits) and labels (N,), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    for name, maps in (("cams", cams), ("human_maps", human_maps)):
        if maps is not None and (maps.ndim != 3 or len(maps) != len(logits) or not maps.is_floating_point()):
            raise ValueError(
                f"{name} must be floating point of shape ({len(logits)}, h, w), one for each image, got {maps.dtype} of "
                f"shape {tuple(maps.shape)}"
            )
    if not 0 <= alpha <= 1 or not entropy_weight >= 0:
        raise ValueError(f"expected alpha in [0, 1] and entropy_weight >= 0, got {alpha} and {entropy_weight}")
