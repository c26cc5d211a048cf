"""Compare the scores in reduced precision with those in float32."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from explain2me.config.schema import MeasuresConfig
from explain2me.run.folder import Run
from explain2me.run.parts import Part, read_part
from explain2me.run.plan import plan, precision_path
from explain2me.run.record import Model
from explain2me.run.schema import PRECISION_COLUMNS
from explain2me.stages.measure import Labels, MapReader, Scores, compare_maps, score_part, variants_of_pairs
from explain2me.statistics.cells import drop_nan, mean_of
from explain2me.statistics.performance import sample_aurocs
from explain2me.statistics.scores import MEASURES

SAMPLE_AUROC: Labels = {"measure": "performance", "variant": "softmax", "similarity": None}
"""Labels of the AUROC on the sample."""


BothPrecisions = tuple[str, Labels, np.ndarray, np.ndarray]
"""Detector, labels, and the values on the sample in float32 and in the precision of the run."""


def precision_rows(run: Run, measures: MeasuresConfig) -> Iterator[dict[str, Any]]:
    """Differences of each measure between the run's precision and float32, on the sample that stage 1 explains twice.

    A value that is defined in one precision alone (the map is dead in the other) has no difference; ``num_one_sided``
    counts these values.
    """
    files = {
        shard.model: path for shard in plan(run) if shard.part == 0 and (path := precision_path(run, shard)).exists()
    }
    values: dict[tuple[str | None, ...], list[tuple[np.ndarray, np.ndarray]]] = {}
    for detector, labels, *both in _both_precisions(run, measures, files) if files else ():
        quantity = (detector, labels["measure"], labels["variant"], labels["similarity"])
        values.setdefault(quantity, []).append((both[0], both[1]))
    for key, pairs in values.items():
        exact, coarse = (np.concatenate(side) for side in zip(*pairs, strict=True))
        difference = drop_nan(np.abs(exact - coarse))
        yield dict(zip(PRECISION_COLUMNS, key, strict=False)) | {
            "num_values": len(difference),
            "max_difference": float(difference.max()) if len(difference) else float("nan"),
            "mean_difference": mean_of(difference),
            "num_one_sided": int((np.isnan(exact) != np.isnan(coarse)).sum()),
        }


def _as_scored(run: Run, measures: MeasuresConfig) -> MeasuresConfig:
    """The measures of the score files, which `explain2me measure --set` may have changed."""
    columns = run.scores_dataset().to_table(["measure", "similarity"])
    columns = columns.unify_dictionaries()  # each file has its own dictionaries
    table = columns.group_by(["measure", "similarity"]).aggregate([])
    scored, similarities = (set(table[name].to_pylist()) for name in ("measure", "similarity"))
    update = {measure.name: measure.name in scored for measure in MEASURES.values() if not measure.perturbation}
    return measures.model_copy(update=update | {"similarity": tuple(sorted(similarities - {None}))})


def _both_precisions(run: Run, measures: MeasuresConfig, files: Mapping[Model, Path]) -> Iterator[BothPrecisions]:
    """Scores of single runs, their AUROC, and scores of pairs of runs."""
    reader, measures = MapReader(run), _as_scored(run, measures)
    parts: dict[Model, tuple[Part, Part]] = {}
    for model, path in files.items():
        exact = read_part(path, len(run.image_table))
        parts[model] = both = (exact, reader.take(model, exact.images))
        yield from _side_by_side(model, *(score_part(part, None, measures, model.input_size) for part in both))
        exact_aurocs, coarse_aurocs = (
            sample_aurocs(run, paths, exact.images) for paths in ([path], run.part_paths(model))
        )
        if not (np.isnan(exact_aurocs) & np.isnan(coarse_aurocs)).all():
            yield model.detector, SAMPLE_AUROC, exact_aurocs, coarse_aurocs
    pair_measures = [measure for measure in measures.chosen if measure.of_pairs]
    for measure, (first, other) in itertools.product(pair_measures, itertools.combinations(parts, 2)):
        if first.detector != other.detector:
            continue
        kinds = list(itertools.product(measures.similarity, variants_of_pairs(measure, run)))
        images = np.intersect1d(parts[first][0].images, parts[other][0].images)
        both_runs = [
            [_restrict(part, images) for part in pair] for pair in zip(parts[first], parts[other], strict=True)
        ]
        yield from _side_by_side(
            first, *(compare_maps(measure, a, b, None, kinds=kinds, input_size=first.input_size) for a, b in both_runs)
        )


def _side_by_side(
    model: Model, exact: Iterator[tuple[Labels, Scores]], coarse: Iterator[tuple[Labels, Scores]]
) -> Iterator[BothPrecisions]:
    for (labels, exact_scores), (_, coarse_scores) in zip(exact, coarse, strict=True):
        yield model.detector, labels, exact_scores.value, coarse_scores.value


def _restrict(part: Part, images: np.ndarray) -> Part:
    here = np.isin(part.images, images)
    return Part(part.images[here], part.conditions, *(array[:, here] for array in part[2:]))
