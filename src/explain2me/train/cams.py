"""Class activation maps with gradients, from the forward pass that training makes anyway."""

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from explain2me.detectors.architectures import classifier_of
from explain2me.errors import ConfigError, LayerError
from explain2me.salience.grids import Grid
from explain2me.salience.layers import CallInput, ModuleTensor, find_layer

USUAL_SIZE = 224
"""Pixels a side at which a smaller input is tried again, to see whether only its size is in the way of a map."""


class Pass(NamedTuple):
    """``logits`` (N, num_logits) and the ``features`` (N, C, h, w) that entered global pooling, both with gradients."""

    logits: Float[Tensor, "N num_logits"]
    features: Float[Tensor, "N C h w"]


def class_activation_maps(
    features: Float[Tensor, "N C h w"], weights: Float[Tensor, "num_logits C"], classes: Int[Tensor, " N"]
) -> Float[Tensor, "N h w"]:
    """The head's weights of each image's class times its feature maps: any sign, native resolution, float32 or better.

    With a single logit the weights of class 0 are those of class 1 negated. Zhou et al. 2016, eq. 2; for a head that is
    linear behind global average pooling Grad-CAM is this map after ReLU, up to the number of cells.

    >>> class_activation_maps(torch.tensor([[[[1.0, 2.0]], [[5.0, 0.0]]]]), torch.eye(2), torch.tensor([1]))
    tensor([[[5., 0.]]])
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if len(weights) == 1:
        weights = torch.cat([-weights, weights])
    return torch.einsum("nc,nchw->nhw", weights.to(features)[classes], features)


@dataclass(frozen=True)
class FeatureReader:
    """Runs a model and keeps what enters its global pooling; hooked only meanwhile.

    Make it with :func:`find_features`.
    """

    model: nn.Module
    place: CallInput | ModuleTensor

    def __call__(self, images: Float[Tensor, "N 3 H W"]) -> Pass:
        """One forward pass as it would have been, in the model's mode."""
        kept = _Kept()
        logits = self.place.run(self.model, images, kept)
        if kept.features is None or kept.grid is None:
            raise LayerError(f"{self.place.layer} was not reached in this forward pass")
        return Pass(logits, kept.grid.spread(kept.features))


def find_features(model: nn.Module, input_size: tuple[int, int]) -> FeatureReader:
    """Find what enters global average pooling, and make sure that a linear head is all that follows.

    The model's mode, buffers and the global random state are left as they are.

    Args:
        model: returns logits (N, num_logits).
        input_size: height and width in pixels.

    Raises:
        ConfigError: the logits are not a linear function of the pooled features, so no class activation map exists; or the
            input is too small for one.
    """
    reader = _linear_reader(model, input_size)
    if reader is not None:
        return reader
    fits_larger = False
    if max(input_size) < USUAL_SIZE:
        with contextlib.suppress(Exception):  # some take one size only
            fits_larger = _linear_reader(model, (USUAL_SIZE, USUAL_SIZE)) is not None
    if fits_larger:
        raise ConfigError(
            f"guided training of {type(model).__name__}: images of {input_size[0]} x {input_size[1]} pixels leave no map to guide in "
            f"front of its global average pooling; set a larger input_size, such as {USUAL_SIZE}"
        )
    name, _ = classifier_of(model)
    raise ConfigError(
        f"guided training needs a linear head right behind global average pooling, so that a class activation map "
        f"exists; {type(model).__name__} has more than {name!r} there. Train it with cross-entropy, or take ResNet, "
        f"DenseNet, EfficientNet, Inception or Xception"
    )


def _linear_reader(model: nn.Module, input_size: tuple[int, int]) -> FeatureReader | None:
    """None where the logits are not a linear function of the mean of what is read."""
    _, head = classifier_of(model)
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    images = torch.randn(2, 3, *input_size, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            reader = FeatureReader(model, find_layer(model, images))
            logits, features = reader(images)
            weights = head.weight.flatten(1)
            fits = features.shape[1] == weights.shape[1]
            pooled = features.mean((2, 3)) @ weights.T if fits else torch.full_like(logits, torch.nan)
            expected = pooled if head.bias is None else pooled + head.bias
    except LayerError as error:
        raise ConfigError(f"guided training of {type(model).__name__}: {error}") from None
    finally:
        for module, training in modes.items():
            module.training = training
    scale = logits.abs().max().clamp_min(1e-3)
    return reader if bool(((logits - expected).abs() <= 1e-2 * scale).all()) else None


class _Kept:
    """Keep the tensor at the place that is read, and let the pass continue with it."""

    features: Tensor | None = None
    grid: Grid | None = None

    def at(self, features: Tensor, grid: Grid, layer: str) -> Tensor:
        """Keep it; the last one counts."""
        self.features, self.grid = features, grid
        return features
