"""Pieces of a shard that is not finished: the rows of its first images, so that a stop loses seconds, not minutes."""

import contextlib
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from explain2me.config.compare import digest
from explain2me.run.conditions import Condition
from explain2me.run.files import write_parquet
from explain2me.run.parts import read_part_table
from explain2me.run.plan import Shard
from explain2me.run.record import Model
from explain2me.run.schema import part_schema

PIECES = "pieces"
"""Folder of a run with a folder for each unfinished shard."""
NAME = re.compile(r"([0-9a-f]{16})-(\d{9})-(\d{9})\.parquet")
"""Of a piece: key of the tasks, first image and the image after the last."""


Tasks = Sequence[tuple[Sequence[Condition], Sequence[int]]]
"""Images of a shard that are to be explained under the same conditions, in their order."""


def key_of(tasks: Tasks) -> str:
    """Short name of what a shard has to explain; it differs where other maps are there already."""
    return digest([[[condition.name for condition in conditions], list(images)] for conditions, images in tasks])


def read_pieces(folder: Path, shard: Shard, key: str) -> list[pa.Table]:
    """The tables of the pieces of a shard that were made for these tasks, in order."""
    return [read_part_table(path) for path, _ in _chain(folder, shard, key)]


def write_piece(folder: Path, shard: Shard, key: str, table: pa.Table, start: int, stop: int) -> None:
    """Commit the rows of images ``start`` to ``stop``, counted in the order of the tasks."""
    write_parquet(table, _place(folder, shard) / f"{key}-{start:09d}-{stop:09d}.parquet")


def num_in_pieces(folder: Path, shard: Shard, key: str | None = None) -> int:
    """The number of images of an unfinished shard in its pieces, for some tasks or for those that came furthest."""
    keys = {match[1] for match in map(NAME.fullmatch, _names(folder, shard)) if match} if key is None else {key}
    return max((stop for key in keys for _, stop in _chain(folder, shard, key)), default=0)


def _chain(folder: Path, shard: Shard, key: str) -> list[tuple[Path, int]]:
    """Pieces that follow each other, and where each stops: two processes at one shard may cut it differently."""
    chain: list[tuple[Path, int]] = []
    stop = 0
    for name in _names(folder, shard):
        match = NAME.fullmatch(name)
        if match and match[1] == key and int(match[2]) == stop:
            stop = int(match[3])
            chain.append((_place(folder, shard) / name, stop))
    return chain


def forget_pieces(folder: Path, shard: Shard) -> None:
    """Remove the pieces of a shard whose part file is committed."""
    shutil.rmtree(_place(folder, shard), ignore_errors=True)
    _remove_if_empty(folder)


def keep_pieces(folder: Path, unfinished: Iterable[Shard]) -> None:
    """Remove the pieces of all but these shards: of part files that are committed, or planned no more."""
    titles = {shard.title for shard in unfinished}
    for place in (folder / PIECES).glob("*"):
        if place.name not in titles:
            shutil.rmtree(place, ignore_errors=True)
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # of other shards
        (folder / PIECES).rmdir()


def joined(tables: Sequence[pa.Table], model: Model, conditions: Sequence[str]) -> pa.Table:
    """Rows of several tables as the one of a part file: ordered by condition, then image."""
    whole = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
    rank = {name: i for i, name in enumerate(conditions)}
    order = np.lexsort((whole["image"].to_numpy(), [rank[name] for name in whole["condition"].to_pylist()]))
    arrays = dict(zip(whole.column_names, whole.take(order).combine_chunks().columns, strict=True))
    arrays["condition"] = arrays["condition"].cast(pa.string()).combine_chunks().dictionary_encode()
    size = whole.schema.metadata[b"map_size"].decode()
    # the schema of a table that was read differs from the one that was written in bytes, though it is equal
    schema = part_schema(model.name, size, conditions)
    return pa.Table.from_arrays(list(arrays.values()), schema=schema)


def _names(folder: Path, shard: Shard) -> list[str]:
    return sorted(path.name for path in _place(folder, shard).glob("*.parquet"))


def _place(folder: Path, shard: Shard) -> Path:
    return folder / PIECES / shard.title
