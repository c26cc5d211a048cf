"""Set a finished study of examples/faces-study.toml beside the paper's numbers: the tables of faces.md.

python docs/results/faces.py runs/faces-study runs/faces-every ../shared/reference

The second run is that of docs/results/faces-every.toml: the same detectors on all test images, clean ones only, for AUROC.
Copies the summaries, writes further tables into docs/results/faces/, and the page's tables between its two marks; the text
around them is written by hand.
"""

import csv
import itertools
import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats

from explain2me import open_run
from explain2me.config.load import load_config
from explain2me.measures import entropy, pearson, ssim
from explain2me.run.conditions import conditions_for
from explain2me.run.folder import Run, stretches_of
from explain2me.salience.heatmaps import mean_map, resize_map
from explain2me.statistics.bootstrap import image_weights, interval, weighted_auroc
from explain2me.statistics.performance import ranking_score, read_predictions
from explain2me.train.losses import minmax

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "examples" / "faces-study.toml"
BEGIN, END = "<!-- tables begin -->", "<!-- tables end -->"
ARCHITECTURES = ("resnet50", "densenet121")
STRATEGIES = ("cross-entropy", "cyborg")
DETECTORS = [(model, training) for model in ARCHITECTURES for training in STRATEGIES]
REAL, FAKES = "ffhq", ("stylegan", "stylegan2", "stylegan3")
"""The sources of this study that the paper has, too."""
REAL_SHARE = 0.2
"""Of the paper's column "total", which its other two columns imply."""
MEASURES = {  # rows of Table 1: the paper's measure and variant; ours, and its group of conditions
    "entropy of the values": ("entropy", "", ("entropy", "intensity", "clean")),
    "noise, salt and pepper 0.05": ("noise", "salt_pepper", ("noise", "predicted", "salt_pepper@0.05")),
    "focus, salient region blurred": ("focus", "salient_removed", ("focus", "predicted", "focus_salient")),
    "focus, rest blurred": ("focus", "nonsalient_removed", ("focus", "predicted", "focus_nonsalient")),
    "stability": ("stability", "", ("stability", "predicted", "clean")),
}
TRANSFORMS = {
    name: ("resilience", "predicted", name) for name in ("shifts", "flips", "flip_LR", "flip_UD", "rotations")
}
SPATIAL = {"spatial entropy": ("entropy", "spatial", "clean")}
PUBLISHED_AUROC = dict(zip(DETECTORS, (0.54, 0.63, 0.68, 0.68), strict=True))
"""In the text of the paper; one number a detector."""
CONTRASTS = [
    ("stylegan", "ffhq", "both seen in training"),
    ("stylegan2", "ffhq", "an unseen generator"),
    ("stylegan3", "ffhq", "an unseen generator"),
    ("stylegan2_ffhq256", "ffhq", "out of distribution"),
    ("stylegan3_ffhqu", "ffhq", "out of distribution"),
    ("stylegan2_lora", "ffhq", "out of distribution"),
    ("stylegan2", "ffhq_1024png", "against reals of another origin"),
    ("stylegan3", "ffhq_1024png", "against reals of another origin"),
    ("ffhq_1024png", "ffhq", "control, both real: 0.5 is right"),
]
Row = Mapping[str, str]
Key = tuple[str, str, str]


def main(study: Path, every: Path, reference: Path, *, here: Path = HERE, guide: Path | None = None) -> None:
    """Write everything into the folder ``here``; ``guide`` holds the human maps, if not those of the config."""
    page = here / "faces.md"
    text = page.read_text(encoding="utf-8")
    if not (text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)):
        sys.exit(f"{page}: expected the lines {BEGIN} and {END} once each, in this order")
    collect(study, every, here / "faces", guide or _folder_of_the_guide())
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{tables(here / 'faces', reference)}\n\n{END}{after}", encoding="utf-8")


# ------------------------------------------------------------------------------------------------ from runs to CSV files


def collect(study: Path, every: Path, folder: Path, guide: Path) -> None:
    """Tables of the study and of the run over all test images, as CSV files."""
    runs = open_run(study / "run"), open_run(every)
    trained = list(_cards(study))
    weights = {row["weights_sha256"] for row in trained}
    for run in runs:
        if {model.weights_sha256 for model in run.models} != weights:
            sys.exit(f"{run.folder}: its weights are not those of {study / 'training'}")
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.csv"):
        path.unlink()
    for name in ("measures", "differences", "performance", "stability_matrix"):
        shutil.copyfile(runs[0].folder / "summary" / f"{name}.csv", folder / f"{name}.csv")
    _write(pd.DataFrame(trained), folder / "training.csv")
    _write(by_run(runs[0]), folder / "runs.csv")
    _write(auroc(runs[1]), folder / "auroc.csv")
    _write(called(runs[1]), folder / "called.csv")
    _write(against_guide(runs[0], guide), folder / "guide.csv")


def by_run(run: Run) -> pd.DataFrame:
    """Mean and deviation over images of each measure: by detector, run (or pair of runs) and source."""
    scores = run.scores().to_pandas()
    names = ("detector", "run", "other_run", "measure", "variant", "similarity", "condition")
    scores = scores.astype(dict.fromkeys(names, str))
    for name in ("other_run", "similarity"):  # of a measure of single runs, of entropy
        scores[name] = scores[name].replace("nan", "").fillna("")
    unit = ["detector", "run", "other_run", "measure", "variant", "similarity", "group"]
    scores["value"] = scores.value.where(scores.valid)
    scores["kept"] = scores.kept.where(scores.valid).astype(float)
    groups = _groups(run)
    scores["group"] = scores.condition.map(lambda name: groups.get(name, (name,)))
    of_images = scores.explode("group").groupby([*unit, "image"], as_index=False)
    # transforms of a group are averaged within an image first
    values = of_images.agg(
        value=("value", "mean"), chance=("chance", "mean"), kept=("kept", "mean"), dead=("dead", "max")
    )
    values = values.merge(run.image_table.to_pandas()[["image", "label", "source"]], on="image")
    return values.groupby([*unit, "label", "source"], as_index=False).agg(
        n=("value", "count"),
        mean=("value", "mean"),
        std=("value", "std"),
        chance=("chance", "mean"),
        kept_share=("kept", "mean"),
        num_dead=("dead", "sum"),
    )


def _groups(run: Run) -> dict[str, tuple[str, ...]]:
    """The groups of each transform."""
    conditions = conditions_for(run.config.measures, run.models[0].input_size)
    return {
        each.name: (each.group, *([each.kind] if each.group == "flips" else [])) for each in conditions if each.group
    }


def auroc(run: Run) -> pd.DataFrame:
    """AUROC of each detector and run for each pair of sources, and of their mean an interval over images."""
    table = run.image_table
    sources = np.array(table["source"].to_pylist())
    labels = np.array(table["label"].to_pylist())
    stretches = stretches_of(table)
    config = run.config
    rows = []
    contrasts = [((a, b), np.isin(sources, (a, b)), sources == a) for a, b, _ in CONTRASTS]
    contrasts.append((("all", "all"), np.full(len(sources), True), labels == config.data.positive))
    for detector in dict.fromkeys(model.detector for model in run.models):
        models = run.models_of(detector)
        logits = read_predictions(len(table), [run.part_paths(model) for model in models]).logits[:, 0]
        for score in ("softmax", "released"):
            ranks = ranking_score(logits, run.classes.index(config.data.positive), score)
            if not np.isfinite(ranks).all():
                sys.exit(
                    f"{run.folder}: some logits of {detector} are missing or not finite; AUROC would be of other images"
                )
            for (positives, negatives), inside, positive in contrasts:
                found = {"detector": detector, "score": score, "positives": positives, "negatives": negatives}
                numbers = {"num_positive": positive[inside].sum(), "num_negative": (~positive[inside]).sum()}
                if not all(numbers.values()):
                    continue
                drawn = np.empty((config.summary.bootstrap, len(models)))
                for part, weights in image_weights(stretches, seed=config.seed, resamples=len(drawn)):
                    for m, rank in enumerate(ranks):
                        drawn[part, m] = weighted_auroc(rank[inside], positive[inside], weights[:, inside])
                whole = [
                    weighted_auroc(rank[inside], positive[inside], np.ones((1, inside.sum())))[0] for rank in ranks
                ]
                limits = dict(zip(("ci_low", "ci_high"), interval(drawn.mean(1)), strict=True))
                each = zip([model.run for model in models], whole, strict=True)
                rows += [found | numbers | {"run": name, "auroc": value} for name, value in each]
                rows.append(found | numbers | {"run": "mean", "auroc": np.mean(whole)} | limits)
    return pd.DataFrame(rows)


def called(run: Run) -> pd.DataFrame:
    """Share of the images of each source that are called positive, by detector and run."""
    table = run.image_table.to_pandas()
    rows = []
    positive = run.classes.index(run.config.data.positive)
    for model in run.models:
        predicted = read_predictions(len(table), [run.part_paths(model)]).predicted[0, 0]
        for (label, source), images in table.groupby(["label", "source"]).groups.items():
            share = float((predicted[images] == positive).mean())
            what = {"detector": model.detector, "run": model.run, "label": label, "source": source}
            rows.append(what | {"n": len(images), "called_positive": share})
    return pd.DataFrame(rows)


def against_guide(run: Run, folder: Path) -> pd.DataFrame:
    """How like the guide the clean maps are, by detector, run and label; and how the guide itself would be scored."""
    maps = run.maps(["image", "condition", "map"]).to_pandas()
    maps = maps[(maps.condition == "clean") & maps["map"].notna()].merge(
        run.image_table.to_pandas()[["image", "label"]], on="image"
    )
    rows = []
    for (detector, name, label), part in maps.groupby(["detector", "run", "label"], observed=True):
        cells = torch.from_numpy(np.stack(part["map"].to_list())).float()
        side = int(cells.shape[1] ** 0.5)
        guide = _guide(folder, side)
        clean = cells.reshape(-1, side, side)
        live = clean[clean.sum((1, 2)) > 0]
        same = guide.expand(len(live), side, side)
        shares = (live * (guide > 0.5)).sum((1, 2)) / live.sum((1, 2))
        found = {"detector": detector, "run": name, "label": label, "n": len(live), "ssim": _mean(ssim(live, same))}
        rows.append(found | {"pearson": _mean(pearson(live, same)), "share_inside": _mean(shares)})
    itself = {"detector": "the guide itself", "spatial_entropy": _mean(entropy(guide))}
    itself |= {"intensity_entropy": _mean(entropy(guide, "intensity"))}
    for name, moved in (("flip_LR", guide.flip(2)), ("flip_UD", guide.flip(1)), ("rotation", guide.rot90(1, (1, 2)))):
        itself[f"ssim_{name}"] = _mean(ssim(guide, moved))
    share = {"share_inside": _mean((guide * (guide > 0.5)).sum((1, 2)) / guide.sum((1, 2)))}
    even = {"detector": "an even map", "share_inside": _mean((guide > 0.5).float())}
    return pd.DataFrame([*rows, itself | share, even])


def _guide(folder: Path, side: int) -> torch.Tensor:
    """The average human map at the resolution of the maps, scaled min-max as in the loss: (1, side, side)."""
    average, _ = mean_map(folder, (224, 224))
    return minmax(torch.from_numpy(resize_map(average, (side, side)).copy())[None])[0]


def _folder_of_the_guide() -> Path:
    training = load_config(CONFIG).training
    assert training is not None
    return Path(training.strategies[1].salience.partition(":")[2])


def _mean(values: torch.Tensor) -> float:
    return float(values.double().nanmean())


def _cards(study: Path) -> Iterator[dict[str, object]]:
    for path in sorted((study / "training").glob("*/run*/card.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        best, last = card["metrics"], card["curve"][-1]
        yield (
            {name: card[name] for name in ("detector", "run", "seed", "epochs", "best_epoch", "seconds")}
            | {name: best.get(name) for name in ("train_accuracy", "val_accuracy", "val_auroc")}
            | {f"last_{name}": last.get(name) for name in ("train_accuracy", "val_accuracy", "val_auroc")}
            | {"weights_sha256": card["files"]["best.safetensors"]}
        )


def _write(frame: pd.DataFrame, path: Path) -> None:
    frame.to_csv(path, index=False, float_format="%.6g", lineterminator="\n")


# ------------------------------------------------------------------------------------------------------------ the tables


def tables(folder: Path, reference: Path) -> str:
    """The page's tables, of what is collected."""
    runs = pd.read_csv(folder / "runs.csv", keep_default_na=False, na_values=[""], dtype={"run": str, "other_run": str})
    measures, trained = read(folder / "measures.csv"), read(folder / "training.csv")
    table1, table2 = read(reference / "paper_table1.csv"), read(reference / "paper_table2.csv")
    aurocs = pd.read_csv(folder / "auroc.csv")
    parts = [
        "### What guidance changes, and whether the paper finds the same",
        markdown(*claims(runs, aurocs, table1, table2)),
        "### Are the maps like the guide?",
        markdown(*guide_table(read(folder / "guide.csv"))),
        "### Table 1: the measures",
        markdown(*measure_table(runs, table1)),
        "### Table 2: resilience to geometric transforms",
        markdown(*transform_table(runs, table2)),
        "### With chance levels, over the images of the study, all sources",
        markdown(*chance_table(measures)),
        "### AUROC",
        markdown(*auroc_table(aurocs)),
        "### Share called fake",
        markdown(*called_table(pd.read_csv(folder / "called.csv"))),
        "### Training",
        markdown(*training_table(trained)),
    ]
    return "\n\n".join(parts)


Table = tuple[list[str], list[list[str]]]


def claims(runs: pd.DataFrame, aurocs: pd.DataFrame, table1: Sequence[Row], table2: Sequence[Row]) -> Table:
    """CYBORG minus cross-entropy: theirs, ours with an interval over training runs, and the verdict.

    The rule was written before the results were there. *agrees*: the interval excludes 0 on the paper's side; *disagrees*: on the
    other side; *not significant*: it holds 0. The interval is of other trainings on these very images, not of other images.
    """
    rows = []
    wanted = {name: key for name, (_, _, key) in MEASURES.items()} | SPATIAL | TRANSFORMS
    for name, key in wanted.items():
        for model in ARCHITECTURES:
            of_both = [
                [unit_values(runs, f"{model}-{each}", each_key) for each in STRATEGIES] for each_key in _variants(key)
            ]
            paper = published_difference(name, model, table1, table2)
            ours = [difference(*(pseudo_values(values, "mean") for values in both)) for both in of_both]
            corrected = difference(*(pseudo_values(values, "corrected") for values in of_both[0]))
            cells = [in_words(each) for each in ours] + ["-"] * (2 - len(ours))
            other = [unit_values(runs, f"{model}-{each}", key, "pearson") for each in STRATEGIES]
            more = [corrected, difference(*(pseudo_values(values, "mean") for values in other))]
            checks = "--" if key[0] == "entropy" else map(in_words, more)
            rows.append([name, model, signed(paper), *cells, *checks, verdict(paper, ours[0])])
    for model in ARCHITECTURES:
        pair = [_auroc_values(aurocs, f"{model}-{each}", "softmax") for each in STRATEGIES]
        paper = PUBLISHED_AUROC[model, "cyborg"] - PUBLISHED_AUROC[model, "cross-entropy"]
        ours_auroc = difference(*pair)
        rows.append(["AUROC", model, signed(paper), in_words(ours_auroc), *"---", verdict(paper, ours_auroc)])
    names = [
        "CYBORG minus cross-entropy",
        "architecture",
        "paper",
        "predicted class",
        "fixed class",
        "above chance, run by run",
        "by Pearson",
    ]
    return [*names, "verdict"], rows


def _variants(key: Key) -> list[Key]:
    return [key] if key[0] == "entropy" else [key, (key[0], "fixed", key[2])]


def of_key(runs: pd.DataFrame, detector: str, key: Key, similarity: str = "ssim") -> pd.DataFrame:
    """The rows of runs.csv of one number of a detector."""
    found = runs[(runs.detector == detector) & (runs.measure == key[0]) & (runs.variant == key[1])]
    return found[(found.group == key[2]) & (found.similarity.isna() | (found.similarity == similarity))]


def unit_values(runs: pd.DataFrame, detector: str, key: Key, similarity: str = "ssim") -> pd.DataFrame:
    """One row a run (or pair of runs): ``mean`` over the paper's sources with its weights, and ``corrected`` for chance."""
    found = of_key(runs, detector, key, similarity)
    found = found[found.source.isin((REAL, *FAKES))].copy()
    num_fakes = found[found.source != REAL].source.nunique()
    found["weight"] = np.where(found.source == REAL, REAL_SHARE, (1 - REAL_SHARE) / max(num_fakes, 1))
    weighted = found[["run"]].assign(other_run=found.other_run.fillna(""))
    for name in ("mean", "chance"):
        weighted[name] = found[name] * found.weight
    result = weighted.groupby(["run", "other_run"]).sum(min_count=found.source.nunique())  # NaN where a source has none
    result["corrected"] = (result["mean"] - result.chance) / (1 - result.chance).where(result.chance < 1)
    return result.reset_index()


def pseudo_values(values: pd.DataFrame, column: str) -> list[float]:
    """A value a run. Of pairs of runs: what the jackknife says each run contributes to the mean over pairs."""
    numbers = values[column].to_list()
    if not values.other_run.any():
        return numbers
    pairs = list(zip(values.run, values.other_run, strict=True))
    names = sorted({name for pair in pairs for name in pair})
    if len(names) < 3:
        return numbers
    whole = statistics.fmean(numbers)
    without = [
        statistics.fmean(value for pair, value in zip(pairs, numbers, strict=True) if name not in pair)
        for name in names
    ]
    return [len(names) * whole - (len(names) - 1) * each for each in without]


def difference(plain: Sequence[float], guided: Sequence[float]) -> tuple[float, float, float]:
    """Mean of guided minus plain over runs, which start alike in pairs, and its 95 % interval by Student's t."""
    each = np.subtract(guided, plain)
    if len(each) < 2:
        return float(each.mean()), float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(each) - 1) * each.std(ddof=1) / len(each) ** 0.5
    return float(each.mean()), float(each.mean() - half), float(each.mean() + half)


def verdict(paper: float | None, ours: tuple[float, float, float]) -> str:
    """Of the rule of :func:`claims`."""
    _, low, high = ours
    if paper is None:
        return "not published"
    if abs(paper) < 5e-4:
        return "the paper finds no change"
    if not (low > 0 or high < 0) or low == high:
        return "not significant"
    return "agrees" if (low > 0) == (paper > 0) else "disagrees"


def published_difference(name: str, model: str, table1: Sequence[Row], table2: Sequence[Row]) -> float | None:
    """CYBORG minus cross-entropy in the paper's tables."""
    found = []
    for training in STRATEGIES:
        if name in TRANSFORMS:
            rows = [row for row in table2 if (row["model"], row["training"]) == (model, training)]
            found += [float(row[name]) for row in rows if name in row]
        elif name in MEASURES:
            row = published(name, model, training, table1)
            found += [float(row["total_mean"])] if row else []
    return found[1] - found[0] if len(found) == 2 else None


def published(name: str, model: str, training: str, table1: Sequence[Row]) -> Row | None:
    """The row of the paper's Table 1."""
    measure, variant, _ = MEASURES[name]
    wanted = {"measure": measure, "variant": variant, "training": training, "model": model}
    return next((row for row in table1 if wanted.items() <= row.items()), None)


def measure_table(runs: pd.DataFrame, table1: Sequence[Row]) -> Table:
    """A row a measure and detector: mean and deviation over images and runs, ours beside theirs."""
    rows = []
    for name, (_, _, key) in MEASURES.items():
        for model, training in DETECTORS:
            theirs = published(name, model, training, table1)
            ours = of_sources(runs, f"{model}-{training}", key)
            cells = []
            for value, column in zip(ours, ("ffhq", "synthetic", "total"), strict=True):
                cells.append(value)
                cells.append(f"{theirs[f'{column}_mean']} ± {theirs[f'{column}_std']}" if theirs else "-")
            rows.append([name, f"{model}-{training}", *cells])
    columns = ["FFHQ", "paper", "StyleGAN 1 to 3", "paper: synthetic", "total", "paper: total"]
    return ["measure", "detector", *columns], rows


def of_sources(runs: pd.DataFrame, detector: str, key: Key) -> tuple[str, str, str]:
    """Real, fake and total, mean and deviation, each source of a class with the same weight."""
    found = of_key(runs, detector, key)
    parts = {
        source: (part["mean"].mean(), (part["std"] ** 2 + part["mean"] ** 2).mean())
        for source, part in found.groupby("source")
    }
    fakes = [parts[source] for source in FAKES if source in parts]
    real, fake = np.array(parts[REAL]), np.mean(fakes, axis=0)
    return tuple(_mean_std(*moments) for moments in (real, fake, REAL_SHARE * real + (1 - REAL_SHARE) * fake))  # type: ignore[return-value]


def _mean_std(mean: float, square: float) -> str:
    return "-" if mean != mean else f"{mean:.3f} ± {max(square - mean**2, 0) ** 0.5:.3f}"


def transform_table(runs: pd.DataFrame, table2: Sequence[Row]) -> Table:
    """A row a detector: ours by group of transforms and theirs."""
    rows = []
    for model, training in DETECTORS:
        found = [of_sources(runs, f"{model}-{training}", key)[2] for key in TRANSFORMS.values()]
        theirs = next(row for row in table2 if (row["training"], row["model"]) == (training, model))
        groups = [name for name in TRANSFORMS if name in theirs]
        rows.append([f"{model}-{training}", *found, *(theirs[group] for group in groups)])
    return ["detector", *TRANSFORMS, *(f"paper: {group}" for group in groups)], rows


def chance_table(measures: Sequence[Row]) -> Table:
    """A row a measure and detector: what the paper does not give."""
    rows = []
    conditions = {name: key for name, (_, _, key) in MEASURES.items()} | SPATIAL
    conditions |= {name: key for name, key in TRANSFORMS.items() if "_" not in name}
    for name, key in conditions.items():
        for model, training in DETECTORS:
            row = find(measures, f"{model}-{training}", key)
            dead = f"{float(row['dead_share']):.1%}" if row["dead_share"] else "-"
            cells = [row["num_images"], dead, f"{number(row['mean'])} {limits(row)}"]
            if key[0] == "entropy":
                rows.append([name, f"{model}-{training}", *cells, *"-----"])
                continue
            fixed = find(measures, f"{model}-{training}", (key[0], "fixed", key[2]))
            kept = f"{float(row['kept_share']):.0%}" if row["kept_share"] else "-"
            cells += [number(fixed["mean"]), kept, number(row["chance"]), corrected(row), corrected(fixed)]
            rows.append([name, f"{model}-{training}", *cells])
    names = ["measure", "detector", "images", "dead", "mean", "fixed class", "kept", "chance", "above chance"]
    return [*names, "above chance, fixed class"], rows


def find(measures: Sequence[Row], detector: str, key: Key) -> Row:
    """The row of summary/measures over all images."""
    names = ("measure", "variant", "condition")
    found = [row for row in measures if row["detector"] == detector and tuple(row[name] for name in names) == key]
    return next(
        row for row in found if (row["label"], row["source"]) == ("all", "all") and row["similarity"] in ("", "ssim")
    )


def auroc_table(aurocs: pd.DataFrame) -> Table:
    """A row a pair of sources, a column a detector: mean over runs, its interval over images; first as in the paper."""
    rows = [["paper", "FFHQ", "", "", *(f"{PUBLISHED_AUROC[detector]:.2f}" for detector in DETECTORS)]]
    for score, words in (("released", "ranked as the authors do"), ("softmax", "ranked by probability")):
        means = [statistics.fmean(_auroc_values(aurocs, f"{m}-{t}", score)) for m, t in DETECTORS]
        rows.append(["mean of StyleGAN 1 to 3", "FFHQ", words, "", *(f"{mean:.3f}" for mean in means)])
    for positives, negatives, words in [*CONTRASTS, ("all", "all", "")]:
        pair = aurocs[(aurocs.positives == positives) & (aurocs.negatives == negatives) & (aurocs.score == "softmax")]
        pair = pair[pair.run == "mean"].set_index("detector")
        if not len(pair):
            continue
        cells = [f"{pair.auroc[d]:.3f} [{pair.ci_low[d]:.3f}, {pair.ci_high[d]:.3f}]" for d in map("-".join, DETECTORS)]
        counts = f"{pair.num_positive.iloc[0]} / {pair.num_negative.iloc[0]}"
        rows.append([positives, negatives, words, counts, *cells])
    return ["positives", "negatives", "", "images", *map("-".join, DETECTORS)], rows


def _auroc_values(aurocs: pd.DataFrame, detector: str, score: str) -> list[float]:
    """Of each run, the mean over the paper's generators against FFHQ."""
    found = aurocs[(aurocs.detector == detector) & (aurocs.score == score) & (aurocs.run != "mean")]
    found = found[(found.negatives == REAL) & found.positives.isin(FAKES)]
    return found.groupby("run").auroc.mean().to_list()


def called_table(shares: pd.DataFrame) -> Table:
    """A row a source: the share that each detector calls fake, mean over runs."""
    rows = []
    for (label, source), part in shares.groupby(["label", "source"], sort=False):
        means = part.groupby("detector").called_positive.mean()
        rows.append(
            [str(label), str(source), str(part.n.iloc[0]), *(f"{means[d]:.0%}" for d in map("-".join, DETECTORS))]
        )
    return ["label", "source", "images", *map("-".join, DETECTORS)], rows


def guide_table(rows: Sequence[Row]) -> Table:
    """A row a detector: likeness to the guide, each run apart."""
    found = []
    for detector in map("-".join, DETECTORS):
        of_it = [row for row in rows if row["detector"] == detector]
        cells = []
        for column in ("ssim", "pearson", "share_inside"):
            by_run = itertools.groupby(sorted(of_it, key=lambda row: row["run"]), key=lambda row: row["run"])
            cells.append(", ".join(_weighted(list(part), column) for _, part in by_run))
        found.append([detector, *cells])
    for row in rows:
        if not row["run"]:
            found.append([row["detector"], "-", "-", number(row["share_inside"])])
    return [
        "detector",
        "SSIM with the guide, each run",
        "Pearson",
        "share of the salience where the guide is above half",
    ], found


def _weighted(rows: Sequence[Row], column: str) -> str:
    known = [(float(row[column]), float(row["n"])) for row in rows if row[column]]
    count = sum(n for _, n in known)
    return f"{sum(value * n for value, n in known) / count:.3f}" if count else "-"


def training_table(trained: Sequence[Row]) -> Table:
    """A row a training: the epoch that was taken and its metrics, and those of the last one."""
    metrics = ["train_accuracy", "val_accuracy", "val_auroc"]
    names = ["detector", "run", "seed", "epochs", "best_epoch", *metrics, *(f"last_{name}" for name in metrics)]
    rows = [
        [number(row[name]) if "accuracy" in name or "auroc" in name else row[name] for name in names] for row in trained
    ]
    hours = [f"{float(row['seconds']) / 3600:.1f}" for row in trained]
    hashes = [row["weights_sha256"][:8] for row in trained]
    extended = [[*row, hour, weights] for row, hour, weights in zip(rows, hours, hashes, strict=True)]
    return [*names, "hours", "weights"], extended


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def in_words(found: tuple[float, float, float]) -> str:
    """As ``+0.123 [-0.001, +0.247]``."""
    mean, low, high = found
    return signed(mean) if low != low else f"{signed(mean)} [{signed(low)}, {signed(high)}]"


def signed(value: float | None) -> str:
    """Three decimals and the sign."""
    return "-" if value is None or value != value else f"{value:+.3f}"


def limits(row: Row) -> str:
    """As ``[0.701, 0.799]``."""
    return f"[{number(row['ci_low'])}, {number(row['ci_high'])}]"


def corrected(row: Row) -> str:
    """Chance-corrected, with its interval."""
    low, high = number(row["corrected_low"]), number(row["corrected_high"])
    return f"{number(row['corrected'])} [{low}, {high}]"


def number(text: str) -> str:
    """Three decimals, ``-`` where there is none."""
    return f"{float(text):.3f}" if text else "-"


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
