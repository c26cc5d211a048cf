"""Set a finished study of examples/faces-study.toml beside the paper's numbers: the tables of faces.md.

python docs/results/faces.py runs/faces-study ../shared/reference

Copies summary/*.csv, writes training.csv, and writes the tables anew between the two marks of docs/results/faces.md;
the text around them is written by hand.
"""

import csv
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- tables begin -->", "<!-- tables end -->"
DETECTORS = [(model, training) for model in ("resnet50", "densenet121") for training in ("cross-entropy", "cyborg")]
MEASURES = {  # rows of Table 1: the paper's measure and variant, ours
    "entropy of the values": ("entropy", "", ("entropy", "intensity", "", "clean")),
    "noise, salt and pepper 0.05": ("noise", "salt_pepper", ("noise", "predicted", "ssim", "salt_pepper@0.05")),
    "focus, salient region blurred": ("focus", "salient_removed", ("focus", "predicted", "ssim", "focus_salient")),
    "focus, rest blurred": ("focus", "nonsalient_removed", ("focus", "predicted", "ssim", "focus_nonsalient")),
    "stability": ("stability", "", ("stability", "predicted", "ssim", "clean")),
}
PUBLISHED_AUROC = dict(zip(DETECTORS, (0.54, 0.63, 0.68, 0.68), strict=True))
"""In the text of the paper; one number a detector."""
Row = dict[str, str]


def main(study: Path, reference: Path, here: Path = HERE) -> None:
    """Write everything into the folder ``here``."""
    page = here / "faces.md"
    text = page.read_text(encoding="utf-8")
    if not (text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)):
        sys.exit(f"{page}: expected the lines {BEGIN} and {END} once each, in this order")
    collect(study, here / "faces")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{tables(here / 'faces', reference)}\n\n{END}{after}", encoding="utf-8")


def collect(study: Path, folder: Path) -> None:
    """The study's tables as CSV."""
    folder.mkdir(exist_ok=True)
    for path in sorted((study / "run" / "summary").glob("*.csv")):
        shutil.copyfile(path, folder / path.name)
    trained = list(_cards(study))
    with (folder / "training.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(trained[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(trained)


def tables(folder: Path, reference: Path) -> str:
    """The page's tables, of what is collected."""
    measures, performance = read(folder / "measures.csv"), read(folder / "performance.csv")
    table1, table2 = read(reference / "paper_table1.csv"), read(reference / "paper_table2.csv")
    parts = [
        "### Table 1: the measures",
        markdown(*measure_table(measures, table1)),
        "### The same with chance levels",
        markdown(*chance_table(measures)),
        "### Table 2: resilience to geometric transforms",
        markdown(*transform_table(measures, table2)),
        "### AUROC",
        markdown(*auroc_table(performance)),
        "### Training",
        "The loss of `cyborg` is half the cross-entropy and half the difference of the maps.",
        markdown(*training_table(read(folder / "training.csv"))),
    ]
    return "\n\n".join(parts)


def measure_table(measures: Sequence[Row], published: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A row a measure and detector: mean and deviation, ours beside theirs."""
    rows = []
    for name, (measure, variant, key) in MEASURES.items():
        for model, training in DETECTORS:
            wanted = {"measure": measure, "variant": variant, "training": training, "model": model}
            theirs = next((row for row in published if wanted.items() <= row.items()), None)
            cells = []
            for label, column in (("real", "ffhq"), ("fake", "synthetic"), ("all", "total")):
                cells.append(mean_std(find(measures, f"{model}-{training}", key, label)))
                cells.append(f"{theirs[f'{column}_mean']} ± {theirs[f'{column}_std']}" if theirs else "-")
            rows.append([name, f"{model}-{training}", *cells])
    columns = ["real", "paper: FFHQ", "fake", "paper: synthetic", "all", "paper: all"]
    return ["measure", "detector", *columns], rows


def chance_table(measures: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A row a measure and detector: what the paper does not give."""
    rows = []
    for name, (measure, _, key) in MEASURES.items():
        for model, training in DETECTORS:
            row = find(measures, f"{model}-{training}", key, "all")
            cells = [f"{number(row['mean'])} {interval(row)}"]
            if measure == "entropy":  # the default of explain2me is not what the paper's scripts compute
                spatial = find(measures, f"{model}-{training}", (measure, "spatial", *key[2:]), "all")
                rows.append(
                    [
                        "spatial entropy",
                        f"{model}-{training}",
                        f"{number(spatial['mean'])} {interval(spatial)}",
                        *"----",
                    ]
                )
                continue
            fixed = find(measures, f"{model}-{training}", (measure, "fixed", *key[2:]), "all")
            cells += [f"{float(row['kept_share']):.0%}", number(row["chance"]), corrected(row), corrected(fixed)]
            rows.append([name, f"{model}-{training}", *cells])
    return ["measure", "detector", "mean", "kept", "chance", "corrected", "corrected, fixed class"], rows


def transform_table(measures: Sequence[Row], published: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A row a detector: ours by group of transforms and theirs."""
    groups = ["shifts", "flips", "rotations"]
    rows = []
    for model, training in DETECTORS:
        found = [
            find(measures, f"{model}-{training}", ("resilience", "predicted", "ssim", group), "all") for group in groups
        ]
        theirs = next(row for row in published if (row["training"], row["model"]) == (training, model))
        rows.append([f"{model}-{training}", *map(mean_std, found), *(theirs[group] for group in groups)])
    return ["detector", *groups, *(f"paper: {group}" for group in groups)], rows


def auroc_table(performance: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A row a set of fakes (or of reals), a column a detector: mean over the runs and its interval."""
    wanted = [row for row in performance if (row["run"], row["condition"], row["score"]) == ("all", "clean", "softmax")]
    pairs = list(dict.fromkeys((row["positives"], row["negatives"]) for row in wanted))
    rows = [["paper: all fakes", "all reals", *(f"{PUBLISHED_AUROC[detector]:.2f}" for detector in DETECTORS)]]
    for positives, negatives in pairs:
        cells = []
        for model, training in DETECTORS:
            key = (f"{model}-{training}", positives, negatives)
            row = next(row for row in wanted if (row["detector"], row["positives"], row["negatives"]) == key)
            cells.append(f"{number(row['auroc'])} {interval(row)}")
        rows.append([f"{positives} fakes", f"{negatives} reals", *cells])
    return ["positives", "negatives", *(f"{model}-{training}" for model, training in DETECTORS)], rows


def training_table(trained: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """A row a training: the epoch that was taken and its metrics."""
    names = ["detector", "run", "epochs", "best_epoch", "train_loss", "train_accuracy", "val_accuracy", "val_auroc"]
    return names, [[row[name] for name in names] for row in trained]


def find(rows: Sequence[Row], detector: str, key: tuple[str, str, str, str], label: str) -> Row:
    """The row of summary/measures over all sources of a label."""
    names = ("measure", "variant", "similarity", "condition")
    found = [row for row in rows if row["detector"] == detector and tuple(row[name] for name in names) == key]
    return next(row for row in found if (row["label"], row["source"]) == (label, "all"))


def _cards(study: Path) -> Iterator[Row]:
    for path in sorted((study / "training").glob("*/run*/card.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        metrics = {name: f"{value:.4f}" for name, value in card["metrics"].items() if name != "epoch"}
        fields = {name: str(card[name]) for name in ("detector", "run", "epochs", "best_epoch", "seconds")}
        yield fields | metrics | {"weights_sha256": card["files"]["best.safetensors"]}


def read(path: Path) -> list[Row]:
    """Rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def mean_std(row: Row) -> str:
    """As ``0.812 ± 0.034``."""
    return f"{number(row['mean'])} ± {number(row['std'])}"


def interval(row: Row) -> str:
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
    main(Path(sys.argv[1]), Path(sys.argv[2]))
