"""AUROC and accuracy of every run, under every condition, from the logits beside the maps.

An image without finite logits, under the condition or clean, is left out and counted as invalid: a dead or flat clean map
drives no blur, and so its image drops out of the blurred conditions. Therefore each row also has ``auroc_clean``, the
AUROC of the clean images over the very images that the row uses: compare ``auroc`` with it, not with the row `clean`.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score

from explain2me.config.schema import Config
from explain2me.run.folder import Run, Stretch, stretches_of
from explain2me.run.packs import read_parquet
from explain2me.run.schema import ALL
from explain2me.statistics.bootstrap import image_weights, interval, run_weights, weighted_auroc
from explain2me.statistics.estimates import Estimate, auroc_estimate

SCORES = ("softmax", "released")
"""softmax: log probability of the positive class. released: its logit alone, as the authors' scripts rank."""
BY_SOURCE = ("clean", "focus_salient", "focus_nonsalient")
"""Conditions whose AUROC is also given source by source."""
AurocKey = tuple[str, str, str]
"""Score, label and source."""
PERFORMANCE_COLUMNS = (
    "detector", "run", "condition", "score", "positives", "negatives", "n", "num_positive", "num_negative", "auroc", "std",
    "ci_low", "ci_high", "auroc_clean", "accuracy", "kept_share", "num_invalid",
)  # fmt: skip


class Contrast(NamedTuple):
    """Images of an AUROC: a source or all of the positives, against a source or all of the negatives."""

    positives: str
    negatives: str
    inside: np.ndarray


class Predictions(NamedTuple):
    """What the runs of a detector said: ``logits`` (R, C, N, K), NaN unless all are finite; ``predicted`` (R, C, N), -1
    where they are not. The first condition is the clean one."""

    conditions: tuple[str, ...]
    logits: np.ndarray
    predicted: np.ndarray


def predictions_of(run: Run, detector: str) -> Predictions:
    """Of all runs of a detector."""
    return read_predictions(len(run.image_table), [run.part_paths(model) for model in run.models_of(detector)])


def performance_rows(run: Run, detector: str, predictions: Predictions, config: Config) -> list[dict[str, Any]]:
    """Rows of summary/performance for one detector: each run, and as run ``all`` the mean over those that have an AUROC; none
    without labels or predictions.

    The interval resamples images within source, and for ``all`` the runs too. Counts are of images; those of ``all`` are of
    the run that has the fewest.
    """
    images = run.image_table
    labels = images["label"].to_pylist()
    positive = np.array([label == config.data.positive for label in labels])
    if positive.all() or not positive.any():
        return []
    truth = np.array([run.classes.index(label) for label in labels])
    models = run.models_of(detector)
    stretches = stretches_of(images)
    contrasts = list(_contrasts(stretches, positive, config.data.positive))
    rows: list[dict[str, Any]] = []
    for (c, condition), name in itertools.product(enumerate(predictions.conditions), SCORES):
        scores, clean = _scores(predictions, c, run.classes.index(config.data.positive), name)
        for contrast in contrasts if condition in BY_SOURCE else contrasts[:1]:
            what = {"detector": detector, "condition": condition, "score": name}
            what |= {"positives": contrast.positives, "negatives": contrast.negatives}
            numbers = [
                _counts(predictions, m, c, contrast, positive, truth)
                | {"auroc": _auroc(scores[m], contrast, positive), "auroc_clean": _auroc(clean[m], contrast, positive)}
                for m in range(len(models))
            ]
            resampled = _resampled(scores, contrast, positive, stretches, run.config.seed, config.summary.bootstrap)
            rows += _rows(what, [model.run for model in models], numbers, resampled, run.config.seed)
    return rows


def auroc_estimates(run: Run, predictions: Predictions, config: Config) -> dict[AurocKey, Estimate]:
    """AUROC of the clean images by (score, label, source): of all, and of each source against all of the other class.

    None without labels.
    """
    positive = np.array([label == config.data.positive for label in run.image_table["label"].to_pylist()])
    if positive.all() or not positive.any():
        return {}
    stretches = stretches_of(run.image_table)
    keys = [(ALL, ALL), *((stretch.label or ALL, stretch.source) for stretch in stretches)]
    found = {}
    for name in SCORES:
        if predictions.conditions:
            scores, _ = _scores(predictions, 0, run.classes.index(config.data.positive), name)
        else:  # all of its images are in the quarantine
            scores = np.full(predictions.predicted.shape[::2], np.nan)
        for key, contrast in zip(keys, _contrasts(stretches, positive, config.data.positive), strict=True):
            found[name, *key] = auroc_estimate(np.where(contrast.inside, scores, np.nan), positive)
    return found


def sample_aurocs(run: Run, paths: Sequence[Path], sample: np.ndarray, config: Config) -> np.ndarray:
    """AUROC (softmax) over some images under each condition: (C,); NaN where a label is missing.

    Args:
        run: whose images they are.
        paths: part files of one model.
        sample: rows of images.parquet.
        config: says which label is positive.
    """
    positive = np.array([label == config.data.positive for label in run.image_table["label"].to_pylist()])
    if positive.all() or not positive.any():
        return np.empty(0)
    predictions = read_predictions(len(positive), [paths])
    inside = Contrast(ALL, ALL, np.isin(np.arange(len(positive)), sample))
    index = run.classes.index(config.data.positive)
    scores = (_scores(predictions, c, index, "softmax")[0][0] for c in range(len(predictions.conditions)))
    return np.array([_auroc(score, inside, positive) for score in scores])


def from_to(counts: Sequence[int]) -> str:
    """Images of each run in a word: ``7``, or ``3 to 53`` where they differ.

    >>> from_to([53, 3, 7])
    '3 to 53'
    """
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def ranking_score(logits: np.ndarray, positive: int, score: str) -> np.ndarray:
    """Rank images for the ROC curve: logits (..., K) -> (...), higher means more positive. One logit ranks by itself.

    >>> ranking_score(np.array([[2.0, 1.0], [5.0, 4.5]]), 1, "softmax").round(3)
    array([-1.313, -0.974])
    """
    if logits.shape[-1] == 1:
        return logits[..., 0] if positive == 1 else -logits[..., 0]
    return logits[..., positive] if score == "released" else log_softmax(logits, axis=-1)[..., positive]


def _scores(predictions: Predictions, c: int, positive: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores (R, N) under condition ``c`` and clean, NaN where either is not there: both over the same images."""
    both = _used(predictions, c)
    perturbed, clean = (ranking_score(predictions.logits[:, i], positive, name) for i in (c, 0))
    return np.where(both, perturbed, np.nan), np.where(both, clean, np.nan)


def _used(predictions: Predictions, c: int) -> np.ndarray:
    """Images with finite logits under condition ``c`` and clean: bool (R, N)."""
    return (predictions.predicted[:, c] >= 0) & (predictions.predicted[:, 0] >= 0)


def read_predictions(num_images: int, paths: Sequence[Sequence[Path]]) -> Predictions:
    """Read logits and predictions alone, part by part; ``paths`` holds the part files of each run."""
    conditions: list[str] = []
    logits, predicted = np.empty((len(paths), 0, num_images, 1)), np.empty((len(paths), 0, num_images), np.int64)
    for m, path in ((m, path) for m, parts in enumerate(paths) for path in parts):
        table = read_parquet(path, ["image", "condition", "logits", "predicted"])
        if not len(table):  # all of its images are in the quarantine
            continue
        words = table["condition"].combine_chunks()
        names = words.dictionary.to_pylist()
        if not conditions:
            codes = words.indices.to_numpy()
            conditions = list(dict.fromkeys(names[code] for code in codes))
            width = pc.max(pc.list_value_length(table["logits"])).as_py() or 1
            logits = np.full((len(paths), len(conditions), num_images, width), np.nan)
            predicted = np.full((len(paths), len(conditions), num_images), -1)
        where = np.array([conditions.index(name) for name in names])[words.indices.to_numpy()]
        image = table["image"].to_numpy()
        known = table["logits"].is_valid().to_numpy()
        flat = table["logits"].combine_chunks().drop_null().flatten().to_numpy()
        logits[m, where[known], image[known]] = flat.reshape(-1, logits.shape[-1])
        predicted[m, where, image] = table["predicted"].fill_null(-1).to_numpy()
    finite = np.isfinite(np.abs(logits).max(-1))
    return Predictions(tuple(conditions), np.where(finite[..., None], logits, np.nan), np.where(finite, predicted, -1))


def _contrasts(stretches: Sequence[Stretch], positive: np.ndarray, label: str) -> Iterator[Contrast]:
    yield Contrast(ALL, ALL, np.ones(len(positive), bool))
    for stretch in stretches:
        inside = np.zeros(len(positive), bool)
        inside[stretch.start : stretch.stop] = True
        if stretch.label == label:
            yield Contrast(stretch.source, ALL, inside | ~positive)
        else:
            yield Contrast(ALL, stretch.source, inside | positive)


def _resampled(
    scores: np.ndarray,
    contrast: Contrast,
    positive: np.ndarray,
    stretches: Sequence[Stretch],
    seed: int,
    resamples: int,
) -> np.ndarray:
    """AUROC of each run under each resample: (B, R)."""
    result = np.full((resamples, len(scores)), np.nan)
    for rows, weights in image_weights(stretches, seed=seed, resamples=resamples):
        for m, score in enumerate(scores):
            use = contrast.inside & ~np.isnan(score)
            if use.any():
                result[rows, m] = weighted_auroc(score[use], positive[use], weights[:, use])
    return result


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
    what: dict[str, Any], names: Sequence[str], numbers: Sequence[dict[str, Any]], resampled: np.ndarray, seed: int
) -> Iterator[dict[str, Any]]:
    """One row a run, and one for their mean; ``numbers`` and ``resampled`` (B, R) are of each run."""
    for m, name in enumerate(names):
        low, high = interval(resampled[:, m])
        yield what | numbers[m] | {"run": name, "std": float("nan"), "ci_low": low, "ci_high": high}
    has = [m for m, number in enumerate(numbers) if not math.isnan(number["auroc"])] or list(range(len(numbers)))
    weights = run_weights(len(has), seed=seed, resamples=len(resampled))
    low, high = interval((resampled[:, has] * weights).sum(1) / np.maximum(weights.sum(1), 1))
    chosen = [numbers[m] for m in has]
    fewest = min(chosen, key=lambda number: number["n"])  # a sum over runs would read as so many images
    columns = ("auroc", "auroc_clean", "accuracy", "kept_share")
    means = {column: float(np.mean([number[column] for number in chosen])) for column in columns}
    aurocs = np.array([number["auroc"] for number in chosen])
    std = float(aurocs.std(ddof=1)) if len(aurocs) > 1 else float("nan")
    yield what | fewest | means | {"run": ALL, "std": std, "ci_low": low, "ci_high": high}


def _auroc(score: np.ndarray, contrast: Contrast, positive: np.ndarray) -> float:
    use = contrast.inside & ~np.isnan(score)
    if positive[use].all() or not positive[use].any():
        return float("nan")
    return float(roc_auc_score(positive[use], score[use]))
