"""Maps that are there already: of earlier states of a run that has grown, and of other runs that ``--reuse`` names.

A map is the same where everything that decides it is: the weights, how the model reads images, the settings, the classes,
the condition, and the bytes, id and label of the image.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from explain2me.config.compare import was_and_is
from explain2me.config.schema import Config
from explain2me.errors import RunFolderError
from explain2me.run.checks.tables import unreadable
from explain2me.run.conditions import conditions_for
from explain2me.run.folder import EARLIER, Run, open_run
from explain2me.run.packs import packed_in
from explain2me.run.parts import read_part_table
from explain2me.run.plan import Shard, plan, shard_settings
from explain2me.run.record import Model


class Source:
    """A run, or an earlier state of one, and the folders in which its ``maps/`` may lie."""

    def __init__(self, run: Run, places: Sequence[Path]) -> None:
        self.run, self._places = run, places
        self.deciding = _deciding(run.config)
        self._parts: dict[Model, dict[int, Shard]] = {model: {} for model in run.models}
        for shard in plan(run):
            self._parts[shard.model][shard.part] = shard
        self._numbers = pd.Index(_keys(run.image_table))

    def rows(self, model: Model, images: pa.Table, first: int) -> Iterator[pa.Table]:
        """The rows of some images of a model, which are numbered from ``first`` on; a part file at a time."""
        theirs = self._numbers.get_indexer(pd.Index(_keys(images)))
        ours = {there: first + i for i, there in enumerate(theirs.tolist()) if there >= 0}
        for part in sorted({there // self.run.config.compute.shard_size for there in ours}):
            path = self._find(self._parts[model][part])
            if path is not None:
                table = _checked(path, self.run, model)
                numbers = table["image"].to_pylist()
                table = table.filter(pa.array([number in ours for number in numbers], pa.bool_()))
                renumbered = pa.array([ours[number] for number in numbers if number in ours], pa.int32())
                yield table.set_column(0, table.schema.field("image"), renumbered)

    def _find(self, shard: Shard) -> Path | None:
        paths = [shard.path(place) for place in self._places]
        return next((path for path in paths if path.exists() or path.name in packed_in(path.parent)), None)


def _checked(path: Path, run: Run, model: Model) -> pa.Table:
    """A part file of a model; RunFolderError if its rows are not what a model of this kind gives."""
    table = read_part_table(path, len(run.image_table))
    lengths = set(pc.list_value_length(table["logits"]).unique().drop_null().to_pylist())
    size = run.record.get("map_sizes", {}).get(model.name)
    if not lengths <= {1, model.num_classes} or (
        size and table.schema.field("map").type.list_size != size[0] * size[1]
    ):
        raise unreadable(path, "its logits or maps are not of the size that run.json says")
    return table


def sources_of(folder: Path, reuse: Sequence[Path] = ()) -> tuple[Source, ...]:
    """The earlier states of the run in a folder, and the runs in ``reuse`` with theirs; opened once in a process."""
    runs = [state.parent for state in sorted((folder / EARLIER).glob("*/run.json"))]
    for other in reuse:
        runs += [other, *(state.parent for state in sorted((other / EARLIER).glob("*/run.json")))]
    return _open_sources(tuple(runs)) if runs else ()


@functools.lru_cache(maxsize=1)
def _open_sources(folders: tuple[Path, ...]) -> tuple[Source, ...]:
    sources = []
    for path in folders:
        whole = path.parent.parent if path.parent.name == EARLIER else path
        sources.append(Source(open_run(path), (whole, whole / EARLIER)))
    return tuple(sources)


def refuse_other_settings(config: Config, reuse: Sequence[Path]) -> None:
    """Raise RunFolderError where a run to reuse has other settings than a config, before anything is read or written."""
    after = _deciding(config)
    for path in reuse:
        before = _deciding(open_run(path).config)
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key) != "auto"]
        if changed:
            _refuse(path, was_and_is(before, after, changed[0]))


def refuse_useless(run: Run, reuse: Sequence[Path]) -> None:
    """Raise RunFolderError where a run to reuse has other classes than ``run``, or none of its models."""
    refuse_other_settings(run.config, reuse)
    for path in reuse:
        other = open_run(path)
        if other.classes != run.classes:
            _refuse(path, f"its classes are {list(other.classes)}, those of this run {list(run.classes)}")
        if not any(_twin(other, model) for model in run.models):
            _refuse(path, "it has no model of this run")


def _refuse(path: Path, why: str) -> None:
    raise RunFolderError(f"--reuse {str(path)!r}: this run can take no map of it: {why}; leave the option out")


def known_rows(run: Run, shard: Shard, sources: Sequence[Source]) -> pa.Table | None:
    """The rows of a shard that sources hold: each image and condition at most once; None if there are none."""
    wanted = {condition.name for condition in conditions_for(run.config.measures, shard.model.input_size)}
    known: set[tuple[int, str]] = set()
    tables: list[pa.Table] = []
    for source in sources:
        for table in _rows_in(run, shard, source):
            pairs = list(zip(table["image"].to_pylist(), table["condition"].to_pylist(), strict=True))
            new = [pair not in known and pair[1] in wanted for pair in pairs]
            known.update(pair for pair, is_new in zip(pairs, new, strict=True) if is_new)
            tables.append(table.filter(pa.array(new, pa.bool_())))
    tables = [table for table in tables if len(table)]
    return pa.concat_tables(tables).unify_dictionaries() if tables else None


def _rows_in(run: Run, shard: Shard, source: Source) -> Iterator[pa.Table]:
    """The rows of the images of a shard in the part files of a source, numbered as in the shard."""
    twin = _twin(source.run, shard.model)
    if twin is not None and source.deciding == _deciding(run.config) and source.run.classes == run.classes:
        yield from source.rows(twin, run.image_table.slice(shard.start, shard.stop - shard.start), shard.start)


def _twin(run: Run, model: Model) -> Model | None:
    """The model of a run that makes the same maps as ``model``."""
    return next((other for other in run.models if other.deciding == model.deciding), None)


def _deciding(config: Config) -> Mapping[str, object]:
    """The settings that decide a map under a given condition."""
    settings = shard_settings(config)
    return {key: value for key, value in settings.items() if not key.startswith("measures.")}


def _keys(images: pa.Table) -> list[str]:
    """What decides the pixels, the seeds and the target of each image."""
    columns = (images[name].to_pylist() for name in ("image_id", "sha256", "label"))
    return [repr(key) for key in zip(*columns, strict=True)]
