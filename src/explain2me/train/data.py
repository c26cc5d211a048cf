"""The images, labels and human maps that a training reads, in an order that depends on the seed and the epoch alone."""

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from explain2me.config.compare import digest
from explain2me.config.schema import Config
from explain2me.config.training import AugmentationConfig, StrategyConfig, TrainingConfig
from explain2me.errors import ConfigError, ImageError, ManifestError
from explain2me.images.decode import MAX_PIXELS, load_array
from explain2me.images.examine import index_images
from explain2me.images.listing import check_labels, image_root, list_images, resolve, sample_images
from explain2me.images.reading import read_file
from explain2me.salience.heatmaps import load_map, maps_of, mean_map
from explain2me.stages.select import class_names
from explain2me.text import printable_line
from explain2me.train.augment import draw_move, move_image, move_map

MEAN_OF = "mean-of:"
CACHE_BYTES = 2 * 2**30
"""Decoded images, and as much of human maps, that a process keeps; more are read again each epoch."""


class Rows(NamedTuple):
    """Images of one split: files, classes, and the files of their human maps where they have one."""

    files: list[Path]
    labels: Int[Tensor, " N"]
    sizes: list[tuple[int, int]]
    human_maps: list[Path | None]
    sha256: list[str]


class Listing(NamedTuple):
    """What is trained on and validated with, as it is listed: no image has been opened."""

    source: Path
    classes: tuple[str, ...]
    training: pa.Table
    validation: pa.Table | None


class Splits(NamedTuple):
    """What is trained on and validated with; ``record`` says it in words and hashes, for the card."""

    classes: tuple[str, ...]
    training: Rows
    validation: Rows | None
    record: dict[str, Any]
    listing: Listing


def list_splits(config: Config, training: TrainingConfig) -> Listing:
    """List and check what a config trains on; opens no image.

    Raises:
        Explain2MeError: a manifest is wrong, labels are absent, there are too few images, or an image would be both trained
            on and tested.
    """
    source, table = _listed(config, training)
    whole = table
    classes = _classes(config, training, source, table)
    counts = Counter(table["label"].to_pylist())
    if min(counts.values()) < 2:
        alone = min(counts, key=lambda label: (counts[label], label))
        raise ConfigError(
            f"training: expected at least 2 images of every class to train on, got 1 of {alone!r}{_misspelt(alone, table)}; "
            f"add some, or leave that class out"
        )
    _refuse_tested(config, source, table, "trained on")
    validation = None
    if training.validation_split is not None:
        validation = list_images(
            source, split=training.validation_split, extra=("salience",), classes=config.data.classes
        )
        _require_labels(validation, source, "validating")
        check_labels(validation, classes)
        _refuse_tested(config, source, validation, "validated with")
    elif training.validation_share:
        table, validation = _hold_out(table, training.validation_share, seed=config.seed)
    both = set(table["path"].to_pylist()) & set([] if validation is None else validation["path"].to_pylist())
    if both:
        raise ConfigError(
            f"training: {len(both)} images are in the split to train on and in the one to validate with, first "
            f"{min(both)!r}; give training.split and training.validation_split different ones"
        )
    for name, part in (("train on", table), ("validate with", validation)):
        missing = set() if part is None else set(classes) - set(part["label"].to_pylist())
        if missing and (name == "train on" or training.monitor == "auroc"):
            raise ConfigError(
                f"training: expected images of every class to {name}, got none of {min(missing)!r}"
                f"{_misspelt(min(missing), whole)}; add some, or leave that class out"
            )
    if len(table) // training.devices < training.batch_size:
        raise ConfigError(
            f"training.batch_size = {training.batch_size} is more than the {len(table) // training.devices} images to train on"
            + (" of each device" if training.devices > 1 else "")
        )
    if validation is not None and len(validation) < training.devices:
        raise ConfigError(
            f"training.devices = {training.devices}: expected at least one image to validate with on each, got {len(validation)}"
        )
    return Listing(source, classes, table, validation)


def read_splits(config: Config, training: TrainingConfig) -> Splits:
    """List, check and index what a config trains on; every file is read once.

    Raises:
        Explain2MeError: as :func:`list_splits`, or an image cannot be used.
    """
    listing = list_splits(config, training)
    source, classes, table, validation = listing
    parts = (("train on", table), ("validate with", validation))
    found = [part if part is None else _read_rows(part, source, classes, config, what=what) for what, part in parts]
    assert found[0] is not None
    record: dict[str, Any] = {"manifest": source.name, "classes": list(classes)}
    for name, part, rows in zip(("training", "validation"), (table, validation), found, strict=True):
        if part is not None and rows is not None:
            of_each = Counter(zip(part["label"].to_pylist(), part["source"].to_pylist(), strict=True))
            record[name] = {
                "images": len(part),
                "by_label_and_source": {f"{label}/{where}": count for (label, where), count in sorted(of_each.items())},
                "sha256": digest([rows.sha256, rows.labels.tolist()]),
            }
    return Splits(classes, found[0], found[1], record, listing)


def listed_digest(listing: Listing, strategy: StrategyConfig) -> str:
    """A hash of the list of images, the classes, and name, size and time of the human maps of a strategy; opens no file.

    Where it is as before, so is what a training reads, but for images that were changed under their name.
    """
    columns = {"path", "label", "source", "expected_sha256"}
    parts = [part for part in (listing.training, listing.validation) if part is not None]
    rows = [[part[name].to_pylist() for name in sorted(columns & set(part.column_names))] for part in parts]
    maps: list[Any] = []
    if needs_human_maps(strategy) and strategy.salience.startswith(MEAN_OF):
        folder = _mean_folder(strategy)
        maps = [folder.name, *((path.name, *_size_and_time(path)) for path in maps_of(folder))]
    elif needs_human_maps(strategy):
        root, paths = image_root(listing.source), listing.training["salience"].to_pylist()
        maps = [(path, *_size_and_time(resolve(root, path))) if path else None for path in paths]
    return digest([listing.source.name, listing.classes, rows, maps])


def _mean_folder(strategy: StrategyConfig) -> Path:
    return Path(strategy.salience.removeprefix(MEAN_OF))


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # reading it tells why
        return -1, 0
    return found.st_size, found.st_mtime_ns


def _misspelt(label: str, table: pa.Table) -> str:
    """A label that is nearly another one of the images to train on, and where it is first."""
    labels = table["label"].to_pylist()
    near = difflib.get_close_matches(label, set(labels) - {label}, n=1) if label in labels else []
    return f" (the label of {table['path'][labels.index(label)].as_py()!r}; is {near[0]!r} meant?)" if near else ""


def training_classes(config: Config, training: TrainingConfig) -> tuple[str, ...]:
    """Labels of the images to train on in the order of the logits; opens no image.

    Raises:
        Explain2MeError: a manifest is wrong, or labels are absent.
    """
    source, table = _listed(config, training)
    return _classes(config, training, source, table)


def _classes(config: Config, training: TrainingConfig, source: Path, table: pa.Table) -> tuple[str, ...]:
    where = repr(str(source)) + ("" if training.split is None else f", split {training.split!r}")
    return class_names(config, table, where, alone="add images of another label to train on")


def _listed(config: Config, training: TrainingConfig) -> tuple[Path, pa.Table]:
    source = Path(training.manifest or config.data.manifest)
    table = list_images(source, split=training.split, extra=("salience",), classes=config.data.classes)
    _require_labels(table, source, "training")
    return source, sample_images(table, training.sample, seed=config.seed)


def _require_labels(table: pa.Table, source: Path, what: str) -> None:
    if table["label"].null_count:
        raise ManifestError(f"{str(source)!r}: {what} needs labels, and its rows have none; fill the column 'label'")


def _read_rows(table: pa.Table, source: Path, classes: Sequence[str], config: Config, *, what: str) -> Rows:
    root = image_root(source)
    usable, refused = index_images(table, root, max_pixels=config.data.max_pixels)
    if len(refused):
        raise ManifestError(
            f"{len(refused)} of {len(table)} images to {what} cannot be used, first {refused['path'][0].as_py()!r}: "
            f"{refused['message'][0].as_py()}; mend or remove them: a training must not depend on what could be read"
        )
    order = {name: i for i, name in enumerate(usable["image_id"].to_pylist())}
    rows = usable.take([order[name] for name in table["image_id"].to_pylist()])
    labels = torch.tensor([classes.index(label) for label in rows["label"].to_pylist()])
    sizes = list(zip(rows["height"].to_pylist(), rows["width"].to_pylist(), strict=True))
    maps = [resolve(root, path) if path else None for path in table["salience"].to_pylist()]
    files = [resolve(root, path) for path in rows["path"].to_pylist()]
    return Rows(files, labels, sizes, maps, rows["sha256"].to_pylist())


def _refuse_tested(config: Config, source: Path, table: pa.Table, what: str) -> None:
    """An image that was trained on tells nothing about how a detector does."""
    if not Path(config.data.manifest).exists():
        return
    tested = list_images(Path(config.data.manifest), split=config.data.split)
    names = [
        {str(resolve(image_root(where), path).resolve()) for path in rows["path"].to_pylist()}
        for where, rows in ((Path(config.data.manifest), tested), (source, table))
    ]
    both = names[0] & names[1]
    if both:
        raise ConfigError(
            f"training: {len(both)} images would be {what} and tested; give data.split, training.split and "
            f"training.validation_split, or training.manifest, so that they differ"
        )


def _hold_out(table: pa.Table, share: float, *, seed: int) -> tuple[pa.Table, pa.Table]:
    """Split off a share of each label and source, at least one image of those that have two."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i, group in enumerate(zip(table["label"].to_pylist(), table["source"].to_pylist(), strict=True)):
        groups.setdefault(group, []).append(i)
    rng = np.random.default_rng([seed, 2])
    held = [
        rows[i]
        for _, rows in sorted(groups.items())
        for i in rng.choice(len(rows), min(len(rows) - 1, max(1, round(share * len(rows)))), replace=False)
    ]
    if not held:
        raise ConfigError(
            "training.validation_share: nothing can be held out, for every label and source has a single image to train on; "
            "give training.validation_split"
        )
    kept = sorted(set(range(len(table))) - set(held))
    return table.take(kept), table.take(sorted(held))


class HumanMaps(NamedTuple):
    """Human maps of the images to train on: a file each, or one average for all; ``record`` says which."""

    files: list[Path | None] | None
    average: Float[np.ndarray, "H W"] | None
    record: dict[str, Any]


def needs_human_maps(strategy: StrategyConfig) -> bool:
    """Whether they weigh anything in its loss."""
    return strategy.loss == "cyborg" and strategy.alpha < 1


def read_human_maps(strategy: StrategyConfig, rows: Rows, size: tuple[int, int]) -> HumanMaps | None:
    """Where the human maps of a strategy come from; each is read once to be sure of it. None: it needs none.

    Raises:
        ManifestError: a map is missing or wrong, or there is none at all.
    """
    if not needs_human_maps(strategy):
        return None
    if strategy.salience.startswith(MEAN_OF):
        folder = _mean_folder(strategy)
        average, count = mean_map(folder, size)
        record = {
            "kind": f"the mean of {count} maps, the same for every image: no annotation of the images",
            "folder": folder.name,
            "maps": count,
            "sha256": hashlib.sha256(average.tobytes()).hexdigest()[:16],
        }
        return HumanMaps(None, average, record)
    every = zip(rows.human_maps, rows.sizes, rows.files, strict=True)
    given = [(file, image_size, image) for file, image_size, image in every if file is not None]
    if not given:
        raise ManifestError(
            f"strategy {strategy.name!r} needs human maps, and no image to train on has one; fill the column 'salience' "
            f"of the manifest, or set salience = 'mean-of:FOLDER'"
        )
    refused, first = 0, ""
    for file, image_size, image in given:
        try:
            load_map(file, image_size=image_size, size=(32, 32))  # a density is cheap to draw so small
        except ManifestError as error:
            refused += 1
            exists = os.path.exists(file)  # noqa: PTH110 - False for a name that no file can have
            hint = "" if exists else "; paths of the column 'salience' are relative to the folder of the manifest"
            first = first or f"that of the image {printable_line(str(image))!r}: {error}{hint}"
    if refused:
        raise ManifestError(f"{refused} of the {len(given)} human maps to train on cannot be used, first {first}")
    hashes = ["" if file is None else hashlib.sha256(read_file(file)).hexdigest() for file in rows.human_maps]
    record = {"kind": "a map for each image", "maps": len(given), "images": len(rows.files), "sha256": digest(hashes)}
    return HumanMaps(rows.human_maps, None, record)


class Example(NamedTuple):
    """One image as it is seen once: uint8 (3, H, W), its class, and its human map (H, W), NaN where it has none."""

    image: UInt8[Tensor, "3 H W"]
    label: Int[Tensor, ""]
    human_map: Float[Tensor, "H W"]


@dataclass
class Examples(Dataset[Example]):
    """Images by (epoch, position); augmented where ``augmentation`` is given."""

    rows: Rows
    size: tuple[int, int]
    interpolation: str
    human_maps: HumanMaps | None = None
    augmentation: AugmentationConfig | None = None
    seed: int = 0
    max_pixels: int = MAX_PIXELS
    _cache: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _map_cache: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.rows.files)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        epoch, position = key
        image, human_map = self._image(position), self._human_map(position)
        if self.augmentation is not None:
            move = draw_move(self.augmentation, np.random.default_rng([self.seed, 1, epoch, position]))
            image = move_image(image, move)
            human_map = move_map(human_map, move) if human_map.numel() > 1 else human_map
        return Example(image, self.rows.labels[position], human_map)

    def _image(self, position: int) -> UInt8[Tensor, "3 H W"]:
        if position not in self._cache:
            file, sha256 = self.rows.files[position], self.rows.sha256[position]
            try:
                array = load_array(
                    file, self.size, self.interpolation, max_pixels=self.max_pixels, expected_sha256=sha256
                )
            except ImageError as error:
                raise ManifestError(f"an image cannot be read any more: {error.message}") from None
            image = torch.from_numpy(array)
            if (len(self._cache) + 1) * image.numel() > CACHE_BYTES:
                return image
            self._cache[position] = image
        return self._cache[position]

    def _human_map(self, position: int) -> Float[Tensor, "H W"]:
        """(1, 1) where nobody asks for it, so that no batch carries maps for nothing."""
        if self.human_maps is None:
            return torch.full((1, 1), torch.nan)
        if self.human_maps.average is not None:
            return torch.from_numpy(self.human_maps.average)
        assert self.human_maps.files is not None
        file = self.human_maps.files[position]
        if file is None:
            return torch.full(self.size, torch.nan)
        if position not in self._map_cache:
            human_map = load_map(file, image_size=self.rows.sizes[position], size=self.size)
            found = torch.from_numpy(human_map.copy())
            if (len(self._map_cache) + 1) * found.nbytes > CACHE_BYTES:
                return found
            self._map_cache[position] = found
        return self._map_cache[position]


@dataclass
class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, position) in an order that depends on (seed, epoch) alone; each rank takes every ``world``-th."""

    num_images: int
    seed: int
    shuffle: bool = True
    class_of: Int[Tensor, " N"] | None = None
    """Given: classes are drawn alike, with replacement."""
    rank: int = 0
    world: int = 1
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        if not self.shuffle:
            return len(range(self.rank, self.num_images, self.world))
        return self.num_images // self.world  # ranks must make the same number of steps

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng([self.seed, 0, self.epoch])
        order = np.arange(self.num_images)
        if self.shuffle and self.class_of is not None:
            shares = class_weights(self.class_of).double()[self.class_of].numpy()
            order = rng.choice(self.num_images, self.num_images, p=shares / shares.sum())
        elif self.shuffle:
            order = rng.permutation(self.num_images)
        return ((self.epoch, int(i)) for i in order[self.rank :: self.world][: len(self)])


def class_weights(labels: Int[Tensor, " N"], num_classes: int | None = None) -> Float[Tensor, " C"]:
    """N / (C N_c) of each class: 1 where all have the same number of images; 0 for a class without any.

    >>> class_weights(torch.tensor([0, 0, 0, 1]))
    tensor([0.6667, 2.0000])
    """
    counts = torch.bincount(labels, minlength=num_classes or 0)
    present = counts > 0
    return torch.where(present, len(labels) / (present.sum() * counts.clamp_min(1)), 0.0)
