"""Maps that are there already: of earlier states of a run that has grown, and of other runs that ``--reuse`` names.

A map is the same where everything that decides it is: the weights, how the model reads images, the settings, the classes,
the condition, and the bytes, id and label of the image.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa

from explain2me.config.compare import was_and_is
from explain2me.errors import RunFolderError
from explain2me.run.conditions import conditions_for
from explain2me.run.folder import EARLIER, Run, open_run
from explain2me.run.packs import committed_in, read_parquet
from explain2me.run.plan import Shard, plan, shard_settings
from explain2me.run.record import Model
from explain2me.run.schema import MAPS


class Source(NamedTuple):
    """A run, or an earlier state of one, and the folders in which its ``maps/`` may lie."""

    run: Run
    places: tuple[Path, ...]


def sources_of(folder: Path, reuse: Sequence[Path] = ()) -> tuple[Source, ...]:
    """The earlier states of the run in a folder, and the runs in ``reuse`` with theirs; opened once in a process."""
    states = tuple(sorted(path.parent for path in (folder / EARLIER).glob("*/run.json")))
    others = [source for other in reuse for source in (other, *sorted((other / EARLIER).glob("*/")))]
    runs = (*states, *(path for path in others if (path / "run.json").exists()))
    return _open_sources(runs) if runs else ()


@functools.lru_cache(maxsize=1)
def _open_sources(folders: tuple[Path, ...]) -> tuple[Source, ...]:
    sources = []
    for path in folders:
        whole = path.parent.parent if path.parent.name == EARLIER else path
        sources.append(Source(open_run(path), (whole, whole / EARLIER)))
    return tuple(sources)


def refuse_useless(run: Run, reuse: Sequence[Path]) -> None:
    """Raise RunFolderError where a run to reuse can give no map to ``run``; the message says why."""
    for path in reuse:
        other = open_run(path)
        before, after = ({**_deciding(each), "classes": list(each.classes)} for each in (other, run))
        changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        why = was_and_is(before, after, changed[0]) if changed else "it has no model of this run"
        if changed or not any(_twin(other, model) for model in run.models):
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
    if twin is None or _deciding(source.run) != _deciding(run) or source.run.classes != run.classes:
        return
    images = run.image_table.slice(shard.start, shard.stop - shard.start)
    theirs = _numbers_by_key(source.run).get_indexer(pd.Index(_keys(images)))
    ours = {there: shard.start + i for i, there in enumerate(theirs.tolist()) if there >= 0}
    for part in plan(source.run):
        if part.model != twin or not any(part.start <= there < part.stop for there in ours):
            continue
        for place in source.places:
            path = part.path(place)
            if path.name in committed_in(path.parent):
                table = read_parquet(path, schema=MAPS)
                numbers = table["image"].to_pylist()
                table = table.filter(pa.array([number in ours for number in numbers], pa.bool_()))
                renumbered = pa.array([ours[number] for number in numbers if number in ours], pa.int32())
                yield table.set_column(0, table.schema.field("image"), renumbered)
                break


def _twin(run: Run, model: Model) -> Model | None:
    """The model of a run that makes the same maps as ``model``."""
    return next((other for other in run.models if _decides(other) == _decides(model)), None)


def _decides(model: Model) -> tuple[Any, ...]:
    weights = (model.architecture, model.weights_sha256, model.layer, model.input_size)
    return (*weights, model.num_classes, model.mean, model.std, model.interpolation)


@functools.lru_cache(maxsize=64)
def _deciding(run: Run) -> Mapping[str, object]:
    """The settings that decide a map under a given condition."""
    settings = shard_settings(run.config)
    return {key: value for key, value in settings.items() if not key.startswith("measures.")}


@functools.lru_cache(maxsize=64)
def _numbers_by_key(run: Run) -> pd.Index:
    return pd.Index(_keys(run.image_table))


def _keys(images: pa.Table) -> list[str]:
    """What decides the pixels, the seeds and the target of each image."""
    columns = (images[name].to_pylist() for name in ("image_id", "sha256", "label"))
    return [repr(key) for key in zip(*columns, strict=True)]
