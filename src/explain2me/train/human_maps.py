"""Where the human maps of a strategy come from, checked before training."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from explain2me.config.compare import digest
from explain2me.config.training import StrategyConfig
from explain2me.errors import ManifestError
from explain2me.images.listing import image_root, resolve
from explain2me.salience.heatmaps import maps_of, mean_map, parse_map, read_map
from explain2me.text import printable_line
from explain2me.train.data import HumanMaps, ListedSplits, Rows, cached_table, size_and_time
from explain2me.train.training import Training

MEAN_OF = "mean-of:"
CHECK_SIZE = (32, 32)
"""Height and width at which maps are checked: a density of fixations is cheap to draw so small."""


def needs_human_maps(strategy: StrategyConfig) -> bool:
    """Whether human maps have a weight in its loss."""
    return strategy.loss == "cyborg" and strategy.alpha < 1


def read_human_maps(
    strategy: StrategyConfig, rows: Rows, size: tuple[int, int], index: Path | None = None
) -> HumanMaps | None:
    """The human maps of a strategy, each read and checked once; None where it needs none.

    Args:
        strategy: of the training.
        rows: images to train on.
        size: height and width of the average of ``mean-of:FOLDER``.
        index: folder that keeps the result for other trainings; see :func:`explain2me.train.data.cached_table`.

    Raises:
        ManifestError: a map is missing or wrong, or there is none at all.
    """
    if not needs_human_maps(strategy):
        return None
    folder = mean_folder(strategy)
    return _map_of_each_image(strategy, rows, index) if folder is None else _mean_map(folder, size, index)


def read_all_human_maps(
    trainings: Sequence[Training], rows: Rows, sizes: Mapping[str, tuple[int, int]]
) -> dict[tuple[StrategyConfig, str], HumanMaps | None]:
    """The human maps of each strategy and architecture of a study; ``sizes`` are the inputs of its architectures."""
    index = trainings[0].index
    guides = dict.fromkeys((training.strategy, training.architecture) for training in trainings)
    return {guide: read_human_maps(guide[0], rows, sizes[guide[1]], index) for guide in guides}


def mean_folder(strategy: StrategyConfig) -> Path | None:
    """The folder whose maps are averaged, of ``salience = "mean-of:FOLDER"``."""
    averaged = needs_human_maps(strategy) and strategy.salience.startswith(MEAN_OF)
    return Path(strategy.salience.removeprefix(MEAN_OF)) if averaged else None


def listed_digest(listed: ListedSplits, strategy: StrategyConfig) -> str:
    """A hash of the list of images, the classes, and name, size and time of a strategy's human maps; opens no file.

    A training reads the same data where it is equal, unless images were changed under their names. A ManifestError where
    the folder of ``mean-of:FOLDER`` is missing or holds no map.
    """
    columns = ("expected_sha256", "label", "path", "source")
    rows = [[part[name].to_pylist() for name in columns if name in part.column_names] for part in listed.parts.values()]
    maps: list[Any] = []
    if folder := mean_folder(strategy):
        maps = [folder.name, *((path.name, *size_and_time(path)) for path in maps_of(folder))]
    elif needs_human_maps(strategy):
        root, paths = image_root(listed.source), listed.training["salience"].to_pylist()
        maps = [(path, *size_and_time(resolve(root, path))) if path else None for path in paths]
    return digest([listed.source.name, listed.classes, rows, maps])


def _mean_map(folder: Path, size: tuple[int, int], index: Path | None) -> HumanMaps:
    files = maps_of(folder)
    key = [size, *([str(path.resolve()), *size_and_time(path)] for path in files)]
    table = cached_table(index, "mean", key, lambda: pa.table({"value": mean_map(folder, size)[0].ravel()}))
    average = table["value"].to_numpy().astype(np.float32).reshape(size)
    record = {
        "kind": f"the mean of {len(files)} maps, the same for every image: no annotation of the images",
        "folder": folder.name,
        "maps": len(files),
        "sha256": hashlib.sha256(average.tobytes()).hexdigest()[:16],
    }
    return HumanMaps(None, average, record)


def _map_of_each_image(strategy: StrategyConfig, rows: Rows, index: Path | None) -> HumanMaps:
    files = {i: file for i, file in enumerate(rows.human_maps) if file is not None}
    if not files:
        raise ManifestError(
            f"strategy {strategy.name!r} needs human maps, and no image to train on has one; fill the column 'salience' "
            f"of the manifest, or set salience = 'mean-of:FOLDER'"
        )
    key = [[str(file), *size_and_time(file), *rows.sizes[i]] for i, file in files.items()]
    hashes = cached_table(index, "maps", key, lambda: _check_maps(rows, files))["sha256"].to_pylist()
    sha256 = dict(zip(files, hashes, strict=True))
    record: dict[str, Any] = {
        "kind": "a map for each image",
        "maps": len(files),
        "images": len(rows.files),
        "sha256": digest([sha256.get(i, "") for i in range(len(rows.files))]),
    }
    return HumanMaps(rows.human_maps, None, record)


def _check_maps(rows: Rows, files: Mapping[int, Path]) -> pa.Table:
    """The sha256 of the map of each of these images; every map is read once."""
    hashes, errors = [], []
    for i, file in files.items():
        try:
            content = read_map(file)
            parse_map(content, file, image_size=rows.sizes[i], size=CHECK_SIZE)
            hashes.append(hashlib.sha256(content).hexdigest())
        except ManifestError as error:
            exists = os.path.exists(file)  # noqa: PTH110 - False for a name that no file can have
            hint = "" if exists else "; paths of the column 'salience' are relative to the folder of the manifest"
            errors.append(f"that of the image {printable_line(str(rows.files[i]))!r}: {error}{hint}")
    if errors:
        raise ManifestError(
            f"{len(errors)} of the {len(files)} human maps to train on cannot be used, first {errors[0]}"
        )
    return pa.table({"sha256": hashes})
