"""Checkpoints to models: an architecture by name, its weights, and its preprocessing."""

import contextlib
import functools
import hashlib
import io
import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from jaxtyping import Float, UInt8
from safetensors.torch import load as load_safetensors
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from explain2me.decode import read_bytes
from explain2me.errors import CheckpointError, ConfigError, ImageError, nearest

NESTS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "network.", "backbone.")
MAX_NESTS = 10
"""Dicts around a state dict, and prefixes before its names."""
MAX_BYTES = 64 * 2**30
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")


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
    library, name = _check_architecture(architecture)
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    state, sha256 = (None, None) if checkpoint is None else read_checkpoint(Path(checkpoint))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU too
        model = _build(library, name, num_classes, pretrained=pretrained, size=size, state=state, new_head=new_head)
        if state is not None:
            num_logits = _num_logits(model, state, num_classes, architecture, str(checkpoint))
            if num_logits is not None and num_logits != classifier_of(model)[1].weight.shape[0]:
                model = _build(library, name, num_logits, pretrained=False, size=size, state=state)
    if state is not None:
        _load(model, state, architecture, str(checkpoint))
    settings = _settings(library, name, model, pretrained)
    num_logits = int(classifier_of(model)[1].weight.shape[0])
    return Detector(
        model=model.eval(),
        architecture=architecture,
        input_size=size or settings["input_size"],
        mean=mean or settings["mean"],
        std=std or settings["std"],
        interpolation=interpolation or settings["interpolation"],
        num_classes=2 if num_logits == 1 else num_logits,
        weights_sha256=sha256 or _sha256_of_tensors(model),
    )


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], str]:
    """The weights in a file by their plain names, and the sha256 of the file; no code of the file is ever run.

    Raises:
        CheckpointError: missing, empty, damaged, not weights, or a pickle that holds more than tensors.
    """
    where = f"checkpoint {str(path)!r}"
    try:
        data = read_bytes(path, max_bytes=MAX_BYTES)
    except ImageError as error:
        if error.kind in ("missing", "dangling_link"):
            raise CheckpointError(f"{where} does not exist; give the path of a .safetensors or .pth file") from None
        if error.kind == "empty":
            raise CheckpointError(f"{where} is empty; save it again") from None
        raise CheckpointError(f"{where} cannot be read: {error.message}") from None
    tree = _read_safetensors(data, where) if _is_safetensors(data, path) else _read_pickle(data, where)
    state = _unnest(tree, where)
    for key, value in state.items():
        _check_tensor(value, f"{where}: {_short(key)!r}", most_bytes=len(data))
    return _plain_names(state), hashlib.sha256(data).hexdigest()


def _check_tensor(value: Tensor, where: str, *, most_bytes: int) -> None:
    """Only what a model's own weights are: dense numbers that stand in the file, each of them."""
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
        raise CheckpointError(f"{where} is no dense tensor; save the state_dict() of the float model")
    if value.numel() * value.element_size() > most_bytes:
        raise CheckpointError(
            f"{where} would be {value.numel() * value.element_size()} bytes, larger than the file of {most_bytes}: it repeats few "
            f"numbers; save it again"
        )


def _is_safetensors(data: bytes, path: Path) -> bool:
    """By the content, since people rename files: a header length, then JSON."""
    return path.suffix == ".safetensors" or data[8:9] == b"{"


def _read_safetensors(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        state = load_safetensors(data)
        json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], object_pairs_hook=_without_repetition)
        return state
    except Exception as error:  # hostile bytes make the reader raise anything
        raise CheckpointError(f"{where} is not a valid safetensors file ({_line(error)}); save it again") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Which of two weights of one name is meant is undefined."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a name is there twice among {_short(', '.join(found))}")
    return found


def _read_pickle(data: bytes, where: str) -> Any:
    if data.startswith(b"PK"):
        _check_zip(data, where)
    try:
        with warnings.catch_warnings():  # torch warns of odd pickles; what is wrong with them is said below
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported" in str(error):
            raise CheckpointError(
                f"{where} holds Python objects besides tensors and is refused, because loading it could run code"
                f"{_refused_object(error)}; load it where you trust it and save its state_dict() as safetensors"
            ) from None
        raise CheckpointError(f"{where} is not a checkpoint of torch.save or safetensors ({_line(error)})") from None
    except Exception as error:  # hostile bytes make the reader raise anything
        raise CheckpointError(
            f"{where} cannot be read ({type(error).__name__}: {_line(error)}); save it again"
        ) from None


def _check_zip(data: bytes, where: str) -> None:
    """``torch.save`` does not compress: a small file that unpacks to a large one was made to fill the memory."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            unpacked = sum(member.file_size for member in archive.infolist())
    except Exception as error:  # as above
        raise CheckpointError(
            f"{where} cannot be read ({type(error).__name__}: {_line(error)}); save it again"
        ) from None
    if len(set(names)) < len(names):
        raise CheckpointError(f"{where} holds two members of one name, so what is in it is undefined; save it again")
    if unpacked > len(data):
        raise CheckpointError(
            f"{where} would unpack to {unpacked} bytes, larger than the file of {len(data)}: torch.save does not compress; "
            f"save it again"
        )


def _unnest(tree: Any, where: str) -> dict[str, Tensor]:
    """Down to the dict of tensors: ``{"epoch": 3, "state_dict": {...}}`` and the like."""
    for _ in range(MAX_NESTS):  # a dict may hold itself
        if not isinstance(tree, Mapping):
            break
        tensors = {key: value for key, value in tree.items() if isinstance(key, str) and isinstance(value, Tensor)}
        inner = next((tree[key] for key in NESTS if isinstance(tree.get(key), Mapping)), None)
        if tensors and inner is None:
            return tensors
        if inner is None:
            break
        tree = inner
    names = sorted(_short(key) for key in tree if isinstance(key, str)) if isinstance(tree, Mapping) else []
    kind = f"a dict with the keys {names[:5]}" if isinstance(tree, Mapping) else f"a {type(tree).__name__}"
    raise CheckpointError(f"{where}: expected weights by name, or a dict with a state_dict, got {kind}")


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off the prefixes that DataParallel, Lightning and torch.compile put before every name."""
    for _ in range(MAX_NESTS):
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _check_architecture(architecture: str) -> tuple[str, str]:
    library, _, name = architecture.partition(":")
    if library == "timm":
        known = timm.list_models()
        if not timm.is_model(name):
            raise ConfigError(f"unknown architecture {architecture!r}: {nearest(name, known)}")
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError:  # is_model does not look at the tag behind the point
            base = name.partition(".")[0]
            tags = timm.list_pretrained(f"{base}.*")
            raise ConfigError(f"unknown architecture {architecture!r}: {nearest(name, [base, *tags])}") from None
    elif library == "torchvision":
        known = torchvision.models.list_models(module=torchvision.models)
        if name not in known:
            raise ConfigError(f"unknown architecture {architecture!r}: {nearest(name, known)}")
    else:
        have = list(_with_library(architecture.rpartition(":")[2].rpartition("/")[2].lower()))  # hubs write timm/NAME
        meant = f"; did you mean {' or '.join(map(repr, have))}?" if have else ""
        raise ConfigError(f"architecture: expected timm:NAME or torchvision:NAME, got {architecture!r}{meant}")
    return library, name


def _with_library(name: str) -> Iterator[str]:
    """Architectures of that name."""
    for library in ("timm", "torchvision"):
        with contextlib.suppress(ConfigError):
            _check_architecture(f"{library}:{name}")
            yield f"{library}:{name}"


def _build(
    library: str,
    name: str,
    num_classes: int | None,
    *,
    pretrained: bool | str,
    size: tuple[int, int] | None,
    state: Mapping[str, Tensor] | None,
    new_head: bool = False,
) -> nn.Module:
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if library == "timm":
        if size and (timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).fixed_input_size:
            options["img_size"] = size
        known = timm.get_pretrained_cfg(name)
        if isinstance(pretrained, str):
            raise ConfigError(
                f"pretrained = {_short(pretrained)!r} names weights of torchvision; timm:{name} takes true, or a tag in its "
                f"name: timm:NAME.TAG"
            )
        if pretrained and not (known and known.has_weights):
            raise ConfigError(f"timm has no pretrained weights of {name!r}; set pretrained = false, or take another")
        if pretrained and known and not new_head:
            _check_pretrained(f"timm:{name}", known.num_classes, num_classes)
        with _downloading(f"timm:{name}"):
            return timm.create_model(name, pretrained=pretrained, **options)
    if name in ("inception_v3", "googlenet"):
        auxiliary = pretrained or (state is not None and any(key.startswith(AUXILIARY) for key in state))
        options |= {} if pretrained else {"aux_logits": auxiliary, "init_weights": False}
    if name.startswith("vit_") and size:
        patch = int(name.rpartition("_")[2])
        if size[0] != size[1] or size[0] % patch:
            raise ConfigError(
                f"torchvision:{name} takes square inputs of a multiple of {patch} pixels only, got input_size "
                f"{size[0]}x{size[1]}"
            )
        options["image_size"] = size[0]
    if not pretrained:
        return torchvision.models.get_model(name, weights=None, **options)
    weights = [each.name for each in torchvision.models.get_model_weights(name)]
    if isinstance(pretrained, str) and pretrained not in weights:
        raise ConfigError(
            f"pretrained = {_short(pretrained)!r}: torchvision:{name} has no such weights; {nearest(pretrained, weights)}"
        )
    own = _torchvision_settings(name, pretrained)["input_size"]
    if name.startswith("vit_") and size and size != own:
        raise ConfigError(
            f"torchvision:{name} with pretrained weights takes inputs of {own[0]}x{own[1]} pixels only, got input_size "
            f"{size[0]}x{size[1]}; leave input_size out, or take a timm:vit_... architecture, which adapts the weights"
        )
    with _downloading(f"torchvision:{name}"):
        model = torchvision.models.get_model(name, weights="DEFAULT" if pretrained is True else pretrained)
    if not new_head:
        _check_pretrained(f"torchvision:{name}", classifier_of(model)[1].weight.shape[0], num_classes)
        return model
    return _with_new_head(model, num_classes)


@contextlib.contextmanager
def _downloading(architecture: str) -> Iterator[None]:
    hub = logging.getLogger("huggingface_hub")  # tells each of its retries
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    except OSError as error:  # of the network or the disk, whichever library it comes from
        raise CheckpointError(
            f"the pretrained weights of {architecture} cannot be had ({_line(error)}); connect this machine, or fill the "
            f"caches on another one and copy them (folders TORCH_HOME and HF_HOME), or set pretrained = false"
        ) from None
    finally:
        hub.setLevel(level)


def _check_pretrained(architecture: str, found: int, wanted: int | None) -> None:
    """A head of random weights on pretrained features would give numbers that look like results."""
    if wanted is not None and found != wanted:
        raise ConfigError(
            f"{architecture} is pretrained for {found} classes, expected {wanted}; give checkpoints of a model trained "
            f"for these classes"
        )


def _with_new_head(model: nn.Module, num_classes: int | None) -> nn.Module:
    """The last layer replaced by one of random weights for ``num_classes``; auxiliary heads taken off."""
    name, head = classifier_of(model)
    if num_classes is not None and head.weight.shape[0] != num_classes:
        if not isinstance(head, nn.Linear):
            raise ConfigError(
                f"{type(model).__name__}: the head is no linear layer and cannot be given {num_classes} classes"
            )
        parent, _, last = name.rpartition(".")
        new = nn.Linear(head.in_features, num_classes, bias=head.bias is not None)
        setattr(model.get_submodule(parent), last, new)
    if hasattr(model, "transform_input"):  # a second normalisation, which a model built for a checkpoint has not
        setattr(model, "transform_input", False)  # noqa: B010 - nn.Module does not declare it
    if hasattr(model, "aux_logits"):
        setattr(model, "aux_logits", False)  # noqa: B010 - nn.Module does not declare it
        for auxiliary in ("AuxLogits", "aux1", "aux2"):
            if hasattr(model, auxiliary):
                setattr(model, auxiliary, None)
    return model


def classifier_of(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """The last linear or convolution layer, which makes the logits; auxiliary heads do not count."""
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith(AUXILIARY)
    ]
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    named = [layer for layer in layers if layer[0] == classifier]
    return (named or layers)[-1]


def _num_logits(
    model: nn.Module, state: Mapping[str, Tensor], num_classes: int | None, architecture: str, checkpoint: str
) -> int | None:
    """How many logits the checkpoint has; None where its head is named otherwise, which loading will report."""
    name, _ = classifier_of(model)
    weight = state.get(f"{name}.weight")
    if weight is None:
        return None
    found = int(weight.shape[0]) if weight.ndim else 0
    allowed = {found} if num_classes is None else {num_classes, 1 if num_classes == 2 else num_classes}
    if found not in allowed or found < 1:
        raise CheckpointError(
            f"checkpoint {checkpoint!r} of {architecture} has {found} classes ({name}.weight is "
            f"{tuple(weight.shape)}), expected {num_classes}; give one trained for the labels of the manifest, or name "
            f"all its classes in data.classes"
        )
    return found


def _load(model: nn.Module, state: dict[str, Tensor], architecture: str, checkpoint: str) -> None:
    """Copy the weights; every name and shape must fit, and every value must be finite."""
    own = model.state_dict()
    given = {key: value for key, value in state.items() if key in own or not key.startswith(AUXILIARY)}
    missing = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    unknown = [key for key in given if key not in own]
    if missing or unknown:
        raise CheckpointError(
            f"checkpoint {checkpoint!r} does not fit {architecture}: {len(missing)} of {len(own)} weights are missing"
            f"{_first(missing)} and {len(unknown)} are unknown{_first(unknown)}; is it of another architecture?"
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


def _settings(library: str, name: str, model: nn.Module, pretrained: bool | str) -> dict[str, Any]:
    """Input size, mean, std and interpolation of the model's own configuration, or of the weights that are named."""
    if library == "timm":
        config = resolve_data_config({}, model=model)  # type: ignore[no-untyped-call]
        return {
            "input_size": tuple(config["input_size"][1:]),
            "mean": tuple(config["mean"]),
            "std": tuple(config["std"]),
            "interpolation": config["interpolation"],
        }
    found = _torchvision_settings(name, pretrained)
    side = getattr(model, "image_size", None)  # vision transformers take the size only for which they were built
    return found if side is None else found | {"input_size": (side, side)}


def settings_of_weights(architecture: str, pretrained: bool | str) -> dict[str, Any]:
    """``input_size``, ``mean``, ``std`` and ``interpolation`` of pretrained weights that torchvision names; else empty.

    A checkpoint of a model that started from them is read as they are, not as the default weights.
    """
    library, _, name = architecture.partition(":")
    if library != "torchvision" or not isinstance(pretrained, str):
        return {}
    try:
        return _torchvision_settings(name, pretrained)
    except (ValueError, KeyError):  # no such architecture or weights, which building the model will tell
        return {}


def _torchvision_settings(name: str, pretrained: bool | str) -> dict[str, Any]:
    weights = torchvision.models.get_model_weights(name)
    transform = weights[pretrained if isinstance(pretrained, str) else "DEFAULT"].transforms()
    return {
        "input_size": (transform.crop_size[0], transform.crop_size[0]),
        "mean": tuple(transform.mean),
        "std": tuple(transform.std),
        "interpolation": transform.interpolation.value,
    }


def sha256_without_head(model: nn.Module) -> str:
    """Of the weights but those of the last layer, which are drawn where the number of classes is another."""
    return _sha256_of_tensors(model, but=f"{classifier_of(model)[0]}.")


def _sha256_of_tensors(model: nn.Module, *, but: str | None = None) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        if but is not None and key.startswith(but):
            continue
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _refused_object(error: Exception) -> str:
    """The name of the object that torch refused, in brackets."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" ({found[1]})" if found else ""


def _first(names: list[str]) -> str:
    return (
        f" ({', '.join(repr(_short(name)) for name in names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
    )


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:77]}..."


def _line(error: Exception) -> str:
    """The first sentence of an error, without control characters."""
    text = str(error).strip().split("\n")[0]
    text = text if len(text) <= 160 else f"{text[:157]}..."
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
