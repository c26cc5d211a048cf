"""The page: one HTML file that opens from disk, loads nothing and runs only its own script."""

import base64
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from matplotlib.colors import Colormap

from explain2me.report.figures.drawing import Drawn
from explain2me.report.findings.kinds import RULES, TAGS, Finding
from explain2me.report.material import Material, drawn
from explain2me.report.page import viewer
from explain2me.report.sheets.sheet import Sheet, cut
from explain2me.report.summary import Tables
from explain2me.statistics.scores import CLEAN, MEASURES
from explain2me.text import printable_line

MOST_CELLS = 20_000
"""Of each table; a browser takes seconds to lay out more."""
MOST_OF_A_KIND = 500
"""Findings of each kind."""


def render(
    material: Material,
    figures: Mapping[str, Sequence[tuple[Drawn, str]]],
    sheets: Sequence[Sheet],
    findings: Sequence[Finding],
    colormap: Colormap,
) -> str:
    """The whole page; each figure has its picture as a data URI beside it."""
    folder = files("explain2me.report.page")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(folder.joinpath("page.html.j2").read_text(encoding="utf-8"))
    tables = material.tables
    num_images = len(tables.run.image_table)
    present = {score.measure for score in tables.columns}
    perturbed = [words for condition, words in tables.auroc_conditions().items() if condition != CLEAN]
    return template.render(
        policy=_policy(style, script),
        style=style,
        script=script,
        data=as_json(viewer.viewer_data(drawn(material), colormap)),
        name=printable_line(tables.run.config.name),
        positive=printable_line(tables.run.config.data.positive),
        findings=list(_first_of_each_kind(findings)),
        tags=TAGS,
        rules=RULES,
        measures=[measure for measure in MEASURES.values() if measure.name in present],
        absent=[measure.title for measure in MEASURES.values() if measure.name not in present],
        figures=figures,
        sheets=[cut(sheet, MOST_CELLS // len(sheet.columns), f"tables/{sheet.name}.csv") for sheet in sheets],
        labelled=bool(tables.aurocs()),
        perturbed=perturbed,
        provenance=_provenance(tables),
        num_images=num_images,
        shown_images=min(viewer.MOST_ROWS, num_images),
    )


def _first_of_each_kind(findings: Sequence[Finding]) -> Iterator[Finding]:
    """The findings, at most so many of each kind, and how many are left out."""
    for kind, of_kind in itertools.groupby(findings, lambda finding: finding.kind):
        some = list(of_kind)
        yield from some[:MOST_OF_A_KIND]
        if len(some) > MOST_OF_A_KIND:
            yield Finding(kind, f"And {len(some) - MOST_OF_A_KIND} more of this kind, in findings.md.")


def as_json(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _provenance(tables: Tables) -> list[tuple[str, str]]:
    record, run = tables.run.record, tables.run
    versions = ", ".join(f"{name} {value}" for name, value in sorted(record.get("versions", {}).items()))
    git = record.get("git") or {}
    commit = f"{git['commit']}{' with changes' if git.get('changed') else ''}" if git else "-"
    entries = [
        ("Images", f"{len(run.image_table)} used of {record.get('num_listed', '?')} listed"),
        ("Classes, in the order of the logits", ", ".join(map(printable_line, run.classes))),
        ("Positive class", printable_line(run.config.data.positive)),
        ("Device and precision", f"{run.config.compute.device}, {run.config.compute.precision}"),
        ("Hardware", ", ".join(str(value) for value in (record.get("hardware") or {}).values())),
        ("Versions", versions),
        ("Commit of the working folder", commit),
        ("Hash of the list of images", str(record.get("listed", "-"))),
        ("Seed", str(run.config.seed)),
    ]
    for model in run.models:
        title = f"Weights of {printable_line(model.detector)}, run {printable_line(model.run)}"
        weights, size = model.weights_sha256[:16], "x".join(map(str, model.input_size))
        entries.append((title, f"{model.architecture}, sha256 {weights}…, layer {model.layer}, input {size}"))
    return [*entries, ("Config", json.dumps(record["config"], sort_keys=True, ensure_ascii=False))]


def _policy(style: str, script: str) -> str:
    """Content-Security-Policy: nothing is loaded, and only this style and this script run."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    style_hash, script_hash = (f"'sha256-{digest}'" for digest in hashes)
    return f"default-src 'none'; img-src data:; style-src {style_hash}; script-src {script_hash}; base-uri 'none'; form-action 'none'"
