"""Rows of summary/differences: each pair of detectors in each number of the tables, and in AUROC."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from explain2me.run.folder import Stretch
from explain2me.statistics.cells import Cell, Quantity, mean_over_conditions, selections, units_of
from explain2me.statistics.estimates import Estimate, Totals, above_chance, difference, estimate, totals
from explain2me.statistics.performance import AurocKey

DIFFERENCE_COLUMNS = (
    "detector", "other_detector", "measure", "variant", "similarity", "condition", "label", "source", "num_images", "num_runs",
    "num_other_runs", "difference", "std_error", "df", "ci_low", "ci_high", "p", "corrected", "corrected_low",
    "corrected_high",
)  # fmt: skip


class Compared(NamedTuple):
    """Of a cell of one detector what its differences from others need; there is no chance level of entropy."""

    condition: str
    value: Totals
    chance: Totals | None


def compared_by(cell: Cell, num_runs: int, stretches: Sequence[Stretch]) -> Compared:
    """Sums over runs, which are all that is kept of a cell while other detectors are read."""
    units = units_of(cell.measure, num_runs)
    value = totals(mean_over_conditions(cell.value), units, stretches)
    chance = None if cell.measure == "entropy" else totals(mean_over_conditions(cell.chance), units, stretches)
    return Compared(cell.condition, value, chance)


def difference_rows(
    compared: Mapping[str, Sequence[Compared]], quantity: Quantity, stretches: Sequence[Stretch]
) -> Iterator[dict[str, Any]]:
    """Each pair of detectors, condition and selection of images; ``difference`` is of the first less the other.

    Args:
        compared: by detector, each with the same conditions (shifts are named by pixels, which may differ).
        quantity: of all of them.
        stretches: of the images.
    """
    for of_each in zip(*compared.values(), strict=True):
        for selection in selections(stretches):
            sizes = [stretches[i].stop - stretches[i].start for i in selection.stretches]
            values = [estimate(each.value, selection.stretches) for each in of_each]
            corrected = [
                each.chance and above_chance(value, estimate(each.chance, selection.stretches))
                for value, each in zip(values, of_each, strict=True)
            ]
            for (a, name), (b, other) in itertools.combinations(enumerate(compared), 2):
                yield {
                    "detector": name,
                    "other_detector": other,
                    **quantity._asdict(),
                    "condition": of_each[a].condition,
                    "label": selection.label,
                    "source": selection.source,
                    "num_images": _num_of_both(values[a], values[b]),
                    **_numbers(values[a], values[b], sizes),
                    **_above_chance(corrected[a], corrected[b], sizes),
                }


def auroc_difference_rows(
    aurocs: Mapping[str, Mapping[AurocKey, Estimate]], stretches: Sequence[Stretch]
) -> Iterator[dict[str, Any]]:
    """Each pair of detectors in the AUROC of all clean images, and of each source against all of the other class."""
    sizes = [stretch.stop - stretch.start for stretch in stretches]
    for name, other in itertools.combinations(aurocs, 2):
        for key, ours in aurocs[name].items():
            score, label, source = key
            yield {
                "detector": name,
                "other_detector": other,
                "measure": "auroc",
                "variant": score,
                "condition": "clean",
                "label": label,
                "source": source,
                "num_images": _num_of_both(ours, aurocs[other][key]),
                **_numbers(ours, aurocs[other][key], sizes),
            }


def _num_of_both(a: Estimate, b: Estimate) -> int:
    """Images that have a value of both."""
    return int((~np.isnan(a.images) & ~np.isnan(b.images)).sum())


def without_runs(row: Mapping[str, Any]) -> list[str]:
    """The detectors of a difference of whose other trainings nothing is known: those of one run, or one pair of runs.

    The interval of such a difference is over images alone.
    """
    enough = 3 if row["measure"] == "stability" else 2
    counts = ((row["detector"], row["num_runs"]), (row["other_detector"], row["num_other_runs"]))
    return [name for name, count in counts if count < enough]


def _numbers(a: Estimate, b: Estimate, sizes: Sequence[int]) -> dict[str, float]:
    found = difference(a, b, sizes)
    return {
        "num_runs": a.num_runs,
        "num_other_runs": b.num_runs,
        "difference": found.value,
        "std_error": found.std_error,
        "df": found.df,
        "ci_low": found.low,
        "ci_high": found.high,
        "p": found.p,
    }


def _above_chance(a: Estimate | None, b: Estimate | None, sizes: Sequence[int]) -> dict[str, float]:
    if a is None or b is None:
        return {}
    found = difference(a, b, sizes)
    return {"corrected": found.value, "corrected_low": found.low, "corrected_high": found.high}
