"""Sheets of the data: sources, training, images that could not be used, and precision."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from explain2me.report.formats import UNKNOWN, count, number
from explain2me.report.sheets.sheet import Column, Sheet, cells
from explain2me.report.summary import Tables, records
from explain2me.text import printable_line


def sources(tables: Tables) -> Sheet:
    """Number of images of each source."""
    lines = [cells(s.label or UNKNOWN, s.source, count(s.stop - s.start)) for s in tables.stretches]
    return Sheet("sources", "data", "Sources", tuple(map(Column, ("label", "source", "images"))), lines, 2)


def training(tables: Tables) -> Sheet:
    """How the runs of each detector were trained, where their cards are known."""
    texts = {name: dict(training_in_words(tables.trained(name))) for name in tables.detectors}
    columns = ("detector", *next(filter(None, texts.values()), ()))
    lines = [cells(name, *by_title.values()) for name, by_title in texts.items() if by_title]
    title = "How the detectors were trained, from the cards beside their weights"
    return Sheet("training", "data", title, tuple(map(Column, columns)), lines, len(columns))


def training_in_words(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(title, text) for each thing that is known of the training runs of one detector; none without runs."""
    if not runs:
        return []
    scores = {"AUROC": [run["val_auroc"] for run in runs], "accuracy": [run["val_accuracy"] for run in runs]}
    known = {name: values for name, values in scores.items() if any(value is not None for value in values)}
    validation = [f"{name} {', '.join(map(number, values))}" for name, values in known.items()]
    epochs = ", ".join(f"{run['taken']} of {run['epochs']}" for run in runs)
    if len({run["epochs"] for run in runs}) == 1:
        epochs = f"{', '.join(str(run['taken']) for run in runs)} of {runs[0]['epochs']}"
    texts = [
        ("loss", _distinct(run["loss"] for run in runs)),
        ("human maps", _distinct(run["human_maps"] for run in runs)),
        ("images to train on", _distinct(run["images"] for run in runs)),
        ("started from", _distinct(run["start"] for run in runs)),
        ("epoch taken", epochs),
        ("validation", "; ".join(validation) or "none"),
    ]
    return [(title, printable_line(text)) for title, text in texts]


def quarantine(tables: Tables) -> Sheet:
    """Images that could not be used."""
    lines = [cells(row["stage"], row["kind"], count(row["num_images"])) for row in records(tables.quarantine)]
    title = "Images that could not be used (quarantined)"
    return Sheet("quarantine", "data", title, tuple(map(Column, ("stage", "kind", "images"))), lines, 2)


def precision(tables: Tables) -> Sheet:
    """Deviation of the chosen precision from float32 on a sample of images."""
    lines = []
    for row in records(tables.precision):
        words = (row[name] if isinstance(row[name], str) else UNKNOWN for name in ("variant", "similarity"))
        numbers = (number(row["max_difference"]), number(row["mean_difference"]), count(row["num_one_sided"]))
        lines.append(cells(row["detector"], row["measure"], *words, *numbers))
    title = f"Deviation of {tables.run.config.compute.precision} from float32 on a sample of images"
    columns = ("detector", "measure", "variant", "similarity", "largest", "mean", "values in one only")
    note = "values in one only: values that exist in one of the two precisions only."
    return Sheet("precision", "data", title, tuple(map(Column, columns)), lines, 4, note)


def _distinct(texts: Iterable[object]) -> str:
    """What all runs share, or each of what they have."""
    return "; ".join(dict.fromkeys(map(str, texts)))
