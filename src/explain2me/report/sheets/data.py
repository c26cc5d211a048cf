"""Sheets of the data: sources, training, images that could not be used, and precision."""

from collections.abc import Iterable, Mapping, Sequence

from explain2me.report.formats import UNKNOWN, count, number
from explain2me.report.sheets.sheet import Cell, Column, Sheet
from explain2me.report.summary import Tables, records
from explain2me.text import printable_line


def sources(tables: Tables) -> Sheet:
    """Number of images of each source."""
    lines = [
        tuple(map(Cell, (printable_line(s.label or UNKNOWN), printable_line(s.source), count(s.stop - s.start))))
        for s in tables.stretches
    ]
    return Sheet("sources", "data", "Sources", tuple(map(Column, ("label", "source", "images"))), lines, "", 2)


def training(tables: Tables) -> Sheet:
    """How the runs of each detector were trained, where their cards are known."""
    texts = {name: training_in_words(runs) for name in tables.detectors if (runs := tables.trained(name))}
    lines = [tuple(map(Cell, (printable_line(name), *(text for _, text in items)))) for name, items in texts.items()]
    titles = [title for title, _ in next(iter(texts.values()), ())]
    title = "How the detectors were trained, from the cards beside their weights"
    return Sheet("training", "data", title, tuple(map(Column, ("detector", *titles))), lines, "", 1 + len(titles))


def training_in_words(runs: Sequence[Mapping[str, object]]) -> list[tuple[str, str]]:
    """(title, text) for each thing that is known of the training runs of one detector.

    Args:
        runs: one for each training run, as :func:`explain2me.detectors.cards.trained` reads it.
    """
    scores = {"AUROC": [run["val_auroc"] for run in runs], "accuracy": [run["val_accuracy"] for run in runs]}
    validation = [
        f"{name} {', '.join(number(value) for value in values)}"  # type: ignore[arg-type]
        for name, values in scores.items()
        if any(value is not None for value in values)
    ]
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
    lines = [
        tuple(map(Cell, (row["stage"], row["kind"], count(row["num_images"])))) for row in records(tables.quarantine)
    ]
    lines = [tuple(Cell(printable_line(cell.text)) for cell in line) for line in lines]
    title = "Images that could not be used (quarantined)"
    return Sheet("quarantine", "data", title, tuple(map(Column, ("stage", "kind", "images"))), lines, "", 2)


def precision(tables: Tables) -> Sheet:
    """Deviation of the chosen precision from float32 on a sample of images."""
    lines = []
    for row in records(tables.precision):
        labels = [
            printable_line(row["detector"]),
            row["measure"],
            *(_word(row[name]) for name in ("variant", "similarity")),
        ]
        numbers = [number(row["max_difference"]), number(row["mean_difference"]), count(row["num_one_sided"])]
        lines.append(tuple(map(Cell, (*labels, *numbers))))
    title = f"Deviation of {tables.run.config.compute.precision} from float32 on a sample of images"
    columns = ("detector", "measure", "variant", "similarity", "largest", "mean", "values in one only")
    note = "values in one only: values that exist in one of the two precisions only."
    return Sheet("precision", "data", title, tuple(map(Column, columns)), lines, note, 4)


def _distinct(texts: Iterable[object]) -> str:
    """What all runs share, or each of what they have."""
    return "; ".join(dict.fromkeys(map(str, texts)))


def _word(value: object) -> str:
    return value if isinstance(value, str) else UNKNOWN
