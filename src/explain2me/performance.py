"""AUROC and accuracy of every run, under every condition, from the logits beside the maps."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from scipy.special import log_softmax
from sklearn.metrics import roc_auc_score

from explain2me.bootstrap import image_weights, interval, run_weights, weighted_auroc
from explain2me.config import Config
from explain2me.store import Model, Run, Stretch, read_parquet, stretches_of

ALL = "all"
SCORES = ("softmax", "released")
"""softmax: log probability of the positive class. released: its logit alone, as the authors' scripts rank."""
BY_SOURCE = ("clean", "focus_salient", "focus_nonsalient")
"""Conditions whose AUROC is also given source by source."""
PERFORMANCE_COLUMNS = (
    "detector", "run", "condition", "score", "positives", "negatives", "num_positive", "num_negative", "auroc", "std",
    "ci_low", "ci_high", "accuracy", "kept_share", "num_invalid",
)  # fmt: skip


class Contrast(NamedTuple):
    """Images of an AUROC: a source or all of the positives, against a source or all of the negatives."""

    positives: str
    negatives: str
    inside: np.ndarray


class Predictions(NamedTuple):
    """What the runs of a detector said: ``logits`` (R, C, N, K), NaN where none; ``predicted`` (R, C, N), -1."""

    conditions: tuple[str, ...]
    logits: np.ndarray
    predicted: np.ndarray


def performance_rows(run: Run, detector: str, config: Config) -> list[dict[str, Any]]:
    """Rows of summary/performance for one detector: each run, and their mean as run ``all``; none without labels.

    The interval resamples images within source, and for ``all`` the runs too.
    """
    images = run.image_table
    labels = images["label"].to_pylist()
    positive = np.array([label == config.data.positive for label in labels])
    if positive.all() or not positive.any():
        return []
    truth = np.array([run.classes.index(label) for label in labels])
    models = run.models_of(detector)
    stretches = stretches_of(images)
    predictions = _predictions(run, models)
    contrasts = list(_contrasts(stretches, positive, config.data.positive))
    rows: list[dict[str, Any]] = []
    for (c, condition), name in itertools.product(enumerate(predictions.conditions), SCORES):
        scores = ranking_score(predictions.logits[:, c], run.classes.index(config.data.positive), name)
        for contrast in contrasts if condition in BY_SOURCE else contrasts[:1]:
            what = {"detector": detector, "condition": condition, "score": name}
            what |= {"positives": contrast.positives, "negatives": contrast.negatives}
            counts = [_counts(predictions, m, c, contrast, positive, truth) for m in range(len(models))]
            resampled = _resampled(scores, contrast, positive, stretches, run.config.seed, config.summary.bootstrap)
            rows += _rows(what, [model.run for model in models], scores, contrast, positive, counts, resampled, run)
    return rows


def ranking_score(logits: np.ndarray, positive: int, score: str) -> np.ndarray:
    """Rank images for the ROC curve: logits (..., K) -> (...), higher means more positive. One logit ranks by itself.

    >>> ranking_score(np.array([[2.0, 1.0], [5.0, 4.5]]), 1, "softmax").round(3)
    array([-1.313, -0.974])
    """
    if logits.shape[-1] == 1:
        return logits[..., 0] if positive == 1 else -logits[..., 0]
    return logits[..., positive] if score == "released" else log_softmax(logits, axis=-1)[..., positive]


def _predictions(run: Run, models: Sequence[Model]) -> Predictions:
    """Read logits and predictions alone, part by part."""
    count = len(run.image_table)
    conditions: list[str] = []
    logits = predicted = np.empty(0)
    for m, path in ((m, path) for m, model in enumerate(models) for path in run.part_paths(model)):
        table = read_parquet(path, ["image", "condition", "logits", "predicted"])
        words = table["condition"].combine_chunks()
        names = words.dictionary.to_pylist()
        if not conditions:
            codes = words.indices.to_numpy()
            conditions = list(dict.fromkeys(names[code] for code in codes))
            width = pc.max(pc.list_value_length(table["logits"])).as_py() or 1
            logits = np.full((len(models), len(conditions), count, width), np.nan)
            predicted = np.full((len(models), len(conditions), count), -1)
        where = np.array([conditions.index(name) for name in names])[words.indices.to_numpy()]
        image = table["image"].to_numpy()
        known = table["logits"].is_valid().to_numpy()
        flat = table["logits"].combine_chunks().drop_null().flatten().to_numpy()
        logits[m, where[known], image[known]] = flat.reshape(-1, logits.shape[-1])
        predicted[m, where, image] = table["predicted"].fill_null(-1).to_numpy()
    return Predictions(tuple(conditions), logits, predicted)


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
    use = contrast.inside & (predicted >= 0)
    right, kept = predicted[use] == truth[use], predicted[use] == predictions.predicted[m, 0][use]
    return {
        "num_positive": int((use & positive).sum()),
        "num_negative": int((use & ~positive).sum()),
        "num_invalid": int((contrast.inside & (predicted < 0)).sum()),
        "accuracy": float(right.mean()) if use.any() else float("nan"),
        "kept_share": float(kept.mean()) if use.any() else float("nan"),
    }


def _rows(
    what: dict[str, Any], names: Sequence[str], scores: np.ndarray, contrast: Contrast, positive: np.ndarray,
    counts: Sequence[dict[str, Any]], resampled: np.ndarray, run: Run,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row a run, and one for their mean."""
    aurocs = np.array([_auroc(score, contrast, positive) for score in scores])
    for m, name in enumerate(names):
        low, high = interval(resampled[:, m])
        yield what | counts[m] | {"run": name, "auroc": aurocs[m], "std": float("nan"), "ci_low": low, "ci_high": high}
    weights = run_weights(len(names), seed=run.config.seed, resamples=len(resampled))
    low, high = interval((resampled * weights).sum(1) / np.maximum(weights.sum(1), 1))
    numbers = {key: [count[key] for count in counts] for key in counts[0]}
    sums = {key: sum(values) for key, values in numbers.items() if key.startswith("num_")}
    means = {key: float(np.mean(values)) for key, values in numbers.items() if not key.startswith("num_")}
    std = float(aurocs.std(ddof=1)) if len(aurocs) > 1 else float("nan")
    yield what | sums | means | {"run": ALL, "auroc": aurocs.mean(), "std": std, "ci_low": low, "ci_high": high}


def _auroc(score: np.ndarray, contrast: Contrast, positive: np.ndarray) -> float:
    use = contrast.inside & ~np.isnan(score)
    if positive[use].all() or not positive[use].any():
        return float("nan")
    return float(roc_auc_score(positive[use], score[use]))
