"""Images, labels and human maps of a training, in an order that depends on the seed and the epoch alone."""

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
from explain2me.config.training import AugmentationConfig, TrainingConfig
from explain2me.errors import ConfigError, ImageError, ManifestError
from explain2me.images.augment import draw_move, move_image, move_map
from explain2me.images.containers import container_of
from explain2me.images.decode import MAX_PIXELS, load_array
from explain2me.images.examine import index_images
from explain2me.images.listing import check_labels, image_root, list_images, resolve, sample_images
from explain2me.images.select import class_names
from explain2me.run.files import write_parquet
from explain2me.run.packs import read_parquet
from explain2me.salience.heatmaps import load_map

CACHE_BYTES = 2 * 2**30
"""Decoded images that a process keeps, and as many bytes of human maps; the rest is read again each epoch."""


class Rows(NamedTuple):
    """Images of one split: files, classes, and the files of their human maps where they have one."""

    files: list[Path]
    labels: Int[Tensor, " N"]
    sizes: list[tuple[int, int]]
    human_maps: list[Path | None]
    sha256: list[str]


class HumanMaps(NamedTuple):
    """Human maps of the images to train on: a file each, or one average for all. ``record`` goes into the card."""

    files: list[Path | None] | None
    average: Float[np.ndarray, "H W"] | None
    record: dict[str, Any]


class Listing(NamedTuple):
    """The images to train on and to validate with, before any is opened."""

    source: Path
    classes: tuple[str, ...]
    training: pa.Table
    validation: pa.Table | None


class Splits(NamedTuple):
    """The images to train on and to validate with; ``record`` counts and hashes them for the card."""

    classes: tuple[str, ...]
    training: Rows
    validation: Rows | None
    record: dict[str, Any]
    listing: Listing


def list_splits(config: Config, training: TrainingConfig) -> Listing:
    """List and check the images of a config; opens no image.

    Raises:
        Explain2MeError: a manifest is wrong, labels are absent, there are too few images, or an image would be both trained
            on and tested.
    """
    source, table = _listed(config, training)
    whole = table
    classes = _classes(config, training, source, table)
    _refuse_single_images(table)
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
    listing = Listing(source, classes, table, validation)
    _check_parts(listing, training, whole)
    return listing


def _refuse_single_images(table: pa.Table) -> None:
    """One image of a class cannot be learnt from, and is mostly a misspelt label."""
    counts = Counter(table["label"].to_pylist())
    if min(counts.values()) < 2:
        alone = min(counts, key=lambda label: (counts[label], label))
        raise ConfigError(
            f"training: expected at least 2 images of every class to train on, got 1 of {alone!r}{_misspelt(alone, table)}; "
            f"add some, or leave that class out"
        )


def _check_parts(listing: Listing, training: TrainingConfig, whole: pa.Table) -> None:
    """Both parts differ, have every class, and enough images for each device."""
    _, classes, table, validation = listing
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


def read_splits(config: Config, training: TrainingConfig, index: Path | None = None) -> Splits:
    """List, check and index the images of a config; every file is read once.

    Args:
        config: of the study.
        training: its table [training].
        index: folder that keeps sizes and hashes of the images for other trainings; see :func:`cached_table`.

    Raises:
        Explain2MeError: as :func:`list_splits`, or an image cannot be used.
    """
    listing = list_splits(config, training)
    source, classes, table, validation = listing
    record: dict[str, Any] = {"manifest": source.name, "classes": list(classes)}
    splits: dict[str, Rows | None] = {}
    for name, part, use in (("training", table, "train on"), ("validation", validation, "validate with")):
        rows = splits[name] = None if part is None else _read_rows(part, source, classes, config, use, index)
        if part is not None and rows is not None:
            counts = Counter(zip(part["label"].to_pylist(), part["source"].to_pylist(), strict=True))
            record[name] = {
                "images": len(part),
                "by_label_and_source": {f"{label}/{where}": count for (label, where), count in sorted(counts.items())},
                "sha256": digest([rows.sha256, rows.labels.tolist()]),
            }
    assert splits["training"] is not None
    return Splits(classes, splits["training"], splits["validation"], record, listing)


def cached_table(folder: Path | None, kind: str, key: Any, make: Callable[[], pa.Table]) -> pa.Table:
    """The table that ``make`` returns, kept in a file for the other trainings and processes of a study.

    Args:
        folder: of such files; None calls ``make``.
        kind: first word of the file name.
        key: everything that decides the table, as JSON can hold it; another key is another file.
        make: reads the files that the table is about.
    """
    if folder is None:
        return make()
    path = folder / f"{kind}-{digest(key)}.parquet"
    if not path.exists():
        write_parquet(make(), path)
    return read_parquet(path)


def size_and_time(path: Path) -> tuple[int, int]:
    """Size in bytes and time of change of a file, or of the container that it is in; (-1, 0) where it cannot be asked."""
    container = container_of(path)
    try:
        status = (path if container is None else container[0]).stat()
    except (OSError, ValueError):  # reading the file gives the reason
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _misspelt(label: str, table: pa.Table) -> str:
    """For messages: a similar label of the images to train on, and the first image of the odd one."""
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
    return class_names(config.data, table, where, alone="add images of another label to train on")


def _listed(config: Config, training: TrainingConfig) -> tuple[Path, pa.Table]:
    source = Path(training.manifest or config.data.manifest)
    table = list_images(source, split=training.split, extra=("salience",), classes=config.data.classes)
    _require_labels(table, source, "training")
    return source, sample_images(table, training.sample, seed=config.seed)


def _require_labels(table: pa.Table, source: Path, use: str) -> None:
    if table["label"].null_count:
        raise ManifestError(f"{str(source)!r}: {use} needs labels, and its rows have none; fill the column 'label'")


def _read_rows(
    table: pa.Table, source: Path, classes: Sequence[str], config: Config, use: str, index: Path | None
) -> Rows:
    root, max_pixels = image_root(source), config.data.max_pixels
    files = [resolve(root, path) for path in table["path"].to_pylist()]
    given = table["expected_sha256"].to_pylist() if "expected_sha256" in table.column_names else [None] * len(table)
    listed = [[str(file), *size_and_time(file), sha256] for file, sha256 in zip(files, given, strict=True)]
    facts = cached_table(index, "images", [max_pixels, listed], lambda: _index(table, root, max_pixels, use))
    labels = torch.tensor([classes.index(label) for label in table["label"].to_pylist()])
    sizes = list(zip(facts["height"].to_pylist(), facts["width"].to_pylist(), strict=True))
    maps = [resolve(root, path) if path else None for path in table["salience"].to_pylist()]
    return Rows(files, labels, sizes, maps, facts["sha256"].to_pylist())


def _index(table: pa.Table, root: Path, max_pixels: int, use: str) -> pa.Table:
    """Height, width and sha256 of each image of the table, in its order."""
    usable, refused = index_images(table, root, max_pixels=max_pixels)
    if len(refused):
        raise ManifestError(
            f"{len(refused)} of {len(table)} images to {use} cannot be used, first {refused['path'][0].as_py()!r}: "
            f"{refused['message'][0].as_py()}; mend or remove them: a training must not depend on what could be read"
        )
    order = {name: i for i, name in enumerate(usable["image_id"].to_pylist())}
    rows = [order[name] for name in table["image_id"].to_pylist()]
    return usable.take(rows).select(["height", "width", "sha256"])


def _refuse_tested(config: Config, source: Path, table: pa.Table, use: str) -> None:
    """Refuse to test on images that were trained on: they say nothing about new ones."""
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
            f"training: {len(both)} images would be {use} and tested; give data.split, training.split and "
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


class Example(NamedTuple):
    """One image, or a batch of them: uint8 (3, H, W), its class, and its human map (H, W), NaN where it has none."""

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
        """(1, 1) where the strategy needs none, to keep batches small."""
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
            tensor = torch.from_numpy(human_map.copy())
            if (len(self._map_cache) + 1) * tensor.nbytes > CACHE_BYTES:
                return tensor
            self._map_cache[position] = tensor
        return self._map_cache[position]


@dataclass
class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, position) in an order that depends on (seed, epoch) alone; each rank takes every ``world``-th."""

    num_images: int
    seed: int
    shuffle: bool = True
    class_of: Int[Tensor, " N"] | None = None
    """Class of each image, to draw all classes equally often, with replacement; None: every image once."""
    rank: int = 0
    world: int = 1
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
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
