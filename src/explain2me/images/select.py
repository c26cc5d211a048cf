"""Which images a run takes, and their classes. Opens no image, and does not import PyTorch."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from explain2me.config.schema import DataConfig
from explain2me.config.training import TrainingConfig
from explain2me.errors import ConfigError, ManifestError
from explain2me.images.listing import Listing, check_labels, list_images, list_source, require_hashes, sample_images
from explain2me.statistics.scores import ALL
from explain2me.text import nearest

if TYPE_CHECKING:
    import pyarrow as pa


class Selection(NamedTuple):
    """The images of a run, sampled; their ``classes`` in the order of the logits, () without labels; and all that is listed."""

    images: "pa.Table"
    classes: tuple[str, ...]
    listing: Listing


def list_data(data: DataConfig) -> Listing:
    """List the images that a config names, those of its split; raises as :func:`list_images`."""
    return list_source(Path(data.manifest), split=data.split, classes=data.classes)


def select_images(data: DataConfig, seed: int, listing: Listing | None = None) -> Selection:
    """Draw the images of a run, and check their labels.

    Args:
        data: settings of the images.
        seed: of the draw.
        listing: of :func:`list_data`, if it was called already.

    Raises:
        Explain2MeError: the first mistake.
    """
    listing = listing or list_data(data)
    for name in ("label", "source"):
        if ALL in listing.columns[name]:
            raise ManifestError(f"{data.manifest!r}: the {name} {ALL!r} means all of them; rename it")
    images = sample_images(listing.table(), data.sample, seed=seed)
    return Selection(images, class_names(data, images, repr(data.manifest)), listing)


def refuse_unlabelled_target(target: str, images: "pa.Table") -> None:
    """Raise ConfigError where the maps are to explain the true class and no image has a label."""
    if target == "true" and images["label"].null_count == len(images):
        raise ConfigError("salience.target = 'true' needs labels, the manifest has none; use 'predicted'")


def class_names(
    data: DataConfig,
    images: "pa.Table",
    where: str,
    *,
    alone: str = "add images of another label, without which there is no AUROC, or name in data.classes all labels that "
    "the model knows, in the order of its logits",
) -> tuple[str, ...]:
    """Labels in the order of the logits: two labels are (other, positive), more are sorted; () without labels.

    Args:
        data: settings of the images: the positive class, and perhaps the order of all classes.
        images: with the column label.
        where: where they are listed, for errors.
        alone: what to do if all have one label, for errors.

    Raises:
        ManifestError: a label that is not among data.classes.
        ConfigError: data.positive is not a class.
    """
    labels = sorted(set(images["label"].drop_null().to_pylist()))
    classes, positive = data.classes, data.positive
    if len({label.casefold().strip() for label in labels}) < len(labels):
        raise ManifestError(
            f"{where}: expected labels that differ by more than case and spaces, got {labels}; write each "
            f"class in one way"
        )
    if classes is not None:
        check_labels(images, classes)
    elif len(labels) == 1:
        raise ConfigError(f"{where}: expected images of at least two labels, got only {labels[0]!r}; {alone}")
    else:
        classes = tuple(sorted(labels, key=lambda label: (label == positive and len(labels) == 2, label)))
    if classes and positive not in classes:
        raise ConfigError(
            f"data.positive: expected one of the labels {', '.join(map(repr, classes))} of {where}, got {positive!r}; "
            f"{nearest(positive, classes)}"
        )
    return classes


def require_all_hashes(data: DataConfig, training: TrainingConfig | None, seed: int, listing: Listing) -> "pa.Table":
    """The images to test, drawn from ``listing``; ManifestError if one of them, or one to train on, has no hash."""
    source = Path(data.manifest)
    if training is not None:
        trained = Path(training.manifest or source)
        for split in sorted({training.split, training.validation_split or training.split}, key=str):
            require_hashes(list_images(trained, split=split, classes=data.classes), trained)
    images = sample_images(listing.table(), data.sample, seed=seed)
    require_hashes(images, source)
    return images
