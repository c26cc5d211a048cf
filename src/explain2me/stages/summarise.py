"""Stage 3: scores and logits to the tables of summary/. docs/design.md lists the columns."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds

from explain2me.config.schema import Config
from explain2me.errors import RunFolderError
from explain2me.run.events import log_event
from explain2me.run.files import atomic_path, only_writer, replaced_folder, write_parquet
from explain2me.run.folder import Run, Stretch, stretches_of
from explain2me.run.schema import (
    DIFFERENCE_COLUMNS,
    MATRIX_COLUMNS,
    MEASURE_COLUMNS,
    PERFORMANCE_COLUMNS,
    PRECISION_COLUMNS,
    QUARANTINE_COLUMNS,
    summary_schema,
)
from explain2me.stages.precision import precision_rows
from explain2me.statistics.bootstrap import image_weights, interval, pair_weights, run_weights
from explain2me.statistics.cells import (
    Cell,
    Quantity,
    Selection,
    cells_of,
    drop_nan,
    mean_of,
    mean_over_conditions,
    quantities_of,
    selections,
)
from explain2me.statistics.chance import corrected
from explain2me.statistics.differences import (
    Compared,
    auroc_difference_rows,
    compared_by,
    difference_rows,
)
from explain2me.statistics.estimates import Estimate
from explain2me.statistics.performance import (
    AurocKey,
    auroc_estimates,
    performance_rows,
    predictions_of,
)
from explain2me.statistics.scores import MEASURES
from explain2me.text import no_formula

Rows = list[dict[str, Any]]
Intervals = Callable[[int, Selection], dict[str, float]]
"""(index of a cell, selection of images) -> limits of its intervals."""


def summarise_run(run: Run, config: Config, *, on_done: Callable[[int, int], None] | None = None) -> None:
    """Write summary/*.parquet and *.csv from the scores and logits of a run, all at once.

    Args:
        run: with its scores.
        config: of the run; the number of resamples may differ.
        on_done: called after each step with the number of steps done and the number in all.

    Raises:
        RunFolderError: there are no scores.
        BusyError: another process writes into the run.
    """
    started = time.monotonic()
    with only_writer(run.folder):
        run.refuse_changed()
        if not any((run.folder / "scores").glob("*.parquet")):
            raise RunFolderError(
                f"no scores in {str(run.folder)!r}; call `explain2me measure {run.folder}` first, or `explain2me run` with its "
                f"config"
            )
        tables = _tables(run, config, on_done)
        with replaced_folder(run.folder / "summary") as folder:
            for name, (columns, rows) in tables.items():
                _write(folder, name, rows, columns, made_from=run.scores_key())
    log_event(run.folder, (0, 1), "summarise", "done", seconds=round(time.monotonic() - started, 3))


def _tables(
    run: Run, config: Config, on_done: Callable[[int, int], None] | None
) -> dict[str, tuple[Sequence[str], Rows]]:
    """Columns and rows of each summary table, by its name."""
    datasets = run.scores_by_detector()
    quantities = {name: list(quantities_of(dataset, name)) for name, dataset in datasets.items()}
    steps = itertools.count(1)
    num_steps = len(dict.fromkeys(itertools.chain(*quantities.values()))) + len(quantities)

    def step() -> None:
        if on_done:
            on_done(next(steps), num_steps)

    resamples = config.summary.bootstrap
    measures, matrices, differences = _summarise_scores(run, datasets, quantities, resamples, step)
    performance, auroc_differences = _summarise_predictions(run, resamples, step)
    return {
        "measures": (MEASURE_COLUMNS, measures),
        "differences": (DIFFERENCE_COLUMNS, differences + auroc_differences),
        "performance": (PERFORMANCE_COLUMNS, performance),
        **{f"{measure}_matrix": (MATRIX_COLUMNS, rows) for measure, rows in matrices.items()},
        "precision": (PRECISION_COLUMNS, list(precision_rows(run, config.measures))),
        "quarantine": (QUARANTINE_COLUMNS, _quarantine_rows(run)),
    }


def _summarise_scores(
    run: Run,
    datasets: Mapping[str, ds.Dataset],
    quantities: Mapping[str, Sequence[Quantity]],
    resamples: int,
    on_step: Callable[[], None],
) -> tuple[Rows, dict[str, Rows], Rows]:
    """Rows of summary/measures, of the matrices by measure, and of summary/differences.

    The arrays of one quantity are in memory at a time. ``datasets`` and ``quantities`` are by detector; ``on_step`` is called after each.
    """
    stretches = stretches_of(run.image_table)
    measures: dict[str, Rows] = {name: [] for name in quantities}
    matrices: dict[str, dict[str, Rows]] = {
        measure.name: {name: [] for name in quantities} for measure in MEASURES.values() if measure.of_pairs
    }
    differences: Rows = []
    for quantity in dict.fromkeys(itertools.chain(*quantities.values())):
        compared: dict[str, list[Compared]] = {}
        for name in (name for name in quantities if quantity in quantities[name]):
            cells = list(cells_of(run, datasets[name], name, quantity))
            runs = [model.run for model in run.models_of(name)]
            intervals = _bootstrap(cells, stretches, len(runs), seed=run.config.seed, resamples=resamples)
            labels = {"detector": name, "num_runs": len(runs)}
            measures[name] += [labels | row for row in _cell_rows(cells, stretches, intervals)]
            if quantity.measure in matrices:
                matrices[quantity.measure][name] += [{"detector": name} | row for row in _matrix_rows(runs, cells)]
            compared[name] = [compared_by(cell, len(runs), stretches) for cell in cells]
        differences += difference_rows(compared, quantity, stretches)
        on_step()
    by_measure = {measure: list(itertools.chain(*rows.values())) for measure, rows in matrices.items()}
    return list(itertools.chain(*measures.values())), by_measure, differences


def _summarise_predictions(run: Run, resamples: int, on_step: Callable[[], None]) -> tuple[Rows, Rows]:
    """Rows of summary/performance, and of summary/differences for AUROC; ``on_step`` is called after each detector."""
    performance: Rows = []
    aurocs: dict[str, dict[AurocKey, Estimate]] = {}
    for detector in run.config.detectors:
        predictions = predictions_of(run, detector.name)
        performance += performance_rows(run, detector.name, predictions, resamples)
        aurocs[detector.name] = auroc_estimates(run, predictions)
        on_step()
    return performance, list(auroc_difference_rows(aurocs, stretches_of(run.image_table)))


def _cell_rows(cells: Sequence[Cell], stretches: Sequence[Stretch], intervals: Intervals) -> Iterator[dict[str, Any]]:
    """One row for each cell and selection of images."""
    for (index, cell), selection in itertools.product(enumerate(cells), selections(stretches)):
        images = np.concatenate([np.arange(stretches[i].start, stretches[i].stop) for i in selection.stretches])
        labels = cell.quantity._asdict() | {"condition": cell.condition}
        labels |= {"label": selection.label, "source": selection.source}
        yield labels | _point(cell, images) | intervals(index, selection)


def _point(cell: Cell, images: np.ndarray) -> dict[str, Any]:
    """Point estimates of one cell over some images.

    ``mean`` and ``std`` are over ``n`` values: one for each image and unit, the mean over the conditions of the cell. So
    each image and unit has the same weight. All counts but ``n``, the shares, and the means of kept and flipped pairs are
    over single values, because an image may keep its class under one condition and lose it under another.
    """
    value, chance, present = cell.value[..., images], cell.chance[..., images], cell.present[..., images]
    valid = ~np.isnan(value)
    flat = drop_nan(mean_over_conditions(value))
    num_present = int(present.sum())
    num_dead = int((cell.dead[..., images] & present).sum())
    row: dict[str, Any] = {
        "n": len(flat),
        "num_values": int(valid.sum()),
        "num_images": int(valid.any((0, 1)).sum()),
        "mean": mean_of(flat),
        "std": float(flat.std(ddof=1)) if len(flat) > 1 else float("nan"),
        "num_invalid": int((present & ~valid).sum()),
        "num_dead": num_dead,
        "dead_share": num_dead / num_present if num_present else float("nan"),
        "chance": mean_of(drop_nan(mean_over_conditions(chance))),
    }
    row["corrected"] = corrected(row["mean"], row["chance"])
    return row if cell.kept is None else row | _kept_and_flipped(value, cell.kept[..., images], present)


def _kept_and_flipped(value: np.ndarray, kept: np.ndarray, present: np.ndarray) -> dict[str, Any]:
    """Values where the perturbation kept the class, and where it changed it."""
    kept_values, flipped_values = (drop_nan(value[kept == decision]) for decision in (1, 0))
    return {
        "kept_share": mean_of(kept[present & (kept >= 0)] == 1),
        "num_kept": len(kept_values),
        "mean_kept": mean_of(kept_values),
        "num_flipped": len(flipped_values),
        "mean_flipped": mean_of(flipped_values),
    }


def _bootstrap(
    cells: Sequence[Cell], stretches: Sequence[Stretch], num_runs: int, *, seed: int, resamples: int
) -> Intervals:
    """Sum every cell under every resample."""
    values = [[mean_over_conditions(array) for array in (cell.value, cell.chance)] for cell in cells]
    # cell, value or chance -> (sum or count, stretch, resample, unit)
    sums = [[np.zeros((2, len(stretches), resamples, len(array))) for array in arrays] for arrays in values]
    for rows, weights in image_weights(stretches, seed=seed, resamples=resamples):
        for (index, stretch), (arrays, totals) in itertools.product(
            enumerate(stretches), zip(values, sums, strict=True)
        ):
            drawn = weights[:, stretch.start : stretch.stop]
            for array, total in zip(arrays, totals, strict=True):
                part = array[:, stretch.start : stretch.stop]
                total[0, index, rows] = drawn @ np.nan_to_num(part).T
                total[1, index, rows] = drawn @ (~np.isnan(part)).T.astype(np.float64)

    def intervals(index: int, selection: Selection) -> dict[str, float]:
        weigh = pair_weights if MEASURES[cells[index].quantity.measure].of_pairs else run_weights
        units = weigh(num_runs, seed=seed, resamples=resamples)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = [np.divide(*(total[:, list(selection.stretches)].sum(1) * units).sum(2)) for total in sums[index]]
        plain, above = interval(means[0]), interval(corrected(*means))
        limits = {"ci_low": plain.low, "ci_high": plain.high}
        return limits | {"corrected_low": above.low, "corrected_high": above.high}

    return intervals


def _matrix_rows(runs: Sequence[str], cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
    """The R x R matrix of mean similarities of the runs: symmetric, without the diagonal, which is 1."""
    for cell in cells:
        for unit, pair in enumerate(itertools.combinations(runs, 2)):
            value = drop_nan(cell.value[unit])
            numbers = {"mean": mean_of(value), "n": len(value)}
            for run, other_run in (pair, pair[::-1]):
                yield cell.quantity._asdict() | {"run": run, "other_run": other_run} | numbers


def _quarantine_rows(run: Run) -> Rows:
    counts = run.quarantine().group_by(["stage", "kind"]).aggregate([("path", "count_distinct")])
    counts = counts.select(["stage", "kind", "path_count_distinct"]).rename_columns(["stage", "kind", "num_images"])
    return counts.sort_by([("stage", "ascending"), ("kind", "ascending")]).to_pylist()


def _write(folder: Path, name: str, rows: Rows, columns: Sequence[str], *, made_from: str) -> None:
    """Write <name>.parquet and .csv from the same rows; ``made_from`` is the key of the scores."""
    frame = pd.DataFrame(rows, columns=list(columns))
    schema = summary_schema(columns)
    for field in schema:
        if field.type == pa.int64():
            frame[field.name] = frame[field.name].astype("Int64")  # else a null turns the other counts into floats
    table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
    write_parquet(table.replace_schema_metadata({"scores": made_from}), folder / f"{name}.parquet")
    texts = [field.name for field in schema if field.type == pa.string()]
    frame[texts] = frame[texts].map(lambda cell: no_formula(cell) if isinstance(cell, str) else cell)
    with atomic_path(folder / f"{name}.csv") as temporary:
        frame.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
