"""Compare the scores in reduced precision with those in float32."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from explain2me.config.schema import Config
from explain2me.run.folder import Run
from explain2me.run.parts import Part, read_part
from explain2me.run.plan import plan
from explain2me.run.record import Model
from explain2me.stages.measure import Labels, MapReader, Scores, score_pair, score_part
from explain2me.statistics.cells import drop_nan, mean_of
from explain2me.statistics.performance import sample_aurocs
from explain2me.statistics.scores import MEASURES, Measure

SAMPLE_AUROC: Labels = {"measure": "performance", "variant": "softmax", "similarity": None}
"""Labels of the AUROC on the sample."""
PRECISION_COLUMNS = (
    "detector", "measure", "variant", "similarity", "num_values", "max_difference", "mean_difference", "num_one_sided",
)  # fmt: skip


BothPrecisions = tuple[str, Labels, np.ndarray, np.ndarray]
"""Detector, labels, and the values on the sample in float32 and in the precision of the run."""


def precision_rows(run: Run, config: Config) -> Iterator[dict[str, Any]]:
    """Differences of each measure between the run's precision and float32, on the sample that stage 1 explains twice.

    A value that is defined in one precision alone (the map is dead in the other) has no difference; ``num_one_sided``
    counts these values.
    """
    shards = plan(run)
    files = {shard.model: run.folder / "precision" / f"model={shard.model.name}" / shard.file_name for shard in shards
             if shard.part == 0}  # fmt: skip
    files = {model: path for model, path in files.items() if path.exists()}
    values: dict[tuple[Any, ...], list[tuple[np.ndarray, np.ndarray]]] = {}
    if files:
        for detector, labels, *both in _both_precisions(run, _as_scored(run, config), MapReader(run, shards), files):
            key = (detector, labels["measure"], labels["variant"], labels["similarity"])
            values.setdefault(key, []).append((both[0], both[1]))
    for key, pairs in values.items():
        exact, coarse = (np.concatenate(side) for side in zip(*pairs, strict=True))
        difference = drop_nan(np.abs(exact - coarse))
        yield dict(zip(PRECISION_COLUMNS, key, strict=False)) | {
            "num_values": len(difference),
            "max_difference": float(difference.max()) if len(difference) else float("nan"),
            "mean_difference": mean_of(difference),
            "num_one_sided": int((np.isnan(exact) != np.isnan(coarse)).sum()),
        }


def _as_scored(run: Run, config: Config) -> Config:
    """The config with the measures of the score files, which `explain2me measure --set` may have changed."""
    columns = run.scores_dataset().to_table(["measure", "similarity"])
    columns = columns.unify_dictionaries()  # each file has its own dictionaries
    table = columns.group_by(["measure", "similarity"]).aggregate([])
    measures, similarities = (set(table[name].to_pylist()) for name in ("measure", "similarity"))
    update = {measure.name: measure.name in measures for measure in MEASURES.values() if not measure.perturbation}
    measured = config.measures.model_copy(update=update | {"similarity": tuple(sorted(similarities - {None}))})
    return config.model_copy(update={"measures": measured})


def _both_precisions(run: Run, config: Config, reader: MapReader, files: dict[Model, Path]) -> Iterator[BothPrecisions]:
    """Scores of single runs, their AUROC, and scores of pairs of runs."""
    parts: dict[Model, tuple[Part, Part]] = {}
    for model, path in files.items():
        exact = read_part(path)
        parts[model] = both = (exact, reader.take(model, exact.images))
        exact_scores, coarse_scores = (score_part(part, None, config, model.input_size) for part in both)
        yield from _side_by_side(model, exact_scores, coarse_scores)
        exact_aurocs, coarse_aurocs = (
            sample_aurocs(run, paths, exact.images, config) for paths in ([path], run.part_paths(model))
        )
        if not (np.isnan(exact_aurocs) & np.isnan(coarse_aurocs)).all():
            yield model.detector, SAMPLE_AUROC, exact_aurocs, coarse_aurocs
    pair_measures = [measure for measure in config.measures.chosen if measure.of_pairs]
    for measure, (a, b) in itertools.product(pair_measures, itertools.combinations(parts, 2)):
        if a.detector == b.detector:
            yield from _both_of_pair(run, config, measure, a, parts[a], parts[b])


def _both_of_pair(
    run: Run, config: Config, measure: Measure, model: Model, part: tuple[Part, Part], other: tuple[Part, Part]
) -> Iterator[BothPrecisions]:
    """Scores of one pair of runs; ``part`` and ``other`` are (float32, precision of the run)."""
    labelled = run.image_table["label"].null_count < len(run.image_table)
    images = np.intersect1d(part[0].images, other[0].images)
    scores = []
    for pair in zip(part, other, strict=True):
        a, b = (_restrict(each, images) for each in pair)
        # b also stands in for its partner, because the chance level is not used here
        scores.append(score_pair(measure, a, b, b, config, model.input_size, labelled=labelled))
    yield from _side_by_side(model, *scores)


def _side_by_side(
    model: Model, exact: Iterator[tuple[Labels, Scores]], coarse: Iterator[tuple[Labels, Scores]]
) -> Iterator[BothPrecisions]:
    for (labels, exact_scores), (_, coarse_scores) in zip(exact, coarse, strict=True):
        yield model.detector, labels, exact_scores.value, coarse_scores.value


def _restrict(part: Part, images: np.ndarray) -> Part:
    here = np.isin(part.images, images)
    return Part(part.images[here], part.conditions, *(array[:, here] for array in part[2:]))
