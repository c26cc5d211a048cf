"""Limits of the data: few training runs or images, dead or coarse maps, and what is missing."""

from collections.abc import Iterator

from explain2me.images.examine import copies_warning
from explain2me.report.findings.kinds import Finding
from explain2me.report.formats import is_known, share
from explain2me.report.material import MOST_DETECTORS, MOST_SOURCES, Material
from explain2me.report.summary import LARGE_DEAD_SHARE, SOFTMAX, Tables
from explain2me.statistics.cells import FEW_CELLS
from explain2me.statistics.scores import ALL, CLEAN, MEASURES
from explain2me.text import printable_line

FEW_IMAGES = 0.5
"""Below this share of the images, a score is reported to be over few of them."""
OF_RUNS = {2: 50, 3: 75, 4: 79, 5: 84, 6: 86, 7: 87, 8: 88, 9: 89}
"""By number of training runs: per cent of the bootstrap intervals of one detector that contain the true mean, where only runs vary,
normally distributed."""
OF_PAIRS = {3: 50, 4: 74, 5: 78, 6: 81, 7: 82, 8: 85, 9: 86}
"""The same for means over pairs of runs; two runs are one pair, which cannot be resampled."""


def few_runs(tables: Tables) -> Iterator[Finding]:
    """A percentile bootstrap over few runs gives intervals that are too narrow; over one run it cannot show that."""
    if not tables.run.config.summary.bootstrap:
        return
    counts = {name: len(tables.run.models_of(name)) for name in tables.detectors}
    for count in sorted(set(counts.values())):
        names = [name for name in tables.detectors if counts[name] == count]
        owners = "each detector" if len(names) == len(counts) else ", ".join(names)
        if count == 1:
            text = f"1 training run of {owners}: its intervals say nothing about other training runs."
            yield Finding("runs", text, tuple(names))
        elif count in OF_RUNS:
            yield Finding("runs", f"{count} training runs of {owners}: {_too_narrow(count)}", tuple(names))


def _too_narrow(count: int) -> str:
    pairs = ", ".join(measure.name for measure in MEASURES.values() if measure.of_pairs)
    if count in OF_PAIRS:
        beside, exception = f" ({OF_PAIRS[count]} % of those of {pairs})", ""
    else:
        beside, exception = f"; those of {pairs} are over images only", f", except those of {pairs}"
    return (
        f"so few runs make the interval of a score too narrow. If only training runs varied, {OF_RUNS[count]} % of such intervals would "
        f"contain the true mean, not 95 %{beside}. The intervals of differences between detectors take this into account{exception}."
    )


def dead(material: Material) -> Iterator[Finding]:
    """Detectors with clean maps that show no evidence for the class."""
    for name in material.tables.detectors:
        total, number = material.num_clean[name], int(material.dead[name].sum())
        if not number:
            continue
        runs = material.dead_of_runs[name]
        by_run = f", by run: {', '.join(f'{run} {count}' for run, count in runs.items())}" if len(runs) > 1 else ""
        dead_share = number / max(total, 1)
        effect = " Its scores are over the other maps; do not compare them with those of other detectors."
        yield Finding(
            "dead",
            f"{number} of {total} clean maps of {name} ({share(dead_share)}) are dead{by_run}. They show no evidence for the class and are "
            f"in no mean.{effect if dead_share >= LARGE_DEAD_SHARE else ''}",
            (name,),
        )


def few_images(tables: Tables) -> Iterator[Finding]:
    """Scores and AUROCs over few of the images, mostly because the maps of the others are dead."""
    total = len(tables.run.image_table)
    for score in tables.columns:
        for name, row in tables.totals(score).items():
            if 0 < row["num_images"] < FEW_IMAGES * total:
                yield Finding(
                    "dead",
                    f"The {score.name} of {name} is over {row['num_images']} of {total} images, because the others have no value. It says "
                    f"nothing about them, and neither do its differences.",
                    (name,),
                )
    if len(tables.performance):
        yield from _few_perturbed_images(tables)


def _few_perturbed_images(tables: Tables) -> Iterator[Finding]:
    rows = tables.performance
    rows = rows[(rows.run != ALL) & (rows.score == SOFTMAX) & (rows.positives == ALL) & (rows.negatives == ALL)]
    perturbed = rows.condition.isin(set(tables.auroc_conditions()) - {CLEAN})
    for name in tables.detectors:
        clean = rows[(rows.detector == name) & (rows.condition == CLEAN)].n.max()
        least = rows[(rows.detector == name) & perturbed].n.min()  # NaN without perturbed images
        if least < FEW_IMAGES * clean:
            yield Finding(
                "dead",
                f"The AUROC of {name} on perturbed images is over {int(least)} of {int(clean)} images in one run, because the others "
                f"could not be perturbed by their maps. Do not compare it with that of other detectors.",
                (name,),
            )


def not_drawn(tables: Tables) -> Iterator[Finding]:
    """Detectors and sources of a large run that no figure shows."""
    limits = {"detectors": (MOST_DETECTORS, len(tables.detectors)), "sources": (MOST_SOURCES, len(tables.stretches))}
    if parts := [f"the first {most} of {count} {name}" for name, (most, count) in limits.items() if count > most]:
        text = f"Figures and the viewer of images show {' and '.join(parts)}; the tables, the findings and the model cards are of all."
        yield Finding("note", text)


def few_cells(material: Material) -> Iterator[Finding]:
    """Maps so coarse that a similarity of two maps is over a handful of numbers."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, size in material.map_sizes.items():
        groups.setdefault(size, []).append(name)
    for (height, width), names in groups.items():
        if height * width < FEW_CELLS:
            yield Finding(
                "note",
                f"The maps of {', '.join(names)} have {height} x {width} cells. They say little about where a model looks, and each similarity "
                f"is over {height * width} numbers. A larger input or an earlier layer gives finer maps.",
                tuple(names),
            )


def absent(tables: Tables) -> Iterator[Finding]:
    """Measures, labels, values, detectors and sources that are missing, and images that could not be used."""
    if missing := [name for name in MEASURES if name not in {score.measure for score in tables.columns}]:
        yield Finding("absent", f"Not measured in this run: {', '.join(missing)}.")
    yield from _no_auroc(tables)
    for score in tables.columns:
        rows = tables.totals(score)
        for name in tables.detectors:
            if name not in rows or not is_known(rows[name]["mean"]):
                reason = "no two maps of it can be compared" if score.compares else "all of its maps are dead"
                yield Finding("absent", f"There is no {score.name} of {name}: {reason}.", (name,))
    if len(tables.detectors) == 1:
        yield Finding("absent", "There is one detector, so nothing is compared.")
    if len(tables.stretches) == 1:
        yield Finding("absent", "All images come from one source, so the numbers say nothing about other sources.")
    if copied := copies_warning(tables.run.image_table):
        yield Finding("note", f"{printable_line(copied)}.")
    if len(tables.quarantine):
        count = int(tables.quarantine.num_images.sum())
        first = printable_line(tables.run.quarantine()["message"][0].as_py())
        images = "image" if count == 1 else "images"
        yield Finding("note", f"{count} {images} could not be used, first {first}. All are in the folder quarantine.")


def _no_auroc(tables: Tables) -> Iterator[Finding]:
    positive = tables.run.config.data.positive
    labels = set(tables.run.image_table["label"].to_pylist())
    if not tables.labelled:
        pairs = ", ".join(measure.name for measure in MEASURES.values() if measure.of_pairs)
        yield Finding("absent", f"The images have no labels, so there is no AUROC, and {pairs} has no fixed variant.")
    elif positive not in labels or len(labels) == 1:
        yield Finding("absent", f"There is no AUROC: all images have the same class, or none is {positive!r}.")
    else:
        aurocs = tables.aurocs()
        for name in (name for name in tables.detectors if name not in aurocs):
            reason = "no run of it has finite logits for images of both classes"
            yield Finding("absent", f"There is no AUROC of {name}: {reason}.", (name,))
