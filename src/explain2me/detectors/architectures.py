"""Build a network of timm or torchvision by name, and read its preprocessing settings."""

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
    """Split ``timm:NAME`` or ``torchvision:NAME`` into library and name.

    Raises:
        ConfigError: unknown library or name; the message offers the nearest names.
    """
    library, _, name = architecture.partition(":")
    if library == "timm":
        _check_timm(architecture, name)
    elif library == "torchvision":
        known_names = torchvision.models.list_models(module=torchvision.models)
        if name not in known_names:
            raise ConfigError(f"unknown architecture {architecture!r}: {nearest(name, known_names)}")
    else:
        last_part = architecture.rpartition(":")[2].rpartition("/")[2].lower()  # model hubs write timm/NAME
        candidates: list[str] = []
        for known in ("timm", "torchvision"):
            with contextlib.suppress(ConfigError):
                check_architecture(f"{known}:{last_part}")
                candidates.append(f"{known}:{last_part}")
        hint = f"; did you mean {' or '.join(map(repr, candidates))}?" if candidates else ""
        raise ConfigError(f"architecture: expected timm:NAME or torchvision:NAME, got {architecture!r}{hint}")
    return library, name


def _check_timm(architecture: str, name: str) -> None:
    if not timm.is_model(name):
        raise ConfigError(f"unknown architecture {architecture!r}: {nearest(name, timm.list_models())}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:  # is_model ignores the tag after the dot
        base = name.partition(".")[0]
        tags = timm.list_pretrained(f"{base}.*")
        raise ConfigError(f"unknown architecture {architecture!r}: {nearest(name, [base, *tags])}") from None


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
    """Build a network with random or pretrained weights.

    Args:
        library: ``timm`` or ``torchvision``.
        name: in the library, as :func:`check_architecture` returns it.
        num_classes: None takes the library's default.
        pretrained: True for the default weights, or the name of weights of torchvision.
        size: height and width in pixels of the images; None takes the model's own.
        state: the checkpoint to be loaded later; decides whether the model gets auxiliary heads.
        new_head: allow pretrained weights of another number of classes.

    Raises:
        ConfigError: unknown pretrained weights, or an input size or number of classes that they do not have.
        CheckpointError: the pretrained weights cannot be loaded.
    """
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if library == "timm":
        return _build_timm(name, options, pretrained=pretrained, size=size, new_head=new_head)
    if name.startswith("vit_") and size:
        _check_patches(name, size)
    if pretrained:
        return _pretrained_torchvision(name, num_classes, pretrained=pretrained, size=size, new_head=new_head)
    if name in ("inception_v3", "googlenet"):
        options["aux_logits"] = state is not None and any(key.startswith(AUXILIARY) for key in state)
        options["init_weights"] = False
    if name.startswith("vit_") and size:
        options["image_size"] = size[0]
    return torchvision.models.get_model(name, weights=None, **options)


def _build_timm(
    name: str, options: dict[str, Any], *, pretrained: bool | str, size: tuple[int, int] | None, new_head: bool
) -> nn.Module:
    if isinstance(pretrained, str):
        raise ConfigError(
            f"pretrained = {shorten(pretrained)!r} names weights of torchvision, expected true or false for timm:{name}; "
            f"choose weights of timm by a tag in the architecture: timm:NAME.TAG"
        )
    config = timm.get_pretrained_cfg(name)
    if pretrained and not (config and config.has_weights):
        raise ConfigError(
            f"timm has no pretrained weights of {name!r}; set pretrained = false, or another architecture"
        )
    if pretrained and config and not new_head:
        _check_num_classes(f"timm:{name}", config.num_classes, options.get("num_classes"))
    if size and config and config.fixed_input_size:
        options["img_size"] = size
    with _download_errors(f"timm:{name}"):
        return timm.create_model(name, pretrained=pretrained, **options)


def _check_patches(name: str, size: tuple[int, int]) -> None:
    """Refuse an input size that torchvision's vision transformer cannot cut into patches."""
    patch = int(name.rpartition("_")[2])
    if size[0] != size[1] or size[0] % patch:
        raise ConfigError(
            f"torchvision:{name} takes square inputs whose side is a multiple of {patch} pixels, got input_size "
            f"{size[0]}x{size[1]}; set input_size to such a side"
        )


def _pretrained_torchvision(
    name: str, num_classes: int | None, *, pretrained: bool | str, size: tuple[int, int] | None, new_head: bool
) -> nn.Module:
    weight_names = [weights.name for weights in torchvision.models.get_model_weights(name)]
    if isinstance(pretrained, str) and pretrained not in weight_names:
        raise ConfigError(
            f"pretrained = {shorten(pretrained)!r}: torchvision:{name} has no such weights; {nearest(pretrained, weight_names)}"
        )
    height, width = _torchvision_settings(name, pretrained)["input_size"]
    if name.startswith("vit_") and size and size != (height, width):
        raise ConfigError(
            f"torchvision:{name} with pretrained weights takes inputs of {height}x{width} pixels only, got input_size "
            f"{size[0]}x{size[1]}; leave input_size out, or take a timm:vit_... architecture, which adapts the weights"
        )
    with _download_errors(f"torchvision:{name}"):
        model = torchvision.models.get_model(name, weights="DEFAULT" if pretrained is True else pretrained)
    if new_head:
        return _with_new_head(model, num_classes)
    _check_num_classes(f"torchvision:{name}", num_logits_of(model), num_classes)
    return model


@contextlib.contextmanager
def _download_errors(architecture: str) -> Iterator[None]:
    """Turn a network or disk error into a CheckpointError that says what to do."""
    hub = logging.getLogger("huggingface_hub")  # logs every retry
    level = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    except OSError as error:  # every library raises a subclass of it
        raise CheckpointError(
            f"the pretrained weights of {architecture} cannot be loaded ({one_line(error)}); connect this machine to the "
            f"internet, or copy the caches (folders TORCH_HOME and HF_HOME) from a machine that has the weights, or set "
            f"pretrained = false"
        ) from None
    finally:
        hub.setLevel(level)


def _check_num_classes(architecture: str, pretrained_classes: int, expected: int | None) -> None:
    """Refuse a head of random weights on pretrained features: its numbers would look like results."""
    if expected is not None and pretrained_classes != expected:
        raise ConfigError(
            f"{architecture} is pretrained for {pretrained_classes} classes, expected {expected}; give checkpoints of a "
            f"model trained for these classes"
        )


def _with_new_head(model: nn.Module, num_classes: int | None) -> nn.Module:
    """Replace the last layer by a random one for ``num_classes``, and remove auxiliary heads."""
    name, head = classifier_of(model)
    if num_classes is not None and head.weight.shape[0] != num_classes:
        if not isinstance(head, nn.Linear):
            raise ConfigError(
                f"{type(model).__name__}: expected a linear last layer to replace by one of {num_classes} classes, got "
                f"{type(head).__name__} {name!r}; train another architecture"
            )
        parent, _, last = name.rpartition(".")
        new = nn.Linear(head.in_features, num_classes, bias=head.bias is not None)
        setattr(model.get_submodule(parent), last, new)
    # transform_input is a second normalisation, which models built for a checkpoint have switched off
    without = {"transform_input": False, "aux_logits": False, "AuxLogits": None, "aux1": None, "aux2": None}
    for attribute, value in without.items():
        if hasattr(model, attribute):
            setattr(model, attribute, value)
    return model


def classifier_of(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Name and module of the layer that makes the logits.

    timm names it; otherwise it is the last linear or convolution layer outside the auxiliary heads.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not name.startswith(AUXILIARY)
    ]
    classifier = (getattr(model, "pretrained_cfg", None) or {}).get("classifier")
    named = [layer for layer in layers if layer[0] == classifier]
    return (named or layers)[-1]


def num_logits_of(model: nn.Module) -> int:
    """Number of logits of a model."""
    return int(classifier_of(model)[1].weight.shape[0])


def logits_of_head(
    model: nn.Module, state: Mapping[str, Tensor], num_classes: int | None, architecture: str, checkpoint: str
) -> int | None:
    """Number of logits of a checkpoint; None where it lacks the model's head, which loading reports as missing.

    Raises:
        CheckpointError: the number differs from ``num_classes`` (2 classes may also have one logit), or is 0.
    """
    name, _ = classifier_of(model)
    weight = state.get(f"{name}.weight")
    if weight is None:
        return None
    num_logits = int(weight.shape[0]) if weight.ndim else 0
    allowed = (1, 2) if num_classes == 2 else (num_logits if num_classes is None else num_classes,)
    if num_logits not in allowed or num_logits < 1:
        raise CheckpointError(
            f"checkpoint {checkpoint!r} of {architecture} has {num_logits} classes ({name}.weight is of shape "
            f"{tuple(weight.shape)}), expected {'at least 1' if num_classes is None else num_classes}; give a checkpoint "
            f"trained for the labels of the manifest, or name all classes of this one in data.classes"
        )
    return num_logits


def reading_settings(library: str, name: str, model: nn.Module, pretrained: bool | str) -> dict[str, Any]:
    """Preprocessing of a model: ``input_size`` (height, width), ``mean``, ``std`` and ``interpolation``.

    For timm the settings of the model, for torchvision those of the pretrained weights (default: its default weights).
    """
    if library == "timm":
        config = resolve_data_config({}, model=model)  # type: ignore[no-untyped-call]
        sides, mean, std = (tuple(config[name]) for name in ("input_size", "mean", "std"))
        return {"input_size": sides[1:], "mean": mean, "std": std, "interpolation": config["interpolation"]}
    settings = _torchvision_settings(name, pretrained)
    side = getattr(model, "image_size", None)  # a vision transformer accepts only the size it was built for
    return settings if side is None else settings | {"input_size": (side, side)}


def settings_of_weights(architecture: str, pretrained: bool | str) -> dict[str, Any]:
    """Preprocessing, as of :func:`reading_settings`, that a model fine-tuned from named weights of torchvision needs.

    Empty for all others, and for an unknown name, which :func:`build_model` reports.
    """
    library, _, name = architecture.partition(":")
    if library != "torchvision" or not isinstance(pretrained, str):
        return {}
    try:
        return _torchvision_settings(name, pretrained)
    except (ValueError, KeyError):  # unknown architecture, unknown weights
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
