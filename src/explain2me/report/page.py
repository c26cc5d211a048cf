"""The page: one HTML file that opens from disk, loads nothing and runs only its own script."""

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from matplotlib.colors import Colormap
from PIL import Image

from explain2me.report.figures.drawing import Drawn
from explain2me.report.findings import RULES, TAGS, Finding, auroc_rows
from explain2me.report.material import Material, records
from explain2me.report.tables import Sheet, interval, number, share, training_in_words
from explain2me.run.schema import ALL
from explain2me.text import printable_line

MEANING = {
    "entropy": (
        "Does the detector look at something, or everywhere?",
        "0: all salience in one cell. 1: spread evenly. Lower is more focused; but a focused detector may look at the wrong "
        "place, so see the maps.",
    ),
    "noise": (
        "Does it look at the same place when the image is noisy?",
        "1: the map did not change. Higher is better, and only as far as it is above the chance level.",
    ),
    "resilience": (
        "Does its gaze follow the object when it is shifted, flipped or turned?",
        "1: the map, moved back, is the one before. Higher is better.",
    ),
    "focus": (
        "Is the region that the map marks the one that matters?",
        "With the salient region blurred the map should change (lower is better); with the rest blurred it should not (higher "
        "is better). AUROC should follow.",
    ),
    "stability": (
        "Do independently trained copies look at the same place?",
        "1: all training runs give the same map. Higher is better: a low value says that the next training may look elsewhere.",
    ),
}


TITLES = {"entropy": "Entropy", "noise": "Reaction to noise", "resilience": "Resilience to transforms"}


TITLES |= {"focus": "Focus", "stability": "Stability across training runs"}


THUMBNAIL = 144  # pixels a side
MOST_CELLS = 14  # a side; finer maps are averaged for the viewer
MOST_ROWS = 20_000  # images in the table


def render(
    material: Material,
    figures: Mapping[str, Sequence[tuple[Drawn, str]]],
    tables: Sequence[tuple[str, Sheet]],
    found: Sequence[Finding],
    colormap: Colormap,
) -> str:
    """The whole page.

    Args:
        material: what was read.
        figures: section -> figures, each with its picture as a data URI.
        tables: section and table.
        found: what the numbers say.
        colormap: of the maps in the viewer.
    """
    folder = files("explain2me.report")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(folder.joinpath("page.html.j2").read_text(encoding="utf-8"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        f"base-uri 'none'; form-action 'none'"
    )
    present = {score.measure for score in material.columns}
    return template.render(
        policy=policy,
        style=style,
        script=script,
        data=_json(viewer_data(material, colormap)),
        name=printable_line(material.run.config.name),
        positive=printable_line(material.run.config.data.positive),
        overview=_overview(material),
        training=[
            (printable_line(detector), training_in_words(told))
            for detector in material.detectors
            if (told := material.trained(detector))
        ],
        findings=found,
        tags=TAGS,
        rules=RULES,
        sections=[
            {"key": key, "title": TITLES[key], "question": MEANING[key][0], "reading": MEANING[key][1]}
            for key in MEANING
            if key in present
        ],
        absent=[TITLES[key] for key in MEANING if key not in present],
        figures=figures,
        tables=tables,
        labelled=bool(auroc_rows(material)),
        provenance=_provenance(material),
        sources=[
            (printable_line(s.label or "-"), printable_line(s.source), s.stop - s.start) for s in material.stretches
        ],
        quarantine=records(material.quarantine),
        precision=[
            row
            | {name: number(row[name]) for name in ("max_difference", "mean_difference")}
            | {name: row[name] if isinstance(row[name], str) else "-" for name in ("variant", "similarity")}
            for row in records(material.precision)
        ],
        num_images=len(material.run.image_table),
        shown_images=min(MOST_ROWS, len(material.run.image_table)),
    )


def _overview(material: Material) -> dict[str, Any]:
    """The table at the top: a row a detector, a column AUROC and each measure, with chance below it."""
    performance = auroc_rows(material)
    columns = [
        {"name": score.name, "better": "higher" if score.higher_is_better else "lower"} for score in material.columns
    ]
    rows = []
    for detector in material.detectors:
        cells = []
        for score in material.columns:
            row = material.totals(score.measure, score.variant, score.condition or ALL).get(detector)
            below = [] if row is None or score.measure == "entropy" else [f"chance {number(row['chance'])}"]
            if row is not None and row["dead_share"]:
                below.append(f"dead {share(row['dead_share'])}")
            cells.append(
                {
                    "value": number(row["mean"]) if row else "-",
                    "interval": interval(row["ci_low"], row["ci_high"]) if row else "-",
                    "below": below,
                }
            )
        found = performance.get(detector)
        rows.append(
            {
                "detector": printable_line(detector),
                "runs": len(material.run.models_of(detector)),
                "auroc": number(found["auroc"]) if found else "-",
                "auroc_interval": interval(found["ci_low"], found["ci_high"]) if found else "-",
                "cells": cells,
            }
        )
    return {"columns": columns, "rows": rows}


def viewer_data(material: Material, colormap: Colormap) -> dict[str, Any]:
    """What the script shows: a table of all images, and pictures and maps of the telling ones."""
    run, frame = material.run, material.scores
    table = run.image_table.slice(0, MOST_ROWS)
    columns = [{"key": s.key, "name": s.name} for s in material.columns]
    values = []
    for detector in material.detectors:
        rows = frame[frame.detector == detector].iloc[: len(table)]
        values.append(
            {
                "predicted": [int(v) for v in rows.predicted],
                "probability": _rounded(rows.probability),
                "kept": _rounded(rows.kept),
                "dead": [int(v) for v in material.dead[detector][: len(table)]],
                "scores": [_rounded(rows[score.key]) for score in material.columns],
            }
        )
    return {
        "detectors": [printable_line(name) for name in material.detectors],
        "classes": [printable_line(name) for name in run.classes],
        "labelled": material.labelled,
        "probable": printable_line(run.classes[material.positive_class]),
        "columns": columns,
        "images": {
            "id": [printable_line(v) for v in table["image_id"].to_pylist()],
            "label": [printable_line(v or "-") for v in table["label"].to_pylist()],
            "source": [printable_line(v) for v in table["source"].to_pylist()],
        },
        "values": values,
        "shown": [_shown(material, image) for image in dict.fromkeys(t.image for t in material.telling)],
        "telling": [
            {
                "image": t.image,
                "score": t.score,
                "why": t.why,
                "value": None if math.isnan(t.value) else round(t.value, 3),
            }
            for t in material.telling
        ],
        "conditions": [_in_words(condition.name) for condition in material.conditions()],
        "palette": (colormap(np.linspace(0, 1, 32))[:, :3] * 255).round().astype(int).ravel().tolist(),
    }


def _shown(material: Material, image: int) -> dict[str, Any]:
    """Picture and maps of one image: of the first run of each detector under all conditions, of the others clean."""
    pixels = material.pixels(image, material.run.models[0].input_size)
    row = material.run.image_table.slice(image, 1).to_pylist()[0]
    found: dict[str, Any] = {
        "image": image,
        "id": material.image_name(image),
        "label": printable_line(row["label"] or "-"),
        "source": printable_line(row["source"]),
        "picture": None if pixels is None else picture(pixels),
        "maps": [],
    }
    for detector in material.detectors:
        runs: list[dict[str, Any] | None] = []
        for number_, model in enumerate(material.run.models_of(detector)):
            part = material.part(detector, image, number_)
            if part is None:
                runs.append(None)
                continue
            maps = part.maps[:, 0] if number_ == 0 else part.maps[part.of("clean")]
            cells = [_cells(one) for one in maps]
            runs.append(
                {
                    "run": printable_line(model.run),
                    "size": list(cells[0][1]),
                    "cells": base64.b64encode(b"".join(c for c, _ in cells)).decode(),
                    "predicted": [int(v) for v in part.predicted[: len(cells), 0]],
                }
            )
        found["maps"].append(runs)
    return found


def _cells(found: np.ndarray) -> tuple[bytes, tuple[int, int]]:
    """A map as bytes 1..255 scaled min-max, 0 throughout where it is dead."""
    found = np.asarray(found, dtype=np.float64)
    height, width = found.shape
    if max(height, width) > MOST_CELLS:
        size = (min(width, MOST_CELLS), min(height, MOST_CELLS))
        found = np.asarray(Image.fromarray(found.astype(np.float32)).resize(size, Image.Resampling.BOX))
    if not np.isfinite(found).all() or found.max() <= 0:
        return bytes(found.size), (found.shape[0], found.shape[1])
    low, high = found.min(), found.max()
    scaled = (found - low) / (high - low) if high > low else np.ones_like(found)
    return (1 + (254 * scaled).round()).astype(np.uint8).tobytes(), (found.shape[0], found.shape[1])


def picture(pixels: np.ndarray, *, side: int = THUMBNAIL) -> str:
    """uint8 (3, H, W) as a small WebP in a data URI."""
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=70, method=4)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _provenance(material: Material) -> list[tuple[str, str]]:
    record, run = material.run.record, material.run
    versions = ", ".join(f"{name} {value}" for name, value in sorted(record.get("versions", {}).items()))
    git = record.get("git") or {}
    found = [
        ("Images", f"{len(run.image_table)} used of {record.get('num_listed', '?')} listed"),
        ("Classes, in the order of the logits", ", ".join(map(printable_line, run.classes))),
        ("Positive class", printable_line(run.config.data.positive)),
        ("Device and precision", f"{run.config.compute.device}, {run.config.compute.precision}"),
        ("Hardware", ", ".join(str(value) for value in (record.get("hardware") or {}).values())),
        ("Versions", versions),
        (
            "Commit of the folder it was run in",
            f"{git['commit']}{' with changes' if git.get('changed') else ''}" if git else "-",
        ),
        ("Hash of the list of images", str(record.get("listed", "-"))),
        ("Seed", str(run.config.seed)),
    ]
    found += [
        (f"Weights of {printable_line(m.detector)}, run {printable_line(m.run)}", f"{m.architecture}, sha256 {m.weights_sha256[:16]}…, "
         f"layer {m.layer}, input {m.input_size[0]}x{m.input_size[1]}")
        for m in run.models
    ]  # fmt: skip
    return [*found, ("Config", json.dumps(record["config"], sort_keys=True, ensure_ascii=False))]


def _rounded(values: Any) -> list[float | None]:
    return [None if value is None or math.isnan(value) else round(float(value), 3) for value in values]


def _in_words(condition: str) -> str:
    known = {"focus_salient": "salient region blurred", "focus_nonsalient": "rest blurred"}
    return known.get(condition, condition.replace("_", " "))


def _json(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
