"""Build a detector: an architecture by name, its weights, and its preprocessing."""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from explain2me.detectors.architectures import (
    build_model,
    check_architecture,
    classifier_of,
    logits_of_head,
    num_logits_of,
    reading_settings,
)
from explain2me.detectors.checkpoints import AUXILIARY, first_few, read_checkpoint
from explain2me.errors import CheckpointError


@dataclass(frozen=True)
class Detector:
    """A classifier and its preprocessing.

    Attributes:
        model: in evaluation mode, on the CPU.
        architecture: ``timm:NAME`` or ``torchvision:NAME``.
        input_size: height and width in pixels.
        mean, std: one value for each channel, for pixel values in [0, 1].
        interpolation: for the resize of the whole image to ``input_size``, such as ``bilinear``.
        num_classes: 2 for a model with a single logit.
        weights_sha256: hash of the checkpoint file; without a checkpoint, of the tensors.
    """

    model: nn.Module
    architecture: str
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    num_classes: int
    weights_sha256: str

    def preprocess(self, images: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
        """Scale the pixels to [0, 1], subtract ``mean`` and divide by ``std``; float32, channels last.

        Raises:
            ValueError: the images are not uint8 (N, 3, H, W), with H and W equal to ``input_size``.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.input_size):
            raise ValueError(
                f"images must be uint8 of shape (N, 3, {self.input_size[0]}, {self.input_size[1]}), got {images.dtype} of "
                f"shape {tuple(images.shape)}; give resized RGB images with values 0 to 255"
            )
        scale, shift = _scale_and_shift(self.mean, self.std, images.device)
        # converting bytes to channels last is much faster than converting floats
        result = images.contiguous(memory_format=torch.channels_last).float()
        return result.mul_(scale).add_(shift)


@functools.lru_cache(maxsize=32)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """Scale and shift of each channel, cached on the device: a new copy would wait for the device's queue."""
    with torch.inference_mode(False):
        scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32, device=device)
        shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32, device=device)
    return scale[:, None, None], shift[:, None, None]


def load_detector(
    architecture: str,
    checkpoint: str | Path | None = None,
    *,
    num_classes: int | None = None,
    pretrained: bool | str = False,
    input_size: int | tuple[int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    interpolation: str | None = None,
    seed: int = 0,
    new_head: bool = False,
) -> Detector:
    """Build a classifier by name and load its weights; the global random state does not change.

    Args:
        architecture: ``timm:NAME`` or ``torchvision:NAME``.
        checkpoint: a safetensors file, or a file of ``torch.save`` that holds tensors only. Nested state dicts and the
            prefixes of wrappers (``module.``, ``model.``) are removed. None: pretrained or random weights.
        num_classes: the expected number; None takes that of the checkpoint. For 2, a head with one logit is accepted.
        pretrained: used without a checkpoint. True: the library's default weights, which timm or torchvision downloads.
            A name such as ``IMAGENET1K_V1``: these weights of torchvision. For timm, write ``timm:NAME.TAG`` instead.
        input_size: height and width in pixels; None takes the model's own.
        mean: one value for each channel, for pixel values in [0, 1]; None takes the model's own.
        std: as ``mean``.
        interpolation: for the resize, such as ``bilinear``; None takes the model's own.
        seed: for random weights.
        new_head: where pretrained weights have another number of classes, replace the head by one with random weights,
            to be trained.

    Raises:
        ConfigError: unknown architecture or pretrained weights; the message offers the nearest names.
        CheckpointError: the file is missing, damaged or unsafe, does not fit the architecture or the number of classes,
            or holds values that are not finite; or the pretrained weights cannot be loaded.
    """
    library, name = check_architecture(architecture)
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    state, sha256 = (None, None) if checkpoint is None else read_checkpoint(Path(checkpoint))
    build = functools.partial(build_model, library, name, size=size, state=state)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU too
        model = build(num_classes, pretrained=pretrained, new_head=new_head)
        if state is not None:
            num_logits = logits_of_head(model, state, num_classes, architecture, str(checkpoint))
            if num_logits not in (None, num_logits_of(model)):
                model = build(num_logits, pretrained=False)
            _load(model, state, architecture, str(checkpoint))
    settings = reading_settings(library, name, model, pretrained)
    return Detector(
        model=model.eval(),
        architecture=architecture,
        input_size=size or settings["input_size"],
        mean=mean or settings["mean"],
        std=std or settings["std"],
        interpolation=interpolation or settings["interpolation"],
        num_classes=max(num_logits_of(model), 2),
        weights_sha256=sha256 or sha256_of_tensors(model),
    )


def _load(model: nn.Module, state: dict[str, Tensor], architecture: str, checkpoint: str) -> None:
    """Copy the weights of a checkpoint; every name and shape must fit, and every value must be finite."""
    expected = model.state_dict()
    weights = {key: value for key, value in state.items() if key in expected or not key.startswith(AUXILIARY)}
    missing = [key for key in expected if key not in weights and not key.endswith("num_batches_tracked")]
    unknown = [key for key in weights if key not in expected]
    misfit = f"checkpoint {checkpoint!r} does not fit {architecture}"
    todo = f"give a checkpoint of {architecture}, or set the architecture of this one"
    if missing or unknown:
        raise CheckpointError(
            f"{misfit}: {len(missing)} of {len(expected)} weights are missing{first_few(missing)} and {len(unknown)} are "
            f"unknown{first_few(unknown)}; {todo}"
        )
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            shapes = f"{tuple(expected[key].shape)}, got {tuple(value.shape)}"
            raise CheckpointError(f"{misfit}: {key} must be of shape {shapes}; {todo}")
        _check_values(key, value, expected[key].dtype, checkpoint)
    model.load_state_dict(weights, strict=False)


def _check_values(key: str, value: Tensor, dtype: torch.dtype, checkpoint: str) -> None:
    if dtype.is_floating_point and not value.is_floating_point():
        raise CheckpointError(
            f"checkpoint {checkpoint!r}: {key} must hold floating point numbers, got {value.dtype}; save the floating "
            f"point model"
        )
    if value.is_floating_point() and not value.isfinite().all():
        count = int((~value.isfinite()).sum())
        raise CheckpointError(
            f"checkpoint {checkpoint!r}: {count} of {value.numel()} values of {key} are not finite; give a checkpoint "
            f"whose values are all finite"
        )


def sha256_without_head(model: nn.Module) -> str:
    """Hash of all tensors but those of the last layer, which is random where the number of classes changes."""
    return sha256_of_tensors(model, skip_prefix=f"{classifier_of(model)[0]}.")


def sha256_of_tensors(model: nn.Module, *, skip_prefix: str | None = None) -> str:
    """Hash of every tensor of a model, sorted by name; names that begin with ``skip_prefix`` are skipped."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if skip_prefix is None or not key.startswith(skip_prefix):
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
