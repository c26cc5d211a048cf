"""A run folder, opened for reading.

```
run.json  images.parquet  maps/model=<detector>__<run>/part-00012-<key>.parquet  precision/...
scores/*.parquet  quarantine/*.parquet  summary/*.parquet, *.csv  events.jsonl
```
"""

import contextlib
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from explain2me.config.compare import digest, fingerprint, without_engine
from explain2me.config.load import parse_config
from explain2me.config.schema import Config
from explain2me.errors import ConfigError, RunFolderError
from explain2me.images.listing import image_root, resolve
from explain2me.run.checks.links import refuse_links
from explain2me.run.checks.tables import named, open_parquet, read_groups, unreadable
from explain2me.run.packs import files_on_disk, read_parquet, table_files
from explain2me.run.record import Model, Record, read_record, wrong_record
from explain2me.run.schema import (
    IMAGES,
    MAPS,
    MATRIX_COLUMNS,
    QUARANTINE,
    SCORES,
    SUMMARY_COLUMNS,
    maps_schema,
    summary_schema,
)
from explain2me.text import nearest

GROWING, EARLIER = "growing", "earlier"
"""Folders of a run that grows: its next state, as long as its files are put in place; and files of its states before."""


class Stretch(NamedTuple):
    """Images ``start`` to ``stop`` of images.parquet, which have one label and one source."""

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

    def __init__(self, folder: Path, *, unfinished: bool = False) -> None:
        """Open a folder; ``unfinished``: also where a command that changes the run was stopped."""
        self.folder = folder
        if not unfinished and (folder / GROWING / "run.json").exists():
            raise RunFolderError(
                f"the run in {str(folder)!r} was being changed when a command ended; call `explain2me run` with its config again"
            )
        path, inner, todo = folder / "run.json", folder / "run", "give the folder that `explain2me run` made"
        refuse_links(folder)
        try:
            self.record, known = read_record(path)
        except FileNotFoundError:
            todo = f"give {str(inner)!r}" if (inner / "run.json").exists() else todo
            raise RunFolderError(f"{str(folder)!r} is not a run folder: it has no run.json; {todo}") from None
        except NotADirectoryError:
            raise RunFolderError(f"{str(folder)!r} is a file; {todo}") from None
        except OSError as error:
            raise RunFolderError(f"{path} cannot be read: {error}") from None
        self.classes, self.models = known.classes, known.models
        self.config: Config = _received(known, path)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {len(self.models)} models)"

    def refuse_changed(self) -> None:
        """Raise RunFolderError if another command has given the folder other models, images or settings since it was opened."""
        now = open_run(self.folder)
        before, after = (
            (run.models, run.classes, run.record.get("images_sha256"), fingerprint(run.config)) for run in (self, now)
        )
        if before != after:
            raise RunFolderError(
                f"another command has changed the run in {str(self.folder)!r} meanwhile to another config; call this one again"
            )

    def models_of(self, detector: str) -> list[Model]:
        """The runs of one detector, in order."""
        return [model for model in self.models if model.detector == detector]

    @functools.cached_property
    def image_table(self) -> pa.Table:
        """images.parquet: one row per usable image, ordered by label, source and manifest row."""
        path = self.folder / "images.parquet"
        table = read_parquet(path, schema=IMAGES)
        if not np.array_equal(table["image"].to_numpy(), np.arange(len(table))):
            raise unreadable(path, "its images are not numbered from 0")
        return table

    def maps(self, columns: list[str] | None = None) -> pa.Table:
        """All maps, one row per model, image and condition, with the columns ``detector`` and ``run``.

        Raises:
            ValueError: a column is unknown.
            RunFolderError: a file is missing or cannot be read.
        """
        own = ("detector", "run")
        known = [*maps_schema(1).names, *own]
        for name in columns or ():
            if name not in known:
                raise ValueError(f"columns: expected some of {', '.join(known)}, got {name!r}; {nearest(name, known)}")
        read = None if columns is None else [name for name in columns if name not in own]
        tables = []
        for model in self.models:
            for path in self.part_paths(model):
                table = read_parquet(path, read, schema=MAPS)
                names = [pa.array([name] * len(table)).dictionary_encode() for name in (model.detector, model.run)]
                table = table.append_column("detector", names[0]).append_column("run", names[1])
                tables.append(table.replace_schema_metadata(None))
        return pa.concat_tables(tables, promote_options="permissive") if tables else maps_schema(1).empty_table()

    def scores(self) -> pa.Table:
        """All scores, one row per image, model (or pair of runs), measure, variant, similarity and condition."""
        paths = table_files(self.folder / "scores")
        return (
            pa.concat_tables([read_parquet(path, schema=SCORES) for path in paths]) if paths else SCORES.empty_table()
        )

    def scores_dataset(self) -> ds.Dataset:
        """The rows of :meth:`scores` as a data set, to read some of them."""
        return _dataset(list(self._detectors_in_scores()))

    def scores_by_detector(self) -> dict[str, ds.Dataset]:
        """For each detector, the files with rows of it as a data set: nobody opens those of all others to read them.

        A file may hold rows of others, too.
        """
        paths: dict[str, list[Path]] = {detector.name: [] for detector in self.config.detectors}
        for path, detectors in self._detectors_in_scores().items():
            for name in detectors & paths.keys():
                paths[name].append(path)
        return {name: _dataset(of_detector) for name, of_detector in paths.items()}

    def _detectors_in_scores(self) -> dict[Path, frozenset[str]]:
        """The detectors in each file of scores; raises RunFolderError for a damaged file."""
        num_images = len(self.image_table)
        paths = files_on_disk(self.folder / "scores")
        return {path: _checked_scores(path, path.stat().st_mtime_ns, num_images) for path in paths}

    def summary(self, table: str = "measures") -> pa.Table:
        """One of ``measures``, ``differences``, ``performance``, ``<measure>_matrix`` of a measure of pairs, ``precision`` or ``quarantine``."""
        path = self.folder / "summary" / f"{table}.parquet"
        if not path.exists():
            made = sorted(p.stem for p in path.parent.glob("*.parquet"))
            raise RunFolderError(
                f"no summary table {table!r} in {str(self.folder)!r}: made so far: {', '.join(made) or 'none'}; "
                f"call `explain2me summarise {self.folder}`, or `explain2me run` with its config"
            )
        return read_parquet(path, schema=summary_schema(SUMMARY_COLUMNS.get(table, MATRIX_COLUMNS)))

    def scores_key(self) -> str:
        """Short name of the set of scores in ``scores/``: it follows from the contents of the part files, and the measures.

        The metadata of each summary table holds the key of the scores that it was made from.
        """
        return digest(sorted(path.name for path in table_files(self.folder / "scores")))

    def summary_is_old(self) -> bool:
        """Whether the summary tables were made from other scores than those in ``scores/``; False if nobody can tell."""
        made_from = (self.summary().schema.metadata or {}).get(b"scores")
        return made_from is not None and made_from.decode() != self.scores_key()

    def quarantine(self) -> pa.Table:
        """Every image that could not be used, with its kind and message."""
        paths = sorted((self.folder / "quarantine").glob("*.parquet"))
        return pa.concat_tables([_quarantine(path) for path in paths]) if paths else QUARANTINE.empty_table()

    def unexplained(self) -> dict[str, set[int]]:
        """The images that a model could not explain, by the name of the model: they could not be read any more."""
        images: dict[str, set[int]] = {}
        for row in self.quarantine().to_pylist():
            if row["stage"] == "explain":
                images.setdefault(row["model"], set()).add(row["image"])
        return images

    def mended_images(self) -> list[str]:
        """Paths of images that could not be used when they were indexed, and whose files have come or changed since."""
        written, root = self.folder / "quarantine" / "index.parquet", image_root(Path(self.config.data.manifest))
        mended = []
        for row in self.quarantine().to_pylist() if written.exists() else ():
            with contextlib.suppress(OSError, ValueError):
                status = resolve(root, row["path"]).stat()
                if row["stage"] == "index" and (
                    row["kind"] in ("missing", "dangling_link") or status.st_mtime > written.stat().st_mtime
                ):
                    mended.append(row["path"])
        return mended

    def part_paths(self, model: Model) -> list[Path]:
        """Committed part files of one model, in the order of their images."""
        return table_files(self.folder / "maps" / f"model={model.name}", "part-*.parquet")


@functools.cache
def _checked_scores(path: Path, _: int, num_images: int) -> frozenset[str]:
    """Read a file of scores once, a row group at a time, before a data set reads it without any check; its detectors."""
    detectors: set[str] = set()
    with named(path), open_parquet(path, SCORES) as file:
        for group in range(file.num_row_groups):
            table = read_groups(path, file, [group], schema=SCORES)
            refuse_unknown_images(path, table, num_images)
            detectors.update(table["detector"].unique().to_pylist())
    return frozenset(detectors)


def _dataset(paths: list[Path]) -> ds.Dataset:
    """Files of scores as one data set."""
    if not paths:
        return ds.dataset(SCORES.empty_table())
    options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    checked = ds.ParquetFileFormat(default_fragment_scan_options=options)
    return ds.dataset([str(path) for path in paths], schema=SCORES, format=checked)


def refuse_unknown_images(path: Path, table: pa.Table, num_images: int) -> None:
    """Raise RunFolderError for rows of images that are not in images.parquet."""
    limits = pc.min_max(table["image"]).as_py()
    if len(table) and not 0 <= limits["min"] <= limits["max"] < num_images:
        raise unreadable(path, f"expected images 0 to {num_images - 1}, got {limits['min']} to {limits['max']}")


def _quarantine(path: Path) -> pa.Table:
    table = read_parquet(path, schema=QUARANTINE)
    explained = table.filter(pc.equal(table["stage"], "explain"))
    if explained["image"].null_count or explained["model"].null_count:
        raise unreadable(path, "it has a row of stage 'explain' without an image or a model")
    return table


def _received(record: Record, path: Path) -> Config:
    """The config in run.json with our own engine: a run from somebody else must not name the machines that work here.

    Raises:
        RunFolderError: it is wrong, or does not name the detectors of the models.
    """
    try:
        config = parse_config(record.config)
    except ConfigError as error:
        raise wrong_record(path, str(error)) from None
    named, there = {detector.name for detector in config.detectors}, {model.detector for model in record.models}
    if different := sorted(named ^ there):
        raise wrong_record(
            path, f"expected one or more models of each detector, got none or no detector {different[0]!r}"
        )
    return without_engine(config)


def open_run(folder: str | Path) -> Run:
    """Open a folder that ``explain2me run`` or ``explain2me explain`` made, for reading.

    Raises:
        RunFolderError: run.json is missing or wrong, or the folder holds a link.
    """
    return Run(Path(folder))
