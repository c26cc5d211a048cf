"""The files of a run: Parquet schemas, and reading back.

```
run.json  images.parquet  maps/model=<detector>__<run>/part-00012-<key>.parquet  precision/...
scores/*.parquet  quarantine/*.parquet  summary/*.parquet, *.csv  events.jsonl
```
"""

import functools
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from explain2me.config import Config, digest, parse_config
from explain2me.errors import RunFolderError
from explain2me.files import files_on_disk, read_parquet, table_files

SCHEMA_VERSION = 1
RESULTS_VERSION = 1
"""Raised by each release in which a number of stage 1 or 2 changes; maps of another one are refused, scores made anew."""

IMAGES = pa.schema(
    [
        ("image", pa.int32()),
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("label", pa.string()),
        ("source", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
    ]
)
WORD = pa.dictionary(pa.int32(), pa.string())
SCORES = pa.schema(
    [
        ("image", pa.int32()),
        ("detector", WORD),
        ("run", WORD),
        ("other_run", WORD),
        ("measure", WORD),
        ("variant", WORD),
        ("similarity", WORD),
        ("condition", WORD),
        ("value", pa.float64()),
        ("valid", pa.bool_()),
        ("kept", pa.bool_()),
        ("dead", pa.bool_()),
        ("chance", pa.float64()),
    ]
)
QUARANTINE = pa.schema(
    [
        ("image", pa.int32()),
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("model", pa.string()),
        ("stage", pa.string()),
        ("kind", pa.string()),
        ("message", pa.string()),
    ]
)


def maps_schema(cells: int) -> pa.Schema:
    """The columns of a part file of maps with ``cells`` = h * w cells a map."""
    return pa.schema(
        [
            ("image", pa.int32()),
            ("condition", WORD),
            ("logits", pa.list_(pa.float32())),
            ("predicted", pa.int32()),
            ("map", pa.list_(pa.float32(), cells)),
            ("map_fixed", pa.list_(pa.float32(), cells)),
        ]
    )


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """run.json with a hash of all else in it, by which :func:`explain2me.verify.verify_run` sees that it was changed."""
    return record | {"sha256": record_hash(record)}


def record_hash(record: dict[str, Any]) -> str:
    """Of everything in run.json but the hash itself."""
    return digest({key: value for key, value in record.items() if key != "sha256"})


@dataclass(frozen=True)
class Model:
    """One run (checkpoint) of one detector, as recorded in run.json."""

    detector: str
    run: str
    architecture: str
    checkpoint: str | None
    seed: int
    weights_sha256: str
    layer: str
    input_size: tuple[int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    @property
    def name(self) -> str:
        """``<detector>__<run>``, the folder under maps/."""
        return f"{self.detector}__{self.run}"


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
        return Part(
            self.images[one].copy(),
            self.conditions,
            self.maps[:, one].copy(),
            self.fixed[:, one].copy(),
            self.predicted[:, one].copy(),
        )


class Stretch(NamedTuple):
    """Images ``start`` to ``stop`` of images.parquet: one label and one source."""

    label: str | None
    source: str
    start: int
    stop: int


def stretches_of(images: pa.Table) -> list[Stretch]:
    """The stretches of images.parquet with one label and one source each, in order."""
    labels, sources = images["label"].to_pylist(), images["source"].to_pylist()
    keys = list(zip(labels, sources, strict=True))
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    return [Stretch(*keys[a], a, b) for a, b in itertools.pairwise([*starts, len(keys)])]


class Run:
    """A run folder, opened for reading. ``run.maps()``, ``run.scores()`` and ``run.summary()`` are pyarrow Tables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "run.json"
        try:
            self.record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            inner = folder / "run"
            todo = (
                f"give {str(inner)!r}"
                if (inner / "run.json").exists()
                else "give the folder that `explain2me run` made"
            )
            raise RunFolderError(f"{str(folder)!r} is not a run folder: it has no run.json; {todo}") from None
        except NotADirectoryError:
            raise RunFolderError(f"{str(folder)!r} is a file; give the folder that `explain2me run` made") from None
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path} cannot be read: {error}") from None
        version = self.record.get("schema")
        if version != SCHEMA_VERSION:
            raise RunFolderError(
                f"{path}: expected schema {SCHEMA_VERSION}, got {version!r}; open it with the version that wrote it"
            )
        self.config: Config = parse_config(self.record["config"])
        self.classes: tuple[str, ...] = tuple(self.record["classes"])
        tuples = ("input_size", "mean", "std")
        self.models = tuple(Model(**row | {name: tuple(row[name]) for name in tuples}) for row in self.record["models"])

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {len(self.models)} models)"

    def models_of(self, detector: str) -> list[Model]:
        """The runs of one detector, in order."""
        return [model for model in self.models if model.detector == detector]

    @functools.cached_property
    def image_table(self) -> pa.Table:
        """images.parquet: one row a usable image, ordered by label, source and manifest row."""
        return read_parquet(self.folder / "images.parquet")

    def maps(self, columns: list[str] | None = None) -> pa.Table:
        """All maps, one row a model, image and condition; columns ``detector`` and ``run`` are added."""
        tables = []
        for model in self.models:
            for path in self.part_paths(model):
                table = read_parquet(path, columns)
                names = [pa.array([name] * len(table)).dictionary_encode() for name in (model.detector, model.run)]
                table = table.append_column("detector", names[0]).append_column("run", names[1])
                tables.append(table.replace_schema_metadata(None))
        return pa.concat_tables(tables, promote_options="permissive") if tables else maps_schema(1).empty_table()

    def scores(self) -> pa.Table:
        """All scores, one row an image, model (or pair of runs), measure, variant, similarity and condition."""
        paths = table_files(self.folder / "scores")
        return pa.concat_tables([read_parquet(path) for path in paths]) if paths else SCORES.empty_table()

    def scores_dataset(self) -> ds.Dataset:
        """The same rows as :meth:`scores`, for reading a part of them."""
        checked = ds.ParquetFileFormat(
            default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        )
        paths = [str(path) for path in files_on_disk(self.folder / "scores")]
        return ds.dataset(paths, schema=SCORES, format=checked)

    def summary(self, table: str = "measures") -> pa.Table:
        """One of ``measures``, ``differences``, ``performance``, ``stability_matrix``, ``precision`` or ``quarantine``."""
        path = self.folder / "summary" / f"{table}.parquet"
        if not path.exists():
            made = sorted(p.stem for p in path.parent.glob("*.parquet"))
            raise RunFolderError(
                f"no summary table {table!r} in {str(self.folder)!r}: made so far: {', '.join(made) or 'none'}; "
                f"call `explain2me summarise {self.folder}`"
            )
        return read_parquet(path)

    def quarantine(self) -> pa.Table:
        """Every image that could not be used, with its kind and message."""
        paths = sorted((self.folder / "quarantine").glob("*.parquet"))
        return pa.concat_tables([read_parquet(path) for path in paths]) if paths else QUARANTINE.empty_table()

    def part_paths(self, model: Model) -> list[Path]:
        """Part files of one model that are committed, in order of images."""
        return table_files(self.folder / "maps" / f"model={model.name}", "part-*.parquet")


def open_run(folder: str | Path) -> Run:
    """Open a run folder for reading.

    Args:
        folder: made by ``explain2me run`` or ``explain2me explain``.

    Raises:
        RunFolderError: there is no run.json, or it cannot be read.
    """
    return Run(Path(folder))


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
        raise RunFolderError(
            f"{path} does not hold each image once for each of its {len(order)} conditions; delete it and call the same "
            f"command again"
        )


def _cells(column: pa.ChunkedArray, cells: int) -> np.ndarray:
    """A fixed-size-list column as float32 (rows, cells), NaN where null."""
    array = column.combine_chunks()
    values = array.values.to_numpy(zero_copy_only=False).astype(np.float32)
    values = values.reshape(-1, cells)[array.offset : array.offset + len(array)].copy()
    values[array.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return values
