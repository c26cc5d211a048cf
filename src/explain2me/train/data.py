"""Images, labels and human maps of a training, in an order that depends on the seed and the epoch alone."""

import difflib
from collections import Counter
from collections.abc import Callable, Iterator
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
from explain2me.config.schema import DataConfig
from explain2me.config.training import AugmentationConfig, TrainingConfig
from explain2me.errors import ConfigError, ImageError, ManifestError
from explain2me.images.augment import draw_move, move_image, move_map
from explain2me.images.containers import container_of
from explain2me.images.decode import MAX_PIXELS, load_array
from explain2me.images.examine import index_images, refuse_contradictions
from explain2me.images.listing import check_labels, image_root, list_images, resolve, sample_images
from explain2me.images.select import class_names
from explain2me.run.files import write_parquet
from explain2me.run.packs import read_parquet
from explain2me.salience.heatmaps import load_map

USES = {"training": "train on", "validation": "validate with"}
"""What the images of each part are for, in messages."""

CACHE_BYTES = 2 * 2**30
"""Decoded images that a process keeps, and as many bytes of human maps; the rest is read again each epoch."""


class Rows(NamedTuple):
    """Images of one split; ``sizes`` are height and width, ``human_maps`` None where an image has none."""

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


class ListedSplits(NamedTuple):
    """The images to train on and to validate with, before any is opened."""

    source: Path
    classes: tuple[str, ...]
    training: pa.Table
    validation: pa.Table | None

    @property
    def parts(self) -> dict[str, pa.Table]:
        """The tables that there are, by ``training`` and ``validation``."""
        tables = {"training": self.training, "validation": self.validation}
        return {name: table for name, table in tables.items() if table is not None}


class Splits(NamedTuple):
    """The images to train on and to validate with; ``record`` counts and hashes them for the card."""

    classes: tuple[str, ...]
    training: Rows
    validation: Rows | None
    record: dict[str, Any]


def list_splits(data: DataConfig, settings: TrainingConfig, seed: int) -> ListedSplits:
    """List and check the images to train on and to validate with; opens no image.

    ``data`` says which are tested; ``seed``, that of the study, draws the sample and what is held out.

    Raises:
        Explain2MeError: a manifest is wrong, labels are absent, there are too few images, or an image would be both trained
            on and tested.
    """
    source = Path(settings.manifest or data.manifest)
    table = _list_labelled(source, settings.split, data.classes, "training")
    table = sample_images(table, settings.sample, seed=seed)
    where = repr(str(source)) + ("" if settings.split is None else f", split {settings.split!r}")
    classes = class_names(data, table, where, alone="add images of another label to train on")
    _refuse_single_images(table)
    _refuse_tested(data, source, table, "trained on")
    listed = ListedSplits(source, classes, table, None)
    if settings.validation_split is not None:
        validation = _list_labelled(source, settings.validation_split, data.classes, "validating")
        check_labels(validation, classes)
        _refuse_tested(data, source, validation, "validated with")
        listed = listed._replace(validation=validation)
    elif settings.validation_share:
        kept, held_out = _hold_out(table, settings.validation_share, seed=seed)
        listed = listed._replace(training=kept, validation=held_out)
    _check_parts(listed, settings, table)
    return listed


def _list_labelled(source: Path, split: str | None, classes: tuple[str, ...] | None, use: str) -> pa.Table:
    table = list_images(source, split=split, extra=("salience",), classes=classes)
    if table["label"].null_count:
        raise ManifestError(f"{str(source)!r}: {use} needs labels, and its rows have none; fill the column 'label'")
    return table


def _refuse_single_images(table: pa.Table) -> None:
    """One image of a class cannot be learnt from, and is mostly a misspelt label."""
    counts = Counter(table["label"].to_pylist())
    if min(counts.values()) < 2:
        alone = min(counts, key=lambda label: (counts[label], label))
        raise ConfigError(
            f"training: expected at least 2 images of every class to train on, got 1 of {alone!r}{_misspelt(alone, table)}; "
            f"add some, or leave that class out"
        )


def _refuse_tested(data: DataConfig, source: Path, table: pa.Table, use: str) -> None:
    """Refuse to test on images that were trained on: they say nothing about new ones."""
    manifest = Path(data.manifest)
    if not manifest.exists():
        return
    tested = list_images(manifest, split=data.split)
    both = _real_paths(manifest, tested) & _real_paths(source, table)
    if both:
        raise ConfigError(
            f"training: {len(both)} images would be {use} and tested; give data.split, training.split and "
            f"training.validation_split, or training.manifest, so that they differ"
        )


def _real_paths(source: Path, table: pa.Table) -> set[str]:
    root = image_root(source)
    return {str(resolve(root, path).resolve()) for path in table["path"].to_pylist()}


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


def _check_parts(listed: ListedSplits, settings: TrainingConfig, whole: pa.Table) -> None:
    """Both parts differ, have every class, and enough images for each device."""
    table, validation = listed.training, listed.validation
    both = set(table["path"].to_pylist()) & set([] if validation is None else validation["path"].to_pylist())
    if both:
        raise ConfigError(
            f"training: {len(both)} images are in the split to train on and in the one to validate with, first "
            f"{min(both)!r}; give training.split and training.validation_split different ones"
        )
    for name, part in listed.parts.items():
        missing = set(listed.classes) - set(part["label"].to_pylist())
        if missing and (name == "training" or settings.monitor == "auroc"):
            raise ConfigError(
                f"training: expected images of every class to {USES[name]}, got none of {min(missing)!r}"
                f"{_misspelt(min(missing), whole)}; add some, or leave that class out"
            )
    num_each = len(table) // settings.devices
    if num_each < settings.batch_size:
        raise ConfigError(
            f"training.batch_size = {settings.batch_size} is more than the {num_each} images to train on"
            + (" of each device" if settings.devices > 1 else "")
        )
    if validation is not None and len(validation) < settings.devices:
        raise ConfigError(
            f"training.devices = {settings.devices}: expected at least one image to validate with on each, got {len(validation)}"
        )


def _misspelt(label: str, table: pa.Table) -> str:
    """For messages: a similar label of the images to train on, and the first image of the odd one."""
    labels = table["label"].to_pylist()
    near = difflib.get_close_matches(label, set(labels) - {label}, n=1) if label in labels else []
    return f" (the label of {table['path'][labels.index(label)].as_py()!r}; is {near[0]!r} meant?)" if near else ""


def read_splits(listed: ListedSplits, max_pixels: int, index: Path | None = None) -> Splits:
    """Read every image once; a ManifestError where one cannot be used.

    ``index`` is a folder that keeps their sizes and hashes for other trainings; see :func:`cached_table`.
    """
    record: dict[str, Any] = {"manifest": listed.source.name, "classes": list(listed.classes)}
    splits: dict[str, Rows] = {}
    for name, part in listed.parts.items():
        rows = splits[name] = _read_rows(part, listed, USES[name], max_pixels, index)
        counts = Counter(zip(part["label"].to_pylist(), part["source"].to_pylist(), strict=True))
        record[name] = {
            "images": len(part),
            "by_label_and_source": {f"{label}/{where}": count for (label, where), count in sorted(counts.items())},
            "sha256": digest([rows.sha256, rows.labels.tolist()]),
        }
    _refuse_same_pictures(listed, splits)
    return Splits(listed.classes, splits["training"], splits.get("validation"), record)


def _refuse_same_pictures(listed: ListedSplits, splits: dict[str, Rows]) -> None:
    """Refuse a picture with two labels, and one that is both trained on and validated with; by its bytes."""
    parts = [
        part.select(["path", "label"]).append_column("sha256", pa.array(splits[name].sha256))
        for name, part in listed.parts.items()
    ]
    refuse_contradictions(pa.concat_tables(parts), repr(str(listed.source)))
    training, *validation = splits.values()
    files = dict(zip(training.sha256, training.files, strict=True))
    for rows in validation:
        for file, sha256 in zip(rows.files, rows.sha256, strict=True):
            if sha256 in files:
                raise ManifestError(
                    f"training: {str(files[sha256])!r} and {str(file)!r} are the same picture, one to {USES['training']}, one to "
                    f"{USES['validation']}; remove one"
                )


def _read_rows(part: pa.Table, listed: ListedSplits, use: str, max_pixels: int, index: Path | None) -> Rows:
    root = image_root(listed.source)
    files = [resolve(root, path) for path in part["path"].to_pylist()]
    given = part["expected_sha256"].to_pylist() if "expected_sha256" in part.column_names else [None] * len(part)
    names = [[str(file), *size_and_time(file), sha256] for file, sha256 in zip(files, given, strict=True)]
    facts = cached_table(index, "images", [max_pixels, names], lambda: _index(part, root, max_pixels, use))
    labels = torch.tensor([listed.classes.index(label) for label in part["label"].to_pylist()])
    sizes = list(zip(facts["height"].to_pylist(), facts["width"].to_pylist(), strict=True))
    maps = [resolve(root, path) if path else None for path in part["salience"].to_pylist()]
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


def cached_table(folder: Path | None, kind: str, key: Any, make: Callable[[], pa.Table]) -> pa.Table:
    """The table that ``make`` returns, kept in a file of ``folder`` for the other trainings and processes of a study.

    ``key`` is everything that decides the table, as JSON can hold it: another key, or another ``kind``, is another file.
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
        if position in self._cache:
            return self._cache[position]
        file, sha256 = self.rows.files[position], self.rows.sha256[position]
        try:
            array = load_array(file, self.size, self.interpolation, max_pixels=self.max_pixels, expected_sha256=sha256)
        except ImageError as error:
            raise ManifestError(f"an image cannot be read any more: {error.message}") from None
        return _remember(torch.from_numpy(array), position, self._cache)

    def _human_map(self, position: int) -> Float[Tensor, "H W"]:
        """(1, 1) where the strategy needs none, to keep batches small."""
        if self.human_maps is None:
            return torch.full((1, 1), torch.nan)
        if self.human_maps.files is None:
            return torch.from_numpy(self.human_maps.average)
        file = self.human_maps.files[position]
        if file is None:
            return torch.full(self.size, torch.nan)
        if position in self._map_cache:
            return self._map_cache[position]
        human_map = load_map(file, image_size=self.rows.sizes[position], size=self.size)
        return _remember(torch.from_numpy(human_map.copy()), position, self._map_cache)


def _remember(tensor: Tensor, position: int, cache: dict[int, Tensor]) -> Tensor:
    """Keep the tensor while the cache has room."""
    if (len(cache) + 1) * tensor.nbytes <= CACHE_BYTES:
        cache[position] = tensor
    return tensor


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
        if not self.shuffle:
            order = np.arange(self.num_images)
        elif self.class_of is None:
            order = rng.permutation(self.num_images)
        else:
            shares = class_weights(self.class_of).double()[self.class_of].numpy()
            order = rng.choice(self.num_images, self.num_images, p=shares / shares.sum())
        return ((self.epoch, int(i)) for i in order[self.rank :: self.world][: len(self)])


def class_weights(labels: Int[Tensor, " N"], num_classes: int | None = None) -> Float[Tensor, " C"]:
    """N / (C N_c) of each class: 1 where all have the same number of images; 0 for a class without any.

    >>> class_weights(torch.tensor([0, 0, 0, 1]))
    tensor([0.6667, 2.0000])
    """
    counts = torch.bincount(labels, minlength=num_classes or 0)
    present = counts > 0
    return torch.where(present, len(labels) / (present.sum() * counts.clamp_min(1)), 0.0)
