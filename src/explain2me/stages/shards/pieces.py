"""Pieces of a shard that is not finished: the rows of its first images, so that a stop loses seconds, not minutes."""

import contextlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from explain2me.run.files import write_parquet
from explain2me.run.packs import read_parquet
from explain2me.run.plan import Shard
from explain2me.run.record import Model
from explain2me.run.schema import MAPS, part_schema

PIECES = "pieces"
"""Folder of a run with a folder for each unfinished shard."""


def read_pieces(folder: Path, shard: Shard) -> list[pa.Table]:
    """The tables of the pieces of a shard, in order."""
    return [read_parquet(path, schema=MAPS) for path in _paths(folder, shard)]


def write_piece(folder: Path, shard: Shard, table: pa.Table, start: int, stop: int) -> None:
    """Commit the rows of images ``start`` to ``stop``, counted in the order in which the shard explains its images."""
    write_parquet(table, _place(folder, shard) / f"{start:09d}-{stop:09d}.parquet")


def num_in_pieces(folder: Path, shard: Shard) -> int:
    """The number of images of an unfinished shard in its pieces."""
    paths = _paths(folder, shard)
    return int(paths[-1].stem.partition("-")[2]) if paths else 0


def forget_pieces(folder: Path, shards: Iterable[Shard]) -> None:
    """Remove the pieces of shards whose part files are committed."""
    for shard in shards:
        shutil.rmtree(_place(folder, shard), ignore_errors=True)
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


def _paths(folder: Path, shard: Shard) -> list[Path]:
    return sorted(_place(folder, shard).glob("*.parquet"))


def _place(folder: Path, shard: Shard) -> Path:
    return folder / PIECES / shard.title
