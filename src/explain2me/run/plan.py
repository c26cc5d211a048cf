"""The plan of a run: its shards, and the names of their part files.

A shard is one model x a contiguous range of images x all conditions. It sets the borders of its batches, because batches
of 1 and of 16 differ in the last bits. Its file name holds a key of everything that decides its bytes.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from explain2me.config.compare import digest, fingerprint
from explain2me.config.schema import Config
from explain2me.errors import RunFolderError
from explain2me.run.folder import Run
from explain2me.run.packs import committed_in
from explain2me.run.record import Model
from explain2me.run.schema import RESULTS_VERSION, SCHEMA_VERSION

Item = TypeVar("Item")
PRECISION_IMAGES = 32
"""Images of each model that are explained in float32 as well, if the run has another precision."""


class Shard(NamedTuple):
    """Images ``start`` to ``stop`` (rows of images.parquet) of one model; ``part`` counts within the model."""

    model: Model
    part: int
    start: int
    stop: int
    key: str

    @property
    def file_name(self) -> str:
        """``part-00012-<key>.parquet``."""
        return f"part-{self.part:05d}-{self.key}.parquet"

    @property
    def title(self) -> str:
        """File name that no other shard of the run has."""
        return f"{self.model.name}-{self.file_name}"

    def path(self, folder: Path) -> Path:
        """Where the part file is committed."""
        return folder / "maps" / f"model={self.model.name}" / self.file_name


@functools.lru_cache(maxsize=8)
def plan(run: Run) -> tuple[Shard, ...]:
    """Every shard of a run, model by model, in a fixed order; cached, because every stage needs it."""
    images = run.image_table
    size = run.config.compute.shard_size
    settings = shard_settings(run.config)
    contents = [digest(images.slice(start, size).to_pylist()) for start in range(0, len(images), size)]
    return tuple(
        Shard(model, part, part * size, min((part + 1) * size, len(images)), _key(model, settings, content, run))
        for model in run.models
        for part, content in enumerate(contents)
    )


@functools.lru_cache(maxsize=1)
def planned(run: Run) -> frozenset[Shard]:
    """The shards of a run, to look one up."""
    return frozenset(plan(run))


def precision_sample(run: Run) -> list[int]:
    """The images that each model explains in float32 as well, if the run has another precision."""
    count = len(run.image_table)
    return sorted({i * count // PRECISION_IMAGES for i in range(PRECISION_IMAGES)})


def precision_path(run: Run, shard: Shard) -> Path:
    """Where the float32 maps of a model lie, of which ``shard`` is the first: the name follows from the sampled images."""
    rows = run.image_table.take(precision_sample(run)).to_pylist()
    name = f"part-00000-{digest([shard.key, rows])}.parquet"
    return run.folder / "precision" / f"model={shard.model.name}" / name


def missing_of(shards: Sequence[Shard], folder: Path) -> list[Shard]:
    """Shards that are not committed yet."""
    places = {shard.path(folder).parent for shard in shards}
    committed = {place / name for place in places for name in committed_in(place)}
    return [shard for shard in shards if shard.path(folder) not in committed]


def refuse_unplanned(shards: Sequence[Shard], folder: Path) -> None:
    """Raise RunFolderError for part files outside the plan of all models: readers would take them for results of this run."""
    planned: dict[Path, set[str]] = {}
    for shard in shards:
        planned.setdefault(shard.path(folder).parent, set()).add(shard.file_name)
    for place, names in planned.items():
        if unplanned := sorted(name for name in committed_in(place) - names if name.startswith("part-")):
            raise RunFolderError(
                f"{place} holds {len(unplanned)} part files that are not of this run, first {unplanned[0]!r}: a version of "
                f"explain2me with other results made them; give --out another folder"
            )


def share_of(shards: Sequence[Item], share: tuple[int, int]) -> Sequence[Item]:
    """The i-th of N contiguous shares of about the same length, so that a machine loads few models.

    >>> [share_of(range(5), (i, 2)) for i in range(2)]
    [range(0, 2), range(2, 5)]
    """
    index, count = share
    return shards[index * len(shards) // count : (index + 1) * len(shards) // count]


def shard_settings(config: Config) -> dict[str, object]:
    """The settings that decide the bytes of every part file; paths and names of detectors do not."""
    compute = tuple(f"compute.{name}" for name in ("device", "precision", "batch_size", "threads"))
    deciding = ("seed", "salience.", "measures.", *compute)
    settings = {key: value for key, value in fingerprint(config).items() if key.startswith(deciding)}
    return settings | ({"compute.compile": True} if config.compute.compile else {})


def _key(model: Model, settings: dict[str, object], content: str, run: Run) -> str:
    weights = (model.architecture, model.weights_sha256, model.layer, model.input_size)
    reading = (model.mean, model.std, model.interpolation)  # see DECIDING of run/record.py
    return digest([SCHEMA_VERSION, RESULTS_VERSION, settings, *weights, reading, run.classes, content])
