"""AUROC and accuracy of every run under every condition, from the logits in the part files of maps.

An image counts only where its logits are finite, both clean and under the condition; otherwise it is counted as invalid.
A dead or flat clean map drives no blur, so its image is invalid under the blurred conditions. Each row therefore also has
``auroc_clean``, the AUROC of the clean images over the same images: compare ``auroc`` with it, and not with the row of
the clean condition, which has more images.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import logsumexp
from sklearn.metrics import roc_auc_score

from explain2me.run.checks.tables import unreadable
from explain2me.run.conditions import conditions_of
from explain2me.run.folder import Run, Stretch, refuse_unknown_images, stretches_of
from explain2me.run.packs import read_parquet
from explain2me.run.schema import MAPS
from explain2me.statistics.bootstrap import image_weights, interval, run_weights, weighted_auroc
from explain2me.statistics.estimates import Estimate, auroc_estimate
from explain2me.statistics.scores import ALL, CLEAN
from explain2me.text import shorten

SCORES = ("softmax", "released")
"""softmax: log-odds of the positive class. released: the logit of the positive class, as in the authors' scripts."""
MOST_AREAS = 4_000_000
"""Resampled AUROCs in memory at a time; the weights of the images are drawn once for so many."""
AurocKey = tuple[str, str, str]
"""Score, label and source."""


class Contrast(NamedTuple):
    """Images of one AUROC: the positives of one or all sources against the negatives of one or all sources."""

    positives: str
    negatives: str
    inside: np.ndarray


class Predictions(NamedTuple):
    """Outputs of all runs of a detector: ``logits`` (R, C, N, K), NaN unless all K are finite; ``predicted`` class
    (R, C, N), -1 where the logits are not finite. The first condition is the clean one."""

    conditions: tuple[str, ...]
    logits: np.ndarray
    predicted: np.ndarray


def predictions_of(run: Run, detector: str) -> Predictions:
    """The predictions of all runs of a detector."""
    return read_predictions(run, [run.part_paths(model) for model in run.models_of(detector)])


def performance_rows(run: Run, detector: str, predictions: Predictions, resamples: int) -> list[dict[str, Any]]:
    """Rows of summary/performance for one detector: one for each run, and one named ``all``.

    The row ``all`` holds the mean over the runs with an AUROC. Its interval resamples images within source and runs;
    the interval of a run resamples images. Counts are of images; ``all`` has the counts of the run with the fewest
    images, and the ties of the run with the most. There are no rows without labels or predictions.
    """
    positive = _positive(run)
    if positive is None:
        return []
    seed, label = run.config.seed, run.config.data.positive
    truth = np.array([run.classes.index(name) for name in run.image_table["label"].to_pylist()])
    runs = [model.run for model in run.models_of(detector)]
    stretches = stretches_of(run.image_table)
    contrasts = list(_contrasts(stretches, positive, label))
    by_source = _conditions_by_source(run, detector)
    rows: list[dict[str, Any]] = []
    for (c, condition), score in itertools.product(enumerate(predictions.conditions), SCORES):
        scores, clean = _scores(predictions, c, run.classes.index(label), score)
        chosen = contrasts if condition in by_source else contrasts[:1]
        areas = _resampled(scores, chosen, positive, stretches, seed=seed, resamples=resamples)
        for contrast, resampled in zip(chosen, areas, strict=True):
            row_labels = {"detector": detector, "condition": condition, "score": score}
            row_labels |= {"positives": contrast.positives, "negatives": contrast.negatives}
            numbers = [
                _counts(predictions, m, c, contrast, positive, truth)
                | {"auroc": _auroc(scores[m], contrast, positive), "auroc_clean": _auroc(clean[m], contrast, positive)}
                | {"num_tied_pairs": _tied_pairs(scores[m], contrast, positive)}
                for m in range(len(runs))
            ]
            rows += [row_labels | row for row in _rows(runs, numbers, resampled, seed)]
    return rows


def _positive(run: Run) -> np.ndarray | None:
    """Whether each image has the positive label, bool (N,); None where all or none have it, so there is no AUROC."""
    labels = run.image_table["label"].to_pylist()
    positive = np.array([label == run.config.data.positive for label in labels], bool)
    if positive.all() or not positive.any():
        return None
    if unknown := {*labels} - {*run.classes}:
        path = run.folder / "images.parquet"
        raise unreadable(path, f"expected the labels {shorten(run.classes)}, got {shorten(unknown)}")
    return positive


def _conditions_by_source(run: Run, detector: str) -> set[str]:
    """The conditions whose AUROC is also given source by source: clean, and those of the measures with ``auroc``."""
    measures, size = run.config.measures, run.models_of(detector)[0].input_size
    conditions = [conditions_of(measure, measures, size) for measure in measures.chosen if measure.auroc]
    return {CLEAN, *(condition.name for condition in itertools.chain(*conditions))}


def auroc_estimates(run: Run, predictions: Predictions) -> dict[AurocKey, Estimate]:
    """AUROC of the clean images by (score, label, source): all images, and each source against the other class.

    Empty without labels.
    """
    positive = _positive(run)
    if positive is None:
        return {}
    label = run.config.data.positive
    stretches = stretches_of(run.image_table)
    keys = [(ALL, ALL), *((stretch.label or ALL, stretch.source) for stretch in stretches)]
    estimates = {}
    for name in SCORES:
        if predictions.conditions:
            scores, _ = _scores(predictions, 0, run.classes.index(label), name)
        else:  # all images of the detector are in the quarantine
            scores = np.full(predictions.predicted.shape[::2], np.nan)
        for key, contrast in zip(keys, _contrasts(stretches, positive, label), strict=True):
            estimates[name, *key] = auroc_estimate(np.where(contrast.inside, scores, np.nan), positive)
    return estimates


def sample_aurocs(run: Run, paths: Sequence[Path], sample: np.ndarray) -> np.ndarray:
    """AUROC (softmax) of a sample of images under each condition: (C,); NaN where a class has no image.

    ``paths`` are part files of one model, ``sample`` rows of images.parquet. Empty without labels.
    """
    positive = _positive(run)
    if positive is None:
        return np.empty(0)
    predictions = read_predictions(run, [paths])
    inside = Contrast(ALL, ALL, np.isin(np.arange(len(positive)), sample))
    index = run.classes.index(run.config.data.positive)
    scores = (_scores(predictions, c, index, "softmax")[0][0] for c in range(len(predictions.conditions)))
    return np.array([_auroc(score, inside, positive) for score in scores])


def ranking_score(logits: np.ndarray, positive: int, score: str) -> np.ndarray:
    """The score that ranks images for the ROC curve: logits (..., K) -> float64 (...), higher means more positive.

    ``softmax`` takes the log-odds: they rank images as the probability does, which is exactly 1 for every difference of
    logits above 37, so that confident images would tie. A model with a single logit ranks by this logit, whatever the
    score.

    >>> ranking_score(np.array([[2.0, 1.0], [5.0, 4.5], [0.0, 100.0]]), 1, "softmax")
    array([ -1. ,  -0.5, 100. ])
    """
    logits = logits.astype(np.float64)
    if logits.shape[-1] == 1:
        return logits[..., 0] if positive == 1 else -logits[..., 0]
    if score == "released":
        return logits[..., positive]
    return logits[..., positive] - logsumexp(np.delete(logits, positive, axis=-1), axis=-1)


def _scores(predictions: Predictions, c: int, positive: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores (R, N) under condition ``c`` and of the clean images, both NaN where one of them is missing."""
    both = _used(predictions, c)
    perturbed, clean = (ranking_score(predictions.logits[:, i], positive, name) for i in (c, 0))
    return np.where(both, perturbed, np.nan), np.where(both, clean, np.nan)


def _used(predictions: Predictions, c: int) -> np.ndarray:
    """Whether an image has finite logits under condition ``c`` and clean: bool (R, N)."""
    return (predictions.predicted[:, c] >= 0) & (predictions.predicted[:, 0] >= 0)


def read_predictions(run: Run, paths: Sequence[Sequence[Path]]) -> Predictions:
    """Read the logits and predictions of part files; ``paths`` holds the part files of each training run."""
    conditions: list[str] = []
    num_images = len(run.image_table)
    logits, predicted = np.empty((len(paths), 0, num_images, 1)), np.empty((len(paths), 0, num_images), np.int64)
    for m, path in ((m, path) for m, parts in enumerate(paths) for path in parts):
        table = read_parquet(path, ["image", "condition", "logits", "predicted"], schema=MAPS)
        if not len(table):  # all images of the part are in the quarantine
            continue
        words = table["condition"].combine_chunks()
        names = words.dictionary.to_pylist()
        if not conditions:
            codes = words.indices.to_numpy()
            conditions = list(dict.fromkeys(names[code] for code in codes))
            width = pc.max(pc.list_value_length(table["logits"])).as_py() or 1
            logits = np.full((len(paths), len(conditions), num_images, width), np.nan)
            predicted = np.full((len(paths), len(conditions), num_images), -1)
        _check_part(run, path, table, conditions, logits.shape[-1])
        condition = np.array([conditions.index(name) for name in names])[words.indices.to_numpy()]
        image = table["image"].to_numpy()
        known = table["logits"].is_valid().to_numpy()
        flat = table["logits"].combine_chunks().drop_null().flatten().to_numpy()
        logits[m, condition[known], image[known]] = flat.reshape(-1, logits.shape[-1])
        predicted[m, condition, image] = table["predicted"].fill_null(-1).to_numpy()
    finite = np.isfinite(np.abs(logits).max(-1))
    return Predictions(tuple(conditions), np.where(finite[..., None], logits, np.nan), np.where(finite, predicted, -1))


def _check_part(run: Run, path: Path, table: pa.Table, conditions: Sequence[str], width: int) -> None:
    """Raise RunFolderError for other images, conditions, logits or classes than those of the run."""
    refuse_unknown_images(path, table, len(run.image_table))
    lengths, classes = (
        pc.min_max(part).as_py() for part in (pc.list_value_length(table["logits"]), table["predicted"])
    )
    if {*lengths.values()} - {None, width} or width > len(run.classes):
        raise unreadable(path, f"expected {min(width, len(run.classes))} logits of each image, got {lengths['max']}")
    if not -1 <= (classes["min"] or 0) <= (classes["max"] or 0) < max(len(run.classes), 2):
        raise unreadable(path, f"expected predicted classes below {len(run.classes)}, got {classes['max']}")
    if unknown := {*table["condition"].combine_chunks().dictionary.to_pylist()} - {*conditions}:
        raise unreadable(path, f"it has a condition that others lack: {shorten(repr(min(unknown)))}")


def _contrasts(stretches: Sequence[Stretch], positive: np.ndarray, label: str) -> Iterator[Contrast]:
    """All images, then each source against the other class; ``label`` is that of the positive class."""
    yield Contrast(ALL, ALL, np.ones(len(positive), bool))
    for stretch in stretches:
        is_positive = stretch.label == label
        inside = ~positive if is_positive else positive.copy()
        inside[stretch.start : stretch.stop] = True
        yield Contrast(stretch.source, ALL, inside) if is_positive else Contrast(ALL, stretch.source, inside)


def _resampled(
    scores: np.ndarray,
    contrasts: Sequence[Contrast],
    positive: np.ndarray,
    stretches: Sequence[Stretch],
    *,
    seed: int,
    resamples: int,
) -> Iterator[np.ndarray]:
    """AUROC of each run under each resample, (B, R), of each contrast."""
    at_a_time = max(1, MOST_AREAS // max(1, resamples * len(scores)))
    for first in range(0, len(contrasts), at_a_time):
        some = contrasts[first : first + at_a_time]
        result = np.full((len(some), resamples, len(scores)), np.nan)
        for rows, weights in image_weights(stretches, seed=seed, resamples=resamples):
            for (k, contrast), (m, score) in itertools.product(enumerate(some), enumerate(scores)):
                use = contrast.inside & ~np.isnan(score)
                if use.any():
                    result[k, rows, m] = weighted_auroc(score[use], positive[use], weights[:, use])
        yield from result


def _counts(
    predictions: Predictions, m: int, c: int, contrast: Contrast, positive: np.ndarray, truth: np.ndarray
) -> dict[str, Any]:
    predicted = predictions.predicted[m, c]
    use = contrast.inside & _used(predictions, c)[m]
    right, kept = predicted[use] == truth[use], predicted[use] == predictions.predicted[m, 0][use]
    return {
        "n": int(use.sum()),
        "num_positive": int((use & positive).sum()),
        "num_negative": int((use & ~positive).sum()),
        "num_invalid": int((contrast.inside & ~use).sum()),
        "accuracy": float(right.mean()) if use.any() else float("nan"),
        "kept_share": float(kept.mean()) if use.any() else float("nan"),
    }


def _rows(
    names: Sequence[str], numbers: Sequence[dict[str, Any]], resampled: np.ndarray, seed: int
) -> Iterator[dict[str, Any]]:
    """One row for each run, and one for the mean; ``numbers`` and ``resampled`` (B, R) are by run."""
    for m, name in enumerate(names):
        low, high = interval(resampled[:, m])
        yield numbers[m] | {"run": name, "std": float("nan"), "ci_low": low, "ci_high": high}
    has = [m for m, number in enumerate(numbers) if not math.isnan(number["auroc"])] or list(range(len(numbers)))
    weights = run_weights(len(has), seed=seed, resamples=len(resampled))
    low, high = interval((resampled[:, has] * weights).sum(1) / np.maximum(weights.sum(1), 1))
    chosen = [numbers[m] for m in has]
    fewest = min(chosen, key=lambda number: number["n"])  # a sum over runs would count images twice
    columns = ("auroc", "auroc_clean", "accuracy", "kept_share")
    means = {column: float(np.mean([number[column] for number in chosen])) for column in columns}
    aurocs = np.array([number["auroc"] for number in chosen])
    std = float(aurocs.std(ddof=1)) if len(aurocs) > 1 else float("nan")
    means["num_tied_pairs"] = max(number["num_tied_pairs"] for number in chosen)
    yield fewest | means | {"run": ALL, "std": std, "ci_low": low, "ci_high": high}


def _tied_pairs(score: np.ndarray, contrast: Contrast, positive: np.ndarray) -> int:
    """Number of pairs of a positive and a negative image with the same score; each counts one half in AUROC."""
    use = contrast.inside & ~np.isnan(score)
    _, codes = np.unique(score[use], return_inverse=True)
    positives, negatives = (np.bincount(codes[side[use]], minlength=use.sum()) for side in (positive, ~positive))
    return int(positives @ negatives)


def _auroc(score: np.ndarray, contrast: Contrast, positive: np.ndarray) -> float:
    use = contrast.inside & ~np.isnan(score)
    if positive[use].all() or not positive[use].any():
        return float("nan")
    return float(roc_auc_score(positive[use], score[use]))
