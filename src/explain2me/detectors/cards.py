"""What a training of explain2me wrote beside its weights: how they came about, for the reports, and how they read images."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from explain2me.run.record import Model

CARD = "card.json"
"""The file beside the weights; its ``files`` holds the hash of each."""
RENORMALISING = ("torchvision:inception_v3", "torchvision:googlenet")
"""Built with pretrained weights they normalise their input a second time, built for a checkpoint they do not."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)


def trained(model: Model) -> dict[str, Any] | None:
    """How the weights of a run were trained, in words and numbers; None where no card of just these weights is beside them.

    Returns:
        ``loss``, ``human_maps``, ``images``, ``start`` in words; ``epochs`` made, the epoch ``taken``, ``val_auroc`` and
        ``val_accuracy`` (or None); ``classes`` in the order of the logits; ``input_size``, ``mean``, ``std`` and
        ``interpolation`` (None in older cards).
    """
    if model.checkpoint is None:
        return None
    path = Path(model.checkpoint)
    try:
        card = json.loads((path.parent / CARD).read_text(encoding="utf-8"))
        if card["files"].get(path.name) != model.weights_sha256:
            return None
        metrics = card["metrics"] if path.name.startswith("best") else card["curve"][-1]
        return {
            "loss": _loss(card["strategy"]),
            "human_maps": human_maps_in_words(card["human_maps"]),
            "images": _images(card["data"]["training"]),
            "start": "pretrained weights" if card["training"]["pretrained"] else "random weights",
            "epochs": int(card["epochs"]),
            "taken": int(metrics["epoch"]),
            **{name: _number(metrics.get(name)) for name in ("val_auroc", "val_accuracy")},
            "classes": [str(name) for name in card["data"]["classes"]],
            "input_size": [int(side) for side in card["input"]["input_size"]],
            **{name: [float(value) for value in card["input"][name]] for name in ("mean", "std")},
            "interpolation": card["input"].get("interpolation"),
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # anybody may have a file of this name
        return None


def reading_warnings(models: Iterable[Model], classes: Sequence[str]) -> list[str]:
    """What to set where a detector is read otherwise than its weights were trained: its images, or its logits.

    Args:
        models: of a run.
        classes: of the run, in the order of the logits.
    """
    said: list[str | None] = []
    for model in models:
        card = trained(model)
        said += (
            [_renormalises(model)]
            if card is None
            else [_reads_otherwise(model, card), _means_otherwise(model, card, classes)]
        )
    return list(dict.fromkeys(filter(None, said)))


def _means_otherwise(model: Model, card: Mapping[str, Any], classes: Sequence[str]) -> str | None:
    if card["classes"] == list(classes):
        return None
    return (
        f"detector {model.detector!r}: its weights were trained with the classes {', '.join(card['classes'])} in the order of the "
        f"logits (by the card beside them), and {', '.join(classes)} are used; set data.classes = {json.dumps(card['classes'])}"
    )


def _reads_otherwise(model: Model, card: Mapping[str, Any]) -> str | None:
    found: dict[str, Any] = {name: list(getattr(model, name)) for name in ("input_size", "mean", "std")}
    found["interpolation"] = model.interpolation
    changed = {name: card[name] for name in found if card[name] not in (None, found[name])}
    if not changed:
        return None
    name = next(iter(changed))
    return (
        f"detector {model.detector!r}: its weights were trained with {name} = {changed[name]} (by the card beside them), and "
        f"{found[name]} is used; set {', '.join(f'{key} = {json.dumps(value)}' for key, value in changed.items())}"
    )


def _renormalises(model: Model) -> str | None:
    if model.checkpoint is None or model.architecture not in RENORMALISING or model.mean != IMAGENET_MEAN:
        return None
    return (
        f"detector {model.detector!r}: no card tells how {model.architecture} was trained. One fine-tuned from torchvision's "
        f"pretrained weights turns ImageNet's normalisation into 0.5 inside the model (transform_input), which its weights "
        f"do not show: set mean = [0.5, 0.5, 0.5] and std = [0.5, 0.5, 0.5] for it; one trained from random weights is "
        f"read rightly as it is"
    )


def _loss(strategy: Mapping[str, Any]) -> str:
    parts = [str(strategy["loss"])]
    if strategy["loss"] == "cyborg":
        parts.append(f"alpha {strategy['alpha']:g}, map of the {strategy['cam_class']} class")
    if strategy["entropy_weight"]:
        parts.append(f"entropy of the map times {strategy['entropy_weight']:g}")
    return ", ".join(parts)


def human_maps_in_words(record: Mapping[str, Any] | None) -> str:
    """Where the human maps of a training come from, by its card."""
    if record is None:
        return "none"
    if "images" not in record:
        return str(record["kind"])
    rest = "" if record["maps"] == record["images"] else ", the others are trained without"
    return f"a map of its own for {record['maps']} of {record['images']} images{rest}"


def _images(record: Mapping[str, Any]) -> str:
    of_each = ", ".join(f"{name} {count}" for name, count in record["by_label_and_source"].items())
    return f"{record['images']} ({of_each})"


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
