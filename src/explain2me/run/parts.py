"""Read a part file of maps as arrays. ``stages/shards/`` makes it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from explain2me.run.packs import read_parquet, unreadable


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

    def of(self, condition: str) -> int:
        """Index of a condition on the first axis."""
        return self.conditions.index(condition)

    def take(self, row: int) -> "Part":
        """The part of one image, as a copy."""
        one = slice(row, row + 1)
        maps, fixed, predicted = (values[:, one].copy() for values in (self.maps, self.fixed, self.predicted))
        return Part(self.images[one].copy(), self.conditions, maps, fixed, predicted)


def read_part(path: Path) -> Part:
    """Read a part file of maps into arrays, one first-axis entry a condition."""
    table = read_parquet(path)
    height, width = (int(side) for side in table.schema.metadata[b"map_size"].decode().split("x"))
    order: list[str] = json.loads(table.schema.metadata[b"conditions"])
    count = len(table) // len(order)
    images = table["image"].to_numpy()[:count]
    _check_blocks(table, order, images, path)
    shape = (len(order), count, height, width)
    maps = _cells(table["map"], height * width)
    fixed = _cells(table["map_fixed"], height * width)
    same = table["map_fixed"].is_null().to_numpy()
    fixed[same] = maps[same]
    predicted = table["predicted"].fill_null(-1).to_numpy().reshape(len(order), count)
    return Part(images, tuple(order), maps.reshape(shape), fixed.reshape(shape), predicted)


def _check_blocks(table: pa.Table, order: Sequence[str], images: np.ndarray, path: Path) -> None:
    """A part holds the same images in the same order for each condition; anything else must not be reshaped."""
    whole = len(table) == len(order) * len(images)
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
