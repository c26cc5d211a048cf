"""Checkpoints to models: an architecture by name, its weights, and its preprocessing."""

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
    reading_settings,
)
from explain2me.detectors.checkpoints import AUXILIARY, first_few, read_checkpoint
from explain2me.errors import CheckpointError


@dataclass(frozen=True)
class Detector:
    """A classifier with what it needs to read an image.

    Attributes:
        model: in evaluation mode, on the CPU.
        architecture: as asked for.
        input_size: height and width in pixels.
        mean, std: of each channel, in [0, 1].
        interpolation: of the resize of the whole image to ``input_size``.
        num_classes: 2 for a single logit.
        weights_sha256: of the checkpoint file, or of the weights where there is none.
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
        """Images 0..255 at the input size to what the model takes, float32, channels last, on the same device.

        Raises:
            ValueError: not uint8 (N, 3, H, W) of the input size.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (3, *self.input_size):
            raise ValueError(
                f"images must be uint8 of shape (N, 3, {self.input_size[0]}, {self.input_size[1]}), got {images.dtype} of "
                f"shape {tuple(images.shape)}; resize them first"
            )
        scale, shift = _scale_and_shift(self.mean, self.std, images.device)
        # the conversion to channels last is much faster on bytes than on floats
        result = images.contiguous(memory_format=torch.channels_last).float()
        return result.mul_(scale).add_(shift)


@functools.lru_cache(maxsize=32)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """Kept on the device, since sending them there would wait for all that is queued on it."""
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
    """Build a classifier by name and load its weights; the global random state is left alone.

    Args:
        architecture: ``timm:NAME`` or ``torchvision:NAME``.
        checkpoint: safetensors, or a file of ``torch.save`` that holds tensors only; nested state dicts and the prefixes
            of wrappers (``module.``, ``model.``) are taken off. None: random weights, or pretrained ones.
        num_classes: expected; None takes what the checkpoint has. With 2 a head of a single logit is accepted.
        pretrained: without a checkpoint, the library's weights (downloaded by timm or torchvision): its default ones, or
            those that torchvision names so, such as ``IMAGENET1K_V1``. timm's are named by the tag of ``timm:NAME.TAG``.
        input_size: height and width in pixels; None takes the model's own, as for the next three.
        mean: of each channel, in [0, 1].
        std: of each channel, in [0, 1].
        interpolation: of the resize, such as ``bilinear``.
        seed: of random weights.
        new_head: pretrained weights of another number of classes get a head of random weights, to be trained.

    Raises:
        ConfigError: unknown architecture or pretrained weights; the nearest names are offered.
        CheckpointError: a file that is missing, damaged, unsafe, of another architecture or number of classes, or that
            holds values that are not finite; or pretrained weights that cannot be downloaded.
    """
    library, name = check_architecture(architecture)
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    state, sha256 = (None, None) if checkpoint is None else read_checkpoint(Path(checkpoint))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU too
        model = build_model(
            library, name, num_classes, pretrained=pretrained, size=size, state=state, new_head=new_head
        )
        if state is not None:
            num_logits = logits_of_head(model, state, num_classes, architecture, str(checkpoint))
            if num_logits is not None and num_logits != classifier_of(model)[1].weight.shape[0]:
                model = build_model(library, name, num_logits, pretrained=False, size=size, state=state)
    if state is not None:
        _load(model, state, architecture, str(checkpoint))
    settings = reading_settings(library, name, model, pretrained)
    num_logits = int(classifier_of(model)[1].weight.shape[0])
    return Detector(
        model=model.eval(),
        architecture=architecture,
        input_size=size or settings["input_size"],
        mean=mean or settings["mean"],
        std=std or settings["std"],
        interpolation=interpolation or settings["interpolation"],
        num_classes=2 if num_logits == 1 else num_logits,
        weights_sha256=sha256 or sha256_of_tensors(model),
    )


def _load(model: nn.Module, state: dict[str, Tensor], architecture: str, checkpoint: str) -> None:
    """Copy the weights; every name and shape must fit, and every value must be finite."""
    own = model.state_dict()
    given = {key: value for key, value in state.items() if key in own or not key.startswith(AUXILIARY)}
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    unknown = [key for key in given if key not in own]
    if missing or unknown:
        raise CheckpointError(
            f"checkpoint {checkpoint!r} does not fit {architecture}: {len(missing)} of {len(own)} weights are missing"
            f"{first_few(missing)} and {len(unknown)} are unknown{first_few(unknown)}; is it of another architecture?"
        )
    for key, value in given.items():
        if value.shape != own[key].shape:
            raise CheckpointError(
                f"checkpoint {checkpoint!r} does not fit {architecture}: {key} must be of shape "
                f"{tuple(own[key].shape)}, got {tuple(value.shape)}; is it of another architecture?"
            )
        if own[key].is_floating_point() and not value.is_floating_point():
            raise CheckpointError(
                f"checkpoint {checkpoint!r}: {key} must hold floating point numbers, got {value.dtype}; save the float model"
            )
        if value.is_floating_point() and not value.isfinite().all():
            bad = int((~value.isfinite()).sum())
            raise CheckpointError(
                f"checkpoint {checkpoint!r}: {bad} of {value.numel()} values of {key} are not finite; the training "
                f"diverged, or the file is damaged: give another checkpoint"
            )
    model.load_state_dict(given, strict=False)


def sha256_without_head(model: nn.Module) -> str:
    """Of the weights but those of the last layer, which are drawn where the number of classes is another."""
    return sha256_of_tensors(model, but=f"{classifier_of(model)[0]}.")


def sha256_of_tensors(model: nn.Module, *, but: str | None = None) -> str:
    """Hash of every tensor of a model in the order of their names; names that begin with ``but`` are left out."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if but is not None and key.startswith(but):
            continue
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
