"""Read a part file of maps as arrays. ``stages/shards/`` makes it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from explain2me.errors import RunFolderError
from explain2me.run.checks.tables import unreadable
from explain2me.run.folder import refuse_unknown_images
from explain2me.run.packs import read_parquet
from explain2me.run.schema import MAPS
from explain2me.text import shorten


class Part(NamedTuple):
    """Maps of one model for one contiguous range of images; a row an image, first axis a condition.

    ``maps``, ``fixed``: float32 (C, N, h, w), NaN where there is no map. ``fixed`` equals ``maps`` where the fixed
    class is the one that ``maps`` explains. ``predicted``: int (C, N), -1 where missing. ``images``: (N,).
    """

    images: np.ndarray
    conditions: tuple[str, ...]
    maps: np.ndarray
    fixed: np.ndarray
    predicted: np.ndarray

    @property
    def form(self) -> tuple[object, ...]:
        """What the parts of one detector have in common: conditions, height and width."""
        return (self.conditions, *self.maps.shape[2:])

    def of(self, condition: str) -> int:
        """Index of a condition on the first axis; RunFolderError if the part lacks it."""
        if condition not in self.conditions:
            raise RunFolderError(
                f"a part file of maps lacks the condition {condition!r} of its run; call `explain2me verify` to find it"
            )
        return self.conditions.index(condition)

    def take(self, row: int) -> "Part":
        """The part of one image, as a copy."""
        one = slice(row, row + 1)
        maps, fixed, predicted = (values[:, one].copy() for values in (self.maps, self.fixed, self.predicted))
        return Part(self.images[one].copy(), self.conditions, maps, fixed, predicted)


def read_part(path: Path, num_images: int | None = None) -> Part:
    """Read a part file of maps into arrays, one first-axis entry a condition.

    Raises:
        RunFolderError: the file is not a part file, or holds images beyond the ``num_images`` of its run.
    """
    table = read_part_table(path, num_images)
    height, width, order = _described(table, path)
    count = len(table) // len(order)
    images = table["image"].to_numpy()[:count]
    shape = (len(order), count, height, width)
    maps = _cells(table["map"], height * width)
    fixed = _cells(table["map_fixed"], height * width)
    same = table["map_fixed"].is_null().to_numpy()
    fixed[same] = maps[same]
    predicted = table["predicted"].fill_null(-1).to_numpy().reshape(len(order), count)
    return Part(images, tuple(order), maps.reshape(shape), fixed.reshape(shape), predicted)


def read_part_table(path: Path, num_images: int | None = None) -> pa.Table:
    """The rows of a part file, checked: each image once, ascending, under each condition; errors as of :func:`read_part`."""
    table = read_parquet(path, schema=MAPS)
    *_, order = _described(table, path)
    if num_images is not None:
        refuse_unknown_images(path, table, num_images)
    _check_blocks(table, order, table["image"].to_numpy()[: len(table) // len(order)], path)
    return table


def _described(table: pa.Table, path: Path) -> tuple[int, int, list[str]]:
    """Height and width of the maps, and the names of the conditions, from the metadata of a part file."""
    said = table.schema.metadata or {}
    try:
        height, width = (int(side) for side in said[b"map_size"].decode().split("x"))
        order = json.loads(said[b"conditions"])
        whole = all(isinstance(name, str) for name in order) and 0 < len(order) == len(set(order))
    except (KeyError, TypeError, ValueError, RecursionError):
        whole = False
    sizes = {table.schema.field(name).type.list_size for name in ("map", "map_fixed")}
    if not whole or min(height, width) < 1 or sizes != {height * width}:
        raise unreadable(path, f"expected the size of its maps and its conditions, got {shorten(said)}")
    return height, width, order


def _check_blocks(table: pa.Table, order: Sequence[str], images: np.ndarray, path: Path) -> None:
    """A part holds the same images in the same order for each condition; anything else must not be reshaped."""
    whole = len(table) == len(order) * len(images) and bool((np.diff(images) > 0).all())
    if whole and len(table):
        words = table["condition"].combine_chunks()
        codes = words.indices.to_numpy().reshape(len(order), len(images))
        names = words.dictionary.to_pylist()
        whole = all((codes[i] == codes[i, 0]).all() and names[codes[i, 0]] == name for i, name in enumerate(order))
        whole = whole and bool((table["image"].to_numpy().reshape(len(order), -1) == images).all())
    if not whole:
        raise unreadable(path, f"it does not hold each image once for each of its {len(order)} conditions")


def _cells(column: pa.ChunkedArray, cells: int) -> np.ndarray:
    """A fixed-size-list column as float32 (rows, cells), NaN where null."""
    array = column.combine_chunks()
    values = array.values.to_numpy(zero_copy_only=False).astype(np.float32)
    values = values.reshape(-1, cells)[array.offset : array.offset + len(array)].copy()
    values[array.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return values
