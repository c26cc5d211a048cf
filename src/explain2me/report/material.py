"""What figures, findings and the page are made from, read once: tables, scores by image, the most telling images and their maps."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import torch
from jaxtyping import Float, UInt8
from scipy.special import softmax

from explain2me.errors import ImageError
from explain2me.images.decode import load_array
from explain2me.images.listing import image_root, resolve
from explain2me.measures import is_dead
from explain2me.report.summary import RunScore, Tables, main_similarity
from explain2me.run.checks.tables import unreadable
from explain2me.run.conditions import Condition, conditions_for
from explain2me.run.folder import Run, Stretch
from explain2me.run.parts import Part, read_part
from explain2me.statistics.performance import Predictions, predictions_of
from explain2me.statistics.scores import CLEAN, MEASURES, VARIANTS
from explain2me.text import printable_line

MOST_DETECTORS, MOST_SOURCES = 20, 20
"""In figures and in the viewer of the page; more would take minutes to draw, and nobody could distinguish them."""


class Telling(NamedTuple):
    """An image worth looking at, and why: ``lowest``, ``highest`` or ``most different`` in a score."""

    image: int
    score: str
    why: str
    value: float


@dataclass
class Material:
    """Everything that figures, findings and the page are made from.

    Attributes:
        scores: one row an image and detector: mean over runs of each score in ``tables.columns``, and the prediction.
        clean: mean clean map (h, w) by (detector, label, source), each map scaled to the sum 1.
        logits: (detector, condition) -> (R, N, K), for the ROC curves: the conditions with an AUROC.
        telling: the images to show, and why.
        maps: (detector, run, image) -> Part of that one image, for images that are shown.
        dead: by detector, for each image the number of runs whose clean map is dead.
        num_clean: by detector, the number of clean maps.
        dead_of_runs: by detector, the number of dead clean maps of each run.
        one_class: by detector, the runs that predict one class for images of several labels, and that class.
        map_sizes: by detector, (h, w) of its maps; none where all of its images are in the quarantine.
    """

    run: Run
    tables: Tables
    scores: pd.DataFrame
    clean: dict[tuple[str, str | None, str], np.ndarray] = field(default_factory=dict)
    logits: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    telling: list[Telling] = field(default_factory=list)
    maps: dict[tuple[str, str, int], Part] = field(default_factory=dict)
    dead: dict[str, np.ndarray] = field(default_factory=dict)
    num_clean: dict[str, int] = field(default_factory=dict)
    dead_of_runs: dict[str, dict[str, int]] = field(default_factory=dict)
    one_class: dict[str, dict[str, str]] = field(default_factory=dict)
    map_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def positive_class(self) -> int:
        """Position of the positive class; the last one where none has its name."""
        classes, positive = self.run.classes, self.run.config.data.positive
        return classes.index(positive) if positive in classes else len(classes) - 1

    def conditions(self) -> tuple[Condition, ...]:
        """Of the run."""
        return conditions_for(self.run.config.measures, self.run.models[0].input_size)

    def image_name(self, image: int) -> str:
        """image_id, fit to be shown."""
        return printable_line(self.run.image_table["image_id"][image].as_py())

    def pixels(self, image: int) -> UInt8[np.ndarray, "3 H W"] | None:
        """An image as the first model is shown it; None where its file is not there any more or has changed."""
        row = self.run.image_table.slice(image, 1).to_pylist()[0]
        data, model = self.run.config.data, self.run.models[0]
        file = resolve(image_root(Path(data.manifest)), row["path"])
        try:
            return load_array(
                file,
                model.input_size,
                model.interpolation,
                max_pixels=data.max_pixels,
                expected_sha256=row["sha256"],
            )
        except ImageError:
            return None

    def part(self, detector: str, image: int, run: int = 0) -> Part | None:
        """The maps of one image that is shown, by one run of a detector."""
        return self.maps.get((detector, self.run.models_of(detector)[run].run, image))


def drawn(material: Material) -> Material:
    """What figures and the viewer show: the first detectors and sources; the same object where there are no more."""
    tables = material.tables.first(MOST_DETECTORS, MOST_SOURCES)
    if tables is material.tables:
        return material
    shown = material.scores[material.scores.detector.isin(tables.detectors)]
    return replace(material, tables=tables, scores=shown)


def gather(run: Run, *, images_per_measure: int) -> Material:
    """Read a run for its report.

    Raises:
        RunFolderError: there is no summary yet, or a file is damaged.
    """
    tables = Tables(run)
    scores = _scores_by_image(run, tables.columns, main_similarity(tables.measures.similarity))
    material = Material(run, tables, scores)
    material.telling = _telling(material, images_per_measure)
    _read_maps(material)
    return material


def _scores_by_image(run: Run, columns: Sequence[RunScore], similarity: str) -> pd.DataFrame:
    """Mean over runs (pairs of runs, conditions) of each score, one row an image and detector."""
    of_pairs = [measure.name for measure in MEASURES.values() if measure.of_pairs]
    of_decisions = (ds.field("variant") == VARIANTS[0]) & ~ds.field("measure").isin(of_pairs)
    frames = []
    for detector, dataset in run.scores_by_detector().items():
        own = ds.field("detector") == detector
        values: dict[str, Any] = {"detector": detector, "image": range(len(run.image_table))}
        for column in columns:
            rows = (ds.field("measure") == column.measure) & (ds.field("variant") == column.variant)
            if column.condition is not None:
                rows &= ds.field("condition") == column.condition
            values[column.key] = _mean_by_image(run, dataset, similarity, own & rows, "value")
        values["kept"] = _mean_by_image(run, dataset, similarity, own & of_decisions, "kept")
        frames.append(pd.DataFrame(values))
    return pd.concat(frames, ignore_index=True)


def _mean_by_image(
    run: Run, dataset: ds.Dataset, similarity: str, selection: ds.Expression, column: str
) -> Float[np.ndarray, " N"]:
    """Over the rows that have a value; NaN for an image without any. Reads a batch of rows at a time."""
    sums, counts = np.zeros(len(run.image_table)), np.zeros(len(run.image_table))
    same = ds.field("similarity").is_null() | (ds.field("similarity") == similarity)
    for batch in dataset.to_batches(["image", column], filter=same & selection):
        known = batch.filter(batch[column].is_valid())
        values = known[column].cast(pa.int8()) if pa.types.is_boolean(known[column].type) else known[column]
        values = values.to_numpy(zero_copy_only=False).astype(np.float64)
        defined = ~np.isnan(values)
        images = known["image"].to_numpy()[defined]
        np.add.at(sums, images, values[defined])
        np.add.at(counts, images, 1)
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def _telling(material: Material, count: int) -> list[Telling]:
    """For each score the images where it is lowest and highest, and where detectors differ most."""
    tables = material.tables
    telling: list[Telling] = []
    for column in tables.columns:
        wide = material.scores.pivot(index="image", columns="detector", values=column.key)[tables.detectors]
        mean = wide.mean(axis=1).dropna()
        chosen: list[tuple[str, Any]] = [("lowest", mean.nsmallest(count)), ("highest", mean.nlargest(count))]
        if len(tables.detectors) > 1:
            spread = (wide.max(axis=1) - wide.min(axis=1)).dropna()
            chosen.append(("most different", spread.nlargest(count)))
        for why, values in chosen:
            telling += [Telling(int(image), column.key, why, float(value)) for image, value in values.items()]
    if not telling:  # no measure at all: the first image of each source
        telling = [Telling(s.start, "", "first of its source", float("nan")) for s in tables.stretches][: 3 * count]
    return telling


def _read_maps(material: Material) -> None:
    """One pass over all part files: mean maps, logits, and the maps of the images that are shown."""
    run, labels = material.run, material.run.image_table["label"].to_pylist()
    conditions = list(material.tables.auroc_conditions()) or [CLEAN]
    for detector in material.tables.detectors:
        predictions = predictions_of(run, detector)
        for name in conditions:
            if name in predictions.conditions:  # a copy: a view would keep the logits of all conditions
                material.logits[detector, name] = predictions.logits[:, predictions.conditions.index(name)].copy()
        names = [model.run for model in run.models_of(detector)]
        material.one_class[detector] = runs_of_one_class(names, labels, run.classes, predictions)
        _read_parts(material, detector)
    _add_predictions(material)


def _read_parts(material: Material, detector: str) -> None:
    """Mean clean maps, dead maps and the maps that are shown of one detector."""
    is_drawn = detector in material.tables.detectors[:MOST_DETECTORS]
    shown = np.unique([telling.image for telling in material.telling if is_drawn])
    stretches, models = material.tables.stretches, material.run.models_of(detector)
    sums: list[Any] = [0.0] * len(stretches)
    counts = np.zeros(len(stretches), int)
    dead = material.dead[detector] = np.zeros(len(material.run.image_table), int)
    dead_of_runs = material.dead_of_runs[detector] = dict.fromkeys((model.run for model in models), 0)
    material.num_clean[detector] = 0
    for name, path in [(model.run, path) for model in models for path in material.run.part_paths(model)]:
        part = read_part(path, len(material.run.image_table))
        if not len(part.images):  # all of its images are in the quarantine
            continue
        size = part.maps.shape[2], part.maps.shape[3]
        if size != material.map_sizes.setdefault(detector, size):
            raise unreadable(path, f"its maps differ in size from others of {detector!r}")
        clean = part.maps[part.of(CLEAN)]
        is_dead_map = is_dead(torch.from_numpy(clean)).numpy()
        dead[part.images] += is_dead_map
        dead_of_runs[name] += int(is_dead_map.sum())
        material.num_clean[detector] += len(clean)
        for i, shares in enumerate(_shares(part.images, clean, stretches)):
            sums[i] = sums[i] + shares.sum(0)
            counts[i] += len(shares)
        for position in np.flatnonzero(np.isin(part.images, shown)):
            material.maps[detector, name, int(part.images[position])] = part.take(int(position))
    for stretch, total, count in zip(stretches, sums, counts, strict=True):
        if count:
            material.clean[detector, stretch.label, stretch.source] = total / count


def _shares(
    images: np.ndarray, maps: Float[np.ndarray, "N h w"], stretches: Sequence[Stretch]
) -> Iterator[Float[np.ndarray, "M h w"]]:
    """The live maps of each stretch, each scaled to the sum 1."""
    maps = maps.astype(np.float64)
    total = maps.sum((1, 2), keepdims=True)
    live = np.isfinite(total[:, 0, 0]) & (total[:, 0, 0] > 1e-12)
    for stretch in stretches:
        inside = live & (images >= stretch.start) & (images < stretch.stop)
        yield maps[inside] / total[inside]


def runs_of_one_class(
    runs: Iterable[str], labels: Sequence[str | None], classes: Sequence[str], predictions: Predictions
) -> dict[str, str]:
    """Runs of a detector that predict one class for all clean images, where these have several labels, and that class.

    ``runs`` are in the order of the predictions, ``labels`` in that of the images, ``classes`` in that of the logits.
    """
    if CLEAN not in predictions.conditions:
        return {}
    names = np.array([label or "" for label in labels])
    of_one_class: dict[str, str] = {}
    for run, predicted in zip(runs, predictions.predicted[:, predictions.conditions.index(CLEAN)], strict=True):
        known = predicted >= 0
        if len(set(names[known]) - {""}) > 1 and len(set(predicted[known])) == 1:
            of_one_class[run] = classes[predicted[known][0]]
    return of_one_class


def _add_predictions(material: Material) -> None:
    """Mean over runs of the positive class's probability, and the class whose probability is the highest in that mean."""
    frame, positive = material.scores, material.positive_class
    probability, predicted = [], []
    nothing = np.full((1, len(material.run.image_table), len(material.run.classes)), np.nan)
    for detector in material.tables.detectors:
        logits = material.logits.get((detector, CLEAN), nothing)  # all of its images may be in the quarantine
        if logits.shape[-1] == 1:
            logits = np.concatenate([np.zeros_like(logits), logits], axis=-1)
        shares = softmax(logits, axis=-1)
        known = np.all(np.isfinite(shares), axis=-1)
        weights = known.sum(0)
        mean = np.where(known[..., None], shares, 0).sum(0) / np.maximum(weights, 1)[:, None]
        probability.append(np.where(weights > 0, mean[:, positive], np.nan))
        predicted.append(np.where(weights > 0, mean.argmax(1), -1))
    frame["probability"] = np.concatenate(probability)
    frame["predicted"] = np.concatenate(predicted)
