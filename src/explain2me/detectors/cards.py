"""Read the card that a training of explain2me writes beside its weights."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from explain2me.run.record import Model

CARD = "card.json"
"""Name of the file beside the weights; its field ``files`` holds the sha256 of each weights file."""
RENORMALISING = ("torchvision:inception_v3", "torchvision:googlenet")
"""Built with pretrained weights, they normalise their input a second time; built for a checkpoint, they do not."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)


def trained(model: Model) -> dict[str, Any] | None:
    """How the weights of a run were trained, from the card beside them.

    Returns:
        ``loss``, ``human_maps``, ``images`` and ``start`` (the initial weights) in words; ``epochs``, the number
        trained; ``taken``, the epoch of these weights; its ``val_auroc`` and ``val_accuracy`` in [0, 1], or None;
        ``classes`` in the order of the logits; ``input_size``, ``mean``, ``std`` and ``interpolation`` (None in older
        cards). None without a valid card that lists the sha256 of these weights.
    """
    if model.checkpoint is None:
        return None
    path = Path(model.checkpoint)
    try:
        card = json.loads((path.parent / CARD).read_text(encoding="utf-8"))
        if card["files"].get(path.name) != model.weights_sha256:
            return None
        metrics = card["metrics"] if path.name.startswith("best") else card["curve"][-1]
        images = card["data"]["training"]
        return {
            "loss": _loss(card["strategy"]),
            "human_maps": human_maps_in_words(card["human_maps"]),
            "images": f"{images['images']} ({', '.join(f'{name} {n}' for name, n in images['by_label_and_source'].items())})",
            "start": "pretrained weights" if card["training"]["pretrained"] else "random weights",
            "epochs": int(card["epochs"]),
            "taken": int(metrics["epoch"]),
            **{name: _number(metrics.get(name)) for name in ("val_auroc", "val_accuracy")},
            "classes": [str(name) for name in card["data"]["classes"]],
            "input_size": [int(side) for side in card["input"]["input_size"]],
            **{name: [float(value) for value in card["input"][name]] for name in ("mean", "std")},
            "interpolation": card["input"].get("interpolation"),
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # no card of explain2me
        return None


def reading_warnings(models: Iterable[Model], classes: Sequence[str]) -> list[str]:
    """Warn of detectors whose preprocessing or class order differs from their training, each once, and say what to set.

    Args:
        models: of a run.
        classes: of the run, in the order of the logits.
    """
    warnings: list[str | None] = []
    for model in models:
        card = trained(model)
        if card is None:
            warnings.append(_renormalisation_warning(model))
        else:
            warnings += [_preprocessing_warning(model, card), _classes_warning(model, card, classes)]
    return list(dict.fromkeys(filter(None, warnings)))


def _classes_warning(model: Model, card: Mapping[str, Any], classes: Sequence[str]) -> str | None:
    if card["classes"] == list(classes):
        return None
    return (
        f"detector {model.detector!r}: its weights were trained with the classes {', '.join(card['classes'])} in the order of the "
        f"logits (says the card beside them), but {', '.join(classes)} are used; set data.classes = {json.dumps(card['classes'])}"
    )


def _preprocessing_warning(model: Model, card: Mapping[str, Any]) -> str | None:
    used: dict[str, Any] = {name: list(getattr(model, name)) for name in ("input_size", "mean", "std")}
    used["interpolation"] = model.interpolation
    changed = {name: card[name] for name in used if card[name] not in (None, used[name])}
    if not changed:
        return None
    name = next(iter(changed))
    return (
        f"detector {model.detector!r}: its weights were trained with {name} = {changed[name]} (says the card beside them), but "
        f"{used[name]} is used; set {', '.join(f'{key} = {json.dumps(value)}' for key, value in changed.items())}"
    )


def _renormalisation_warning(model: Model) -> str | None:
    if model.checkpoint is None or model.architecture not in RENORMALISING or model.mean != IMAGENET_MEAN:
        return None
    return (
        f"detector {model.detector!r}: no card beside its weights says how {model.architecture} was trained. If it was "
        f"fine-tuned from torchvision's pretrained weights, it normalised its input a second time (transform_input), which "
        f"the weights do not show: set mean = [0.5, 0.5, 0.5] and std = [0.5, 0.5, 0.5]. If it was trained from random "
        f"weights, change nothing"
    )


def _loss(strategy: Mapping[str, Any]) -> str:
    parts = [str(strategy["loss"])]
    if strategy["loss"] == "cyborg":
        parts.append(f"alpha {strategy['alpha']:g}, map of the {strategy['cam_class']} class")
    if strategy["entropy_weight"]:
        parts.append(f"entropy of the map times {strategy['entropy_weight']:g}")
    return ", ".join(parts)


def human_maps_in_words(record: Mapping[str, Any] | None) -> str:
    """Source of the human maps of a training, from the field ``human_maps`` of its card."""
    if record is None:
        return "none"
    if "images" not in record:
        return str(record["kind"])
    rest = "" if record["maps"] == record["images"] else ", the others are trained without one"
    return f"a map of its own for {record['maps']} of {record['images']} images{rest}"


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
