"""Build an architecture by its name, with how it reads images."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torchvision
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from explain2me.detectors.checkpoints import AUXILIARY, one_line
from explain2me.errors import CheckpointError, ConfigError
from explain2me.text import nearest, shorten


def check_architecture(architecture: str) -> tuple[str, str]:
    """Library and name of an architecture; ConfigError with the nearest known name where it is unknown."""
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
            check_architecture(f"{library}:{name}")
            yield f"{library}:{name}"


def build_model(
    library: str,
    name: str,
    num_classes: int | None,
    *,
    pretrained: bool | str,
    size: tuple[int, int] | None,
    state: Mapping[str, Tensor] | None,
    new_head: bool = False,
) -> nn.Module:
    """Build a network of timm or torchvision, shaped by the checkpoint that it is to load."""
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if library == "timm":
        if size and (timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).fixed_input_size:
            options["img_size"] = size
        known = timm.get_pretrained_cfg(name)
        if isinstance(pretrained, str):
            raise ConfigError(
                f"pretrained = {shorten(pretrained)!r} names weights of torchvision; timm:{name} takes true, or a tag in its "
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
            f"pretrained = {shorten(pretrained)!r}: torchvision:{name} has no such weights; {nearest(pretrained, weights)}"
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
            f"the pretrained weights of {architecture} cannot be had ({one_line(error)}); connect this machine, or fill the "
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


def logits_of_head(
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


def reading_settings(library: str, name: str, model: nn.Module, pretrained: bool | str) -> dict[str, Any]:
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
