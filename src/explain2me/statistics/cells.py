"""Arrangement of the scores of a run as arrays, units x conditions x images: one cell for each number of the tables."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from explain2me.errors import RunFolderError
from explain2me.run.conditions import conditions_of
from explain2me.run.folder import Run, Stretch
from explain2me.run.record import Model
from explain2me.statistics.scores import ALL, MEASURES, Measure

FEW_CELLS = 25
"""A map of fewer cells is called coarse; the maps of the paper have 7 x 7 cells."""

MOST_EMPTY = 16
"""Values of a score that a run should have, for each row of its scores: beyond, arrays of them would hold little."""


class Quantity(NamedTuple):
    """Measure, variant and similarity of a score."""

    measure: str
    variant: str
    similarity: str | None


class Cell(NamedTuple):
    """All values of one score: units (runs, or pairs of runs) x conditions x images; NaN where a value is not valid."""

    quantity: Quantity
    condition: str
    value: np.ndarray  # (U, C, N)
    chance: np.ndarray  # (U, C, N)
    present: np.ndarray  # bool (U, C, N)
    dead: np.ndarray  # bool (U, C, N)
    kept: np.ndarray | None  # int8 (U, C, N): 1 kept, 0 flipped, -1 unknown


class Selection(NamedTuple):
    """The stretches of images of one source, of one label, or of the whole run."""

    label: str
    source: str
    stretches: tuple[int, ...]


def quantities_of(dataset: ds.Dataset, detector: str) -> Iterator[Quantity]:
    """The quantities with scores of a detector, in the order of the tables; ``dataset`` is that of the detector."""
    for name in MEASURES:
        rows = (ds.field("detector") == detector) & (ds.field("measure") == name)
        table = dataset.to_table(["variant", "similarity"], filter=rows).group_by(["variant", "similarity"])
        quantities = [Quantity(name, row["variant"], row["similarity"]) for row in table.aggregate([]).to_pylist()]
        yield from sorted(quantities, key=lambda quantity: (quantity.similarity or "", quantity.variant))


def cells_of(run: Run, dataset: ds.Dataset, detector: str, quantity: Quantity) -> Iterator[Cell]:
    """One cell for each condition, then one for each group of conditions of the measure; ``dataset`` is of the detector."""
    measure, models = MEASURES[quantity.measure], run.models_of(detector)
    conditions = conditions_of(measure, run.config.measures, models[0].input_size)
    names = [condition.name for condition in conditions]
    rows = (ds.field("detector") == detector) & (ds.field("measure") == measure.name)
    similarity = ds.field("similarity")
    rows &= similarity.is_null() if quantity.similarity is None else similarity == quantity.similarity
    num_columns = len(units_of(measure, len(models))) * len(names)
    if not num_columns:
        raise RunFolderError(
            f"{run.folder / 'scores'} holds scores of {measure.name}, for which run.json names no condition or too few runs of "
            f"{detector!r}; call `explain2me measure {run.folder}`"
        )
    if num_columns * len(run.image_table) > MOST_EMPTY * (dataset.count_rows() + 4096):
        raise RunFolderError(
            f"{run.folder / 'scores'} lacks most scores of {measure.name} for the {len(models)} models of {detector!r}; call "
            f"`explain2me measure {run.folder}`"
        )
    batches = dataset.to_batches(filter=rows & (ds.field("variant") == quantity.variant))
    value, chance, present, dead, kept = _dense(run, models, measure, names, batches)
    picks = [(name, [i]) for i, name in enumerate(names)]
    picks += [(group, [i for i, c in enumerate(conditions) if c.group == group]) for group in measure.groups]
    if measure.has_mean_over_conditions:
        picks.append((ALL, list(range(len(names)))))
    for name, some in picks:
        known = kept[:, some] if (kept >= 0).any() else None
        yield Cell(quantity, name, value[:, some], chance[:, some], present[:, some], dead[:, some], known)


def units_of(measure: Measure, num_runs: int) -> list[tuple[int, ...]]:
    """The units of a measure, each the positions of its runs: every run, or every pair of runs."""
    return list(itertools.combinations(range(num_runs), measure.runs_per_value))


def selections(stretches: Sequence[Stretch]) -> list[Selection]:
    """Each source (of each label), each label, and all images."""
    chosen = [Selection(s.label or ALL, s.source, (i,)) for i, s in enumerate(stretches)]
    for label in sorted({s.label for s in stretches if s.label is not None}):
        chosen.append(Selection(label, ALL, tuple(i for i, s in enumerate(stretches) if s.label == label)))
    return [*chosen, Selection(ALL, ALL, tuple(range(len(stretches))))]


def mean_over_conditions(array: np.ndarray) -> np.ndarray:
    """(U, C, N) -> (U, N): mean of the values that are defined; NaN where none is."""
    if array.shape[1] == 1:
        return array[:, 0]
    defined = ~np.isnan(array)
    with np.errstate(invalid="ignore"):
        return np.where(defined, array, 0).sum(1) / defined.sum(1)


def _dense(
    run: Run, models: Sequence[Model], measure: Measure, conditions: Sequence[str], batches: Iterable[pa.RecordBatch]
) -> tuple[np.ndarray, ...]:
    """The columns value, chance, present, dead and kept of the score files as arrays (U, C, N)."""
    names = [model.run for model in models]
    units = units_of(measure, len(names))
    shape = (len(units), len(conditions), len(run.image_table))
    value, chance = np.full(shape, np.nan), np.full(shape, np.nan)
    present, dead, kept = np.zeros(shape, bool), np.zeros(shape, bool), np.full(shape, -1, np.int8)
    unit_of = np.zeros((len(names), len(names) + 1), dtype=np.int64)
    for number, (first, *other) in enumerate(units):
        unit_of[first, other or [-1]] = number  # the last column, -1, stands for no other run
    for batch in batches:
        of_run, condition = _codes(batch, "run", names), _codes(batch, "condition", conditions)
        if min(of_run.min(initial=0), condition.min(initial=0)) < 0:
            raise RunFolderError(
                f"{run.folder / 'scores'} holds scores of {measure.name} for a run or condition that run.json does not name; "
                f"call `explain2me measure {run.folder}`"
            )
        place = (unit_of[of_run, _codes(batch, "other_run", names)], condition, batch["image"].to_numpy())
        value[place] = batch["value"].to_numpy(zero_copy_only=False)
        chance[place] = batch["chance"].to_numpy(zero_copy_only=False)
        present[place], dead[place] = True, batch["dead"].to_numpy(zero_copy_only=False)
        kept[place] = batch["kept"].cast(pa.int8()).fill_null(-1).to_numpy()
    return value, chance, present, dead, kept


def _codes(batch: pa.RecordBatch, name: str, words: Sequence[str]) -> np.ndarray:
    """Position in ``words`` of each row of a dictionary column; -1 for null."""
    column = batch[name]
    # the dictionary also holds words of rows that the filter removed
    positions = np.array([words.index(word) if word in words else -1 for word in column.dictionary.to_pylist()] or [-1])
    codes = column.indices.fill_null(-1).to_numpy()
    return np.where(codes < 0, -1, positions[codes])


def drop_nan(values: np.ndarray) -> np.ndarray:
    """The values that are defined."""
    return values[~np.isnan(values)]


def mean_of(values: np.ndarray) -> float:
    """The mean of some values; NaN of no values."""
    return float(np.mean(values)) if len(values) else float("nan")
