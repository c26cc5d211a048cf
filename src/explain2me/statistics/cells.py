"""The scores of a run as arrays, one cell for each number of the tables: units x conditions x images."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from explain2me.run.conditions import conditions_for
from explain2me.run.folder import Run, Stretch
from explain2me.run.record import Model
from explain2me.run.schema import ALL

MEASURES = ("entropy", "noise", "resilience", "focus", "stability")


GROUPS = ("shifts", "flips", "rotations", ALL)


class Quantity(NamedTuple):
    """What a number is, but for its condition."""

    measure: str
    variant: str
    similarity: str | None


FEW_CELLS = 25
"""Maps of fewer cells than that are called coarse; the paper's have 7 x 7."""
LARGE_DEAD_SHARE = 0.05
"""From this share of dead maps on the means of detectors are of too different images to compare."""


class Cell(NamedTuple):
    """All values of one number: units (runs, or pairs of runs) x conditions x images, NaN where not valid."""

    measure: str
    variant: str
    similarity: str | None
    condition: str
    value: np.ndarray  # (U, C, N)
    chance: np.ndarray  # (U, C, N)
    present: np.ndarray  # bool (U, C, N)
    dead: np.ndarray  # bool (U, C, N)
    kept: np.ndarray | None  # int8 (U, C, N): 1 kept, 0 flipped, -1 unknown


class Selection(NamedTuple):
    """Some stretches of images: one source, all of a label, or everything."""

    label: str
    source: str
    stretches: tuple[int, ...]


def quantities_of(run: Run, detector: str) -> Iterator[Quantity]:
    """What a detector has scores of, in the order of the tables."""
    dataset = run.scores_dataset()
    for measure in MEASURES:
        wanted = (ds.field("detector") == detector) & (ds.field("measure") == measure)
        table = dataset.to_table(["variant", "similarity"], filter=wanted).group_by(["variant", "similarity"])
        found = [Quantity(measure, row["variant"], row["similarity"]) for row in table.aggregate([]).to_pylist()]
        yield from sorted(found, key=lambda quantity: (quantity.similarity or "", quantity.variant))


def cells_of(run: Run, detector: str, quantity: Quantity) -> Iterator[Cell]:
    """A cell a condition, and for resilience one a group of transforms."""
    similarity = ds.field("similarity")
    same = similarity.is_null() if quantity.similarity is None else similarity == quantity.similarity
    wanted = (ds.field("detector") == detector) & (ds.field("measure") == quantity.measure)
    rows = run.scores_dataset().to_batches(filter=wanted & (ds.field("variant") == quantity.variant) & same)
    return _dense(run, run.models_of(detector), quantity, rows)


def units_of(measure: str, num_runs: int) -> list[tuple[int, ...]]:
    """What is scored, by the positions of the runs: each run, or for stability each pair of runs."""
    return list(itertools.combinations(range(num_runs), 2 if measure == "stability" else 1))


def selections(stretches: Sequence[Stretch]) -> list[Selection]:
    """Each source (of each label), each label, and everything."""
    found = [Selection(s.label or ALL, s.source, (i,)) for i, s in enumerate(stretches)]
    for label in sorted({s.label for s in stretches if s.label is not None}):
        found.append(Selection(label, ALL, tuple(i for i, s in enumerate(stretches) if s.label == label)))
    return [*found, Selection(ALL, ALL, tuple(range(len(stretches))))]


def mean_over_conditions(array: np.ndarray) -> np.ndarray:
    """(U, C, N) -> (U, N): mean over the conditions that are defined; NaN where none is."""
    if array.shape[1] == 1:
        return array[:, 0]
    defined = ~np.isnan(array)
    with np.errstate(invalid="ignore"):
        return np.where(defined, array, 0).sum(1) / defined.sum(1)


def _dense(
    run: Run,
    models: Sequence[Model],
    quantity: Quantity,
    batches: Iterable[pa.RecordBatch],
) -> Iterator[Cell]:
    """Long rows to arrays: one cell a condition, and for resilience one a group of transforms."""
    names = [model.run for model in models]
    units = units_of(quantity.measure, len(names))
    conditions = [c for c in conditions_for(run.config.measures, models[0].input_size) if c.measure == quantity.measure]
    labels = [condition.name for condition in conditions] or ["clean"]
    shape = (len(units), len(labels), len(run.image_table))
    value, chance = np.full(shape, np.nan), np.full(shape, np.nan)
    present, dead, kept = np.zeros(shape, bool), np.zeros(shape, bool), np.full(shape, -1, np.int8)
    unit_of = np.zeros((len(names), len(names) + 1), dtype=np.int64)
    for number, (first, *other) in enumerate(units):
        unit_of[first, other or [-1]] = number  # the last column, -1, is for no other run
    for batch in batches:
        unit = unit_of[_codes(batch, "run", names), _codes(batch, "other_run", names)]
        where = (unit, _codes(batch, "condition", labels), batch["image"].to_numpy())
        value[where] = batch["value"].to_numpy(zero_copy_only=False)
        chance[where] = batch["chance"].to_numpy(zero_copy_only=False)
        present[where], dead[where] = True, batch["dead"].to_numpy(zero_copy_only=False)
        kept[where] = batch["kept"].cast(pa.int8()).fill_null(-1).to_numpy()
    picks = [(label, [i]) for i, label in enumerate(labels)]
    if quantity.measure == "resilience":
        groups = [condition.group for condition in conditions]
        picks += [(group, [i for i, g in enumerate(groups) if group in (ALL, g)]) for group in GROUPS]
    for label, some in picks:
        known = kept[:, some] if (kept >= 0).any() else None
        yield Cell(*quantity, label, value[:, some], chance[:, some], present[:, some], dead[:, some], known)


def _codes(batch: pa.RecordBatch, name: str, words: Sequence[str]) -> np.ndarray:
    """Position in ``words`` of each row of a dictionary column; -1 for null."""
    column = batch[name]
    # the dictionary also holds words of rows that were filtered out
    positions = np.array([words.index(word) if word in words else -1 for word in column.dictionary.to_pylist()] or [-1])
    codes = column.indices.fill_null(-1).to_numpy()
    return np.where(codes < 0, -1, positions[codes])


def drop_nan(values: np.ndarray) -> np.ndarray:
    """The values that are defined."""
    return values[~np.isnan(values)]


def mean_of(values: np.ndarray) -> float:
    """Their mean; NaN where there is none."""
    return float(np.mean(values)) if len(values) else float("nan")
