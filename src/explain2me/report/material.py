"""What a report is made from, read once: summary tables, scores by image, the most telling images and their maps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
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
from explain2me.run.conditions import Condition, conditions_for
from explain2me.run.folder import Run, Stretch, stretches_of
from explain2me.run.parts import Part, read_part
from explain2me.run.schema import ALL
from explain2me.statistics.performance import Predictions, predictions_of
from explain2me.text import printable_line

MEASURES = ("entropy", "noise", "resilience", "focus", "stability")


PAPERS_NOISE = "salt_pepper@0.05"
BLURS = ("focus_salient", "focus_nonsalient")


class Score(NamedTuple):
    """A column of scores by image: ``name`` in words, and how it is found in the tables."""

    key: str
    name: str
    measure: str
    variant: str
    condition: str | None
    higher_is_better: bool


AUROC = Score("auroc", "AUROC", "auroc", "softmax", "clean", True)


class Telling(NamedTuple):
    """An image worth looking at, and why: ``lowest``, ``highest`` or ``most different`` in a score."""

    image: int
    score: str
    why: str
    value: float


@dataclass
class Material:
    """Everything that figures, tables and the page are drawn from.

    Attributes:
        run: opened.
        measures, differences, performance, matrix: the summary tables as frames; names as they are, not made printable.
        scores: one row an image and detector: mean over runs of each score in ``columns``, and what was predicted.
        columns: the scores of ``scores``.
        clean: mean clean map (h, w) by (detector, label, source), each map scaled to the sum 1.
        logits: (detector, condition) -> (R, N, K), for the ROC curves; clean and both blurs.
        telling: the images to show, and why.
        maps: (detector, run, image) -> Part of that one image, for images that are shown.
        dead: by detector, for each image the number of runs whose clean map is dead; ``num_clean``: clean maps in all;
            ``dead_of_runs``: dead ones of each run.
        one_class: by detector, the runs that predict one class for images of several labels, and which.
        map_sizes: by detector, (h, w) of its maps; none where all of its images are in the quarantine.
    """

    run: Run
    measures: pd.DataFrame
    differences: pd.DataFrame
    performance: pd.DataFrame
    matrix: pd.DataFrame
    quarantine: pd.DataFrame
    precision: pd.DataFrame
    scores: pd.DataFrame
    columns: list[Score]
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
    def detectors(self) -> list[str]:
        """Names, in the order of the config."""
        return [detector.name for detector in self.run.config.detectors]

    @property
    def stretches(self) -> list[Stretch]:
        """Sources, in the order of the images."""
        return stretches_of(self.run.image_table)

    @property
    def labelled(self) -> bool:
        """Whether images have labels."""
        return self.run.image_table["label"].null_count < len(self.run.image_table)

    @property
    def positive_class(self) -> int:
        """Position of the positive class; the last one where none has its name."""
        classes, positive = self.run.classes, self.run.config.data.positive
        return classes.index(positive) if positive in classes else len(classes) - 1

    def trained(self, detector: str) -> list[dict[str, Any]]:
        """How each run of a detector was trained, where run.json tells."""
        told = self.run.record.get("trained", {})
        hashes = [model.weights_sha256 for model in self.run.models_of(detector)]
        return [told[sha256] for sha256 in hashes if sha256 in told]

    def source_names(self) -> list[str]:
        """A name for each stretch: its source, with its label in front where two labels share one."""
        sources = [stretch.source for stretch in self.stretches]
        return [
            f"{stretch.label} {stretch.source}" if sources.count(stretch.source) > 1 else stretch.source
            for stretch in self.stretches
        ]

    def conditions(self) -> tuple[Condition, ...]:
        """Of the run."""
        return conditions_for(self.run.config.measures, self.run.models[0].input_size)

    def totals(self, measure: str, variant: str, condition: str | None = None) -> dict[str, dict[str, Any]]:
        """The row over all images of each detector; SSIM where there are several similarities."""
        rows = self.measures
        rows = rows[(rows.measure == measure) & (rows.variant == variant)]
        rows = rows[(rows.label == ALL) & (rows.source == ALL) & self.main_similarity(rows)]
        if condition is not None:
            rows = rows[rows.condition == condition]
        return {row["detector"]: row for row in records(rows)}

    def pairs(self, score: Score, variant: str) -> dict[tuple[str, str], dict[str, Any]]:
        """The difference over all images of each pair of detectors in a score; SSIM where there are several similarities."""
        rows = self.differences
        rows = rows[(rows.measure == score.measure) & (rows.variant == variant)]
        rows = rows[(rows.label == ALL) & (rows.source == ALL) & self.main_similarity(rows)]
        rows = rows[rows.condition == (score.condition or ALL)]
        return {(row["detector"], row["other_detector"]): row for row in records(rows)}

    def main_similarity(self, rows: pd.DataFrame) -> "pd.Series[bool]":
        """Rows of the similarity that stands in the text: SSIM, or else the first that was taken."""
        return rows.similarity.isna() | (rows.similarity == main_similarity(rows.similarity))

    def image_name(self, image: int) -> str:
        """image_id, fit to be shown."""
        return printable_line(self.run.image_table["image_id"][image].as_py())

    def pixels(self, image: int, size: tuple[int, int]) -> UInt8[np.ndarray, "3 H W"] | None:
        """An image at a size; None where its file is not there any more or has changed."""
        row = self.run.image_table.slice(image, 1).to_pylist()[0]
        data = self.run.config.data
        file = resolve(image_root(Path(data.manifest)), row["path"])
        interpolation = self.run.models[0].interpolation
        try:
            return load_array(file, size, interpolation, max_pixels=data.max_pixels, expected_sha256=row["sha256"])
        except ImageError:
            return None

    def part(self, detector: str, image: int, run: int = 0) -> Part | None:
        """The maps of one image that is shown, by one run of a detector."""
        return self.maps.get((detector, self.run.models_of(detector)[run].run, image))


def main_similarity(names: Any) -> str:
    """The similarity that stands in the text: SSIM, or else the first of the alphabet that was taken."""
    known = sorted(set(names.dropna()))
    return "ssim" if "ssim" in known or not known else known[0]


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of a table."""
    found: Any = frame.to_dict("records")
    return found


def gather(run: Run, *, images_per_measure: int) -> Material:
    """Read a run for its report.

    Raises:
        RunFolderError: there is no summary yet, or a file is damaged.
    """
    frames = {
        name: run.summary(name).to_pandas()
        for name in ("measures", "differences", "performance", "stability_matrix", "quarantine", "precision")
    }
    columns = _columns(run, frames["measures"])
    scores = _scores_by_image(run, columns, main_similarity(frames["measures"].similarity))
    material = Material(
        run,
        frames["measures"],
        frames["differences"],
        frames["performance"],
        frames["stability_matrix"],
        frames["quarantine"],
        frames["precision"],
        scores,
        columns,
    )
    material.telling = _telling(material, images_per_measure)
    _read_maps(material)
    return material


def _main_noise(run: Run) -> str:
    """Salt and pepper at 0.05, which the paper's tables take (MEASURES 3.2), or else the smallest level above 0."""
    noises = [c for c in conditions_for(run.config.measures, run.models[0].input_size) if c.measure == "noise"]
    above = [c for c in noises if c.level] or noises
    known = [c.name for c in above if c.name == PAPERS_NOISE]
    return known[0] if known else min(above, key=lambda c: c.level or 0.0).name


def _columns(run: Run, measures: pd.DataFrame) -> list[Score]:
    """Scores that this run has, one a measure as the paper takes it."""
    found: list[Score] = []
    have = set(zip(measures.measure, measures.variant, strict=True))
    if ("entropy", "spatial") in have:
        found.append(Score("entropy", "entropy", "entropy", "spatial", "clean", False))
    if ("noise", "predicted") in have:
        condition = _main_noise(run)
        found.append(Score("noise", f"noise ({condition})", "noise", "predicted", condition, True))
    if ("resilience", "predicted") in have:
        found.append(Score("resilience", "resilience", "resilience", "predicted", None, True))
    if ("focus", "predicted") in have:
        found.append(Score("focus_salient", "focus, salient blurred", "focus", "predicted", "focus_salient", False))
        found.append(Score("focus_nonsalient", "focus, rest blurred", "focus", "predicted", "focus_nonsalient", True))
    if ("stability", "predicted") in have:
        found.append(Score("stability", "stability", "stability", "predicted", "clean", True))
    return found


def _scores_by_image(run: Run, columns: Sequence[Score], similarity: str) -> pd.DataFrame:
    """Mean over runs (pairs of runs, transforms) of each score, one row an image and detector."""
    kept = (ds.field("variant") == "predicted") & (ds.field("measure") != "stability")
    frames = []
    for detector in run.config.detectors:
        found: dict[str, Any] = {"detector": detector.name, "image": range(len(run.image_table))}
        for column in columns:
            wanted = (ds.field("measure") == column.measure) & (ds.field("variant") == column.variant)
            if column.condition is not None:
                wanted &= ds.field("condition") == column.condition
            found[column.key] = _mean_by_image(run, detector.name, similarity, wanted, "value")
        found["kept"] = _mean_by_image(run, detector.name, similarity, kept, "kept")
        frames.append(pd.DataFrame(found))
    return pd.concat(frames, ignore_index=True)


def _mean_by_image(
    run: Run, detector: str, similarity: str, wanted: ds.Expression, column: str
) -> Float[np.ndarray, " N"]:
    """Over the rows that have a value; NaN for an image without any. Reads a batch of rows at a time."""
    sums, counts = np.zeros(len(run.image_table)), np.zeros(len(run.image_table))
    same = ds.field("similarity").is_null() | (ds.field("similarity") == similarity)
    rows = (ds.field("detector") == detector) & same & wanted
    for batch in run.scores_dataset().to_batches(["image", column], filter=rows):
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
    found: list[Telling] = []
    for column in material.columns:
        wide = material.scores.pivot(index="image", columns="detector", values=column.key)[material.detectors]
        mean = wide.mean(axis=1).dropna()
        for why, images in (("lowest", mean.nsmallest(count)), ("highest", mean.nlargest(count))):
            found += [Telling(image, column.key, why, value) for image, value in _items(images)]
        if wide.shape[1] > 1:
            spread = (wide.max(axis=1) - wide.min(axis=1)).dropna().nlargest(count)
            found += [Telling(image, column.key, "most different", value) for image, value in _items(spread)]
    if not found:  # no measure at all: the first image of each source
        found = [Telling(s.start, "", "first of its source", float("nan")) for s in material.stretches][: 3 * count]
    return found


def _items(series: Any) -> list[tuple[int, float]]:
    return [(int(image), float(value)) for image, value in series.items()]


def _read_maps(material: Material) -> None:
    """One pass over all part files: mean maps, logits, and the maps of the images that are shown."""
    run = material.run
    shown = np.unique([telling.image for telling in material.telling])
    for detector in material.detectors:
        models = run.models_of(detector)
        found = predictions_of(run, detector)
        for name in ("clean", *BLURS):
            if name in found.conditions:
                material.logits[detector, name] = found.logits[:, found.conditions.index(name)].copy()  # no view of all
        material.dead_of_runs[detector] = dict.fromkeys((model.run for model in models), 0)
        material.one_class[detector] = _of_one_class(run, detector, found)
        sums: dict[int, np.ndarray] = {}
        counts = np.zeros(len(material.stretches))
        material.dead[detector], material.num_clean[detector] = np.zeros(len(run.image_table), int), 0
        for model, path in [(one, path) for one in models for path in run.part_paths(one)]:
            part = read_part(path)
            if len(part.images):
                material.map_sizes[detector] = part.maps.shape[2], part.maps.shape[3]
            _add_clean(part, material.stretches, sums, counts)
            dead = is_dead(torch.from_numpy(part.maps[part.of("clean")])).numpy()
            material.dead[detector][part.images] += dead
            material.num_clean[detector] += len(dead)
            material.dead_of_runs[detector][model.run] += int(dead.sum())
            for i in np.flatnonzero(np.isin(part.images, shown)):
                material.maps[detector, model.run, int(part.images[i])] = part.take(int(i))
        for index, stretch in enumerate(material.stretches):
            if counts[index]:
                material.clean[detector, stretch.label, stretch.source] = sums[index] / counts[index]
    _add_predictions(material)


def _of_one_class(run: Run, detector: str, predictions: Predictions) -> dict[str, str]:
    """Runs that predict one class for all clean images, where these have several labels, and which class."""
    if "clean" not in predictions.conditions:
        return {}
    labels = np.array(run.image_table["label"].fill_null("").to_pylist())
    found: dict[str, str] = {}
    clean = predictions.predicted[:, predictions.conditions.index("clean")]
    for model, predicted in zip(run.models_of(detector), clean, strict=True):
        known = predicted >= 0
        if len(set(labels[known]) - {""}) > 1 and len(set(predicted[known])) == 1:
            found[model.run] = run.classes[predicted[known][0]]
    return found


def _add_clean(part: Part, stretches: Sequence[Stretch], sums: dict[int, np.ndarray], counts: np.ndarray) -> None:
    clean = part.maps[part.of("clean")].astype(np.float64)
    total = clean.sum((1, 2), keepdims=True)
    live = np.isfinite(total[:, 0, 0]) & (total[:, 0, 0] > 1e-12)
    for index, stretch in enumerate(stretches):
        inside = live & (part.images >= stretch.start) & (part.images < stretch.stop)
        if inside.any():
            added = (clean[inside] / total[inside]).sum(0)
            sums[index] = sums[index] + added if index in sums else added
            counts[index] += inside.sum()


def _add_predictions(material: Material) -> None:
    """Mean over runs of the positive class's probability, and the class whose probability is the highest in that mean."""
    frame, positive = material.scores, material.positive_class
    probability, predicted = [], []
    nothing = np.full((1, len(material.run.image_table), len(material.run.classes)), np.nan)
    for detector in material.detectors:
        logits = material.logits.get((detector, "clean"), nothing)  # all of its images may be in the quarantine
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
