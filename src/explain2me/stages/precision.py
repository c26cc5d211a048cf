"""How far the scores in reduced precision are from those in float32."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from explain2me.config.schema import Config
from explain2me.run.conditions import conditions_for
from explain2me.run.folder import Run
from explain2me.run.parts import Part, read_part
from explain2me.run.plan import plan
from explain2me.run.record import Model
from explain2me.stages.measure import MapReader, What, score_pair, score_part
from explain2me.statistics.cells import drop_nan, mean_of
from explain2me.statistics.performance import sample_aurocs

SAMPLE_AUROC: What = {"measure": "performance", "variant": "softmax", "similarity": None}

PRECISION_COLUMNS = (
    "detector", "measure", "variant", "similarity", "num_values", "max_difference", "mean_difference", "num_one_sided",
)  # fmt: skip


def precision_rows(run: Run, config: Config) -> Iterator[dict[str, Any]]:
    """Deviation of every measure from the same in float32, on the sample of images that stage 1 explained twice.

    A value that one precision alone has (a map that is dead in the other) has no difference: ``num_one_sided`` counts them.
    """
    shards = plan(run)
    files = {shard.model: run.folder / "precision" / f"model={shard.model.name}" / shard.file_name for shard in shards
             if shard.part == 0}  # fmt: skip
    files = {model: path for model, path in files.items() if path.exists()}
    found: dict[tuple[Any, ...], list[tuple[np.ndarray, np.ndarray]]] = {}
    if files:
        for detector, what, *values in _both_precisions(run, _as_scored(run, config), MapReader(run, shards), files):
            key = (detector, what["measure"], what["variant"], what["similarity"])
            found.setdefault(key, []).append((values[0], values[1]))
    for key, pairs in found.items():
        exact, coarse = (np.concatenate(side) for side in zip(*pairs, strict=True))
        difference = drop_nan(np.abs(exact - coarse))
        yield dict(zip(PRECISION_COLUMNS, key, strict=False)) | {
            "num_values": len(difference),
            "max_difference": float(difference.max()) if len(difference) else float("nan"),
            "mean_difference": mean_of(difference),
            "num_one_sided": int((np.isnan(exact) != np.isnan(coarse)).sum()),
        }


def _as_scored(run: Run, config: Config) -> Config:
    """The config with the measures that the scores hold: `explain2me measure --set` may have changed them."""
    found = run.scores_dataset().to_table(["measure", "similarity"])
    found = found.unify_dictionaries()  # each file has dictionaries of its own
    table = found.group_by(["measure", "similarity"]).aggregate([])
    measures, similarities = (set(table[name].to_pylist()) for name in ("measure", "similarity"))
    update = {name: name in measures for name in ("entropy", "stability")}
    measured = config.measures.model_copy(update=update | {"similarity": tuple(sorted(similarities - {None}))})
    return config.model_copy(update={"measures": measured})


def _both_precisions(
    run: Run, config: Config, reader: MapReader, files: dict[Model, Path]
) -> Iterator[tuple[str, What, np.ndarray, np.ndarray]]:
    """Detector, what the values are, and the values of the sample in float32 and in the precision of the run."""
    parts: dict[Model, tuple[Part, Part]] = {}
    for model, path in files.items():
        exact = read_part(path)
        parts[model] = both = (exact, reader.take(model, exact.images))
        conditions = conditions_for(run.config.measures, model.input_size)
        scored = (score_part(part, None, conditions, config, model.input_size) for part in both)
        for (what, a), (_, b) in zip(*scored, strict=True):
            yield model.detector, what, a.value, b.value
        of_exact, of_coarse = (
            sample_aurocs(run, paths, exact.images, config) for paths in ([path], run.part_paths(model))
        )
        if not (np.isnan(of_exact) & np.isnan(of_coarse)).all():
            yield model.detector, SAMPLE_AUROC, of_exact, of_coarse
    for a, b in itertools.combinations(parts, 2):
        if config.measures.stability and a.detector == b.detector:
            yield from _both_stabilities(run, config, a, parts[a], parts[b])


def _both_stabilities(
    run: Run, config: Config, model: Model, ours: tuple[Part, Part], theirs: tuple[Part, Part]
) -> Iterator[tuple[str, What, np.ndarray, np.ndarray]]:
    """The same for the agreement of two runs; ``ours`` and ``theirs`` are (float32, precision of the run)."""
    labelled = run.image_table["label"].null_count < len(run.image_table)
    images = np.intersect1d(ours[0].images, theirs[0].images)
    scored = []
    for pair in zip(ours, theirs, strict=True):
        a, b = (_restrict(part, images) for part in pair)
        scored.append(score_pair(a, b, b, config, model.input_size, labelled=labelled))  # its chance is not used
    for (what, exact), (_, coarse) in zip(*scored, strict=True):
        yield model.detector, what, exact.value, coarse.value


def _restrict(part: Part, images: np.ndarray) -> Part:
    here = np.isin(part.images, images)
    return Part(part.images[here], part.conditions, *(array[:, here] for array in part[2:]))
