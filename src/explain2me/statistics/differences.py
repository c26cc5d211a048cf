"""Rows of summary/differences: each pair of detectors, compared in each score of the tables and in AUROC.

The difference with its interval is :func:`explain2me.statistics.estimates.difference`.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from explain2me.run.folder import Stretch
from explain2me.statistics.cells import Cell, Quantity, mean_over_conditions, selections, units_of
from explain2me.statistics.estimates import Estimate, Totals, above_chance, difference, estimate, totals
from explain2me.statistics.performance import AurocKey
from explain2me.statistics.scores import CLEAN, MEASURES


class Compared(NamedTuple):
    """Totals of one cell of one detector; ``chance`` is None for a measure of single maps."""

    condition: str
    value: Totals
    chance: Totals | None


def compared_by(cell: Cell, num_runs: int, stretches: Sequence[Stretch]) -> Compared:
    """Totals of a cell. They take little memory, so the totals of all detectors are kept and their cells are not."""
    measure = MEASURES[cell.quantity.measure]
    units = units_of(measure, num_runs)
    value = totals(mean_over_conditions(cell.value), units, stretches)
    chance = totals(mean_over_conditions(cell.chance), units, stretches) if measure.compares else None
    return Compared(cell.condition, value, chance)


def difference_rows(
    compared: Mapping[str, Sequence[Compared]], quantity: Quantity, stretches: Sequence[Stretch]
) -> Iterator[dict[str, Any]]:
    """One row for each pair of detectors, condition and selection of images; ``difference`` is first minus other.

    Args:
        compared: by detector, each with the same conditions. The names of shifts hold pixels, which may differ.
        quantity: of all cells.
        stretches: of the images.
    """
    for by_detector in zip(*compared.values(), strict=True):
        for selection in selections(stretches):
            sizes = [stretches[i].stop - stretches[i].start for i in selection.stretches]
            values = [estimate(each.value, selection.stretches) for each in by_detector]
            corrected = [
                each.chance and above_chance(value, estimate(each.chance, selection.stretches))
                for value, each in zip(values, by_detector, strict=True)
            ]
            for (a, name), (b, other) in itertools.combinations(enumerate(compared), 2):
                labels = {"detector": name, "other_detector": other, **quantity._asdict()}
                labels |= {"condition": by_detector[a].condition, "label": selection.label, "source": selection.source}
                yield labels | _numbers(values[a], values[b], sizes) | _above_chance(corrected[a], corrected[b], sizes)


def auroc_difference_rows(
    aurocs: Mapping[str, Mapping[AurocKey, Estimate]], stretches: Sequence[Stretch]
) -> Iterator[dict[str, Any]]:
    """One row for each pair of detectors: AUROC of all clean images, and of each source against the other class."""
    sizes = [stretch.stop - stretch.start for stretch in stretches]
    for name, other in itertools.combinations(aurocs, 2):
        for key, ours in aurocs[name].items():
            score, label, source = key
            labels = {"detector": name, "other_detector": other, "measure": "auroc", "variant": score}
            labels |= {"condition": CLEAN, "label": label, "source": source}
            yield labels | _numbers(ours, aurocs[other][key], sizes)


def _numbers(a: Estimate, b: Estimate, sizes: Sequence[int]) -> dict[str, Any]:
    result = difference(a, b, sizes)
    return {
        "num_images": int((~np.isnan(a.images) & ~np.isnan(b.images)).sum()),
        "num_runs": a.num_runs,
        "num_other_runs": b.num_runs,
        "difference": result.value,
        "std_error": result.std_error,
        "df": result.df,
        "ci_low": result.low,
        "ci_high": result.high,
        "p": result.p,
    }


def _above_chance(a: Estimate | None, b: Estimate | None, sizes: Sequence[int]) -> dict[str, float]:
    if a is None or b is None:
        return {}
    result = difference(a, b, sizes)
    return {"corrected": result.value, "corrected_low": result.low, "corrected_high": result.high}
