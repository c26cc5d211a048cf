"""A model card of each detector in the format of the Hugging Face Hub, with the measures as metadata."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from explain2me.report.findings import TAGS, Finding
from explain2me.report.formats import UNKNOWN, count, interval, is_known, number, share
from explain2me.report.material import Material
from explain2me.report.sheets import training_in_words
from explain2me.report.summary import AUROC, Tables
from explain2me.text import printable_line

COLUMNS = ("measure", "better", "value", "95 % interval", "chance", "same class held fixed", "n", "dead")
MOST_TEXT = 2000
NOTHING = "Nothing stands out."


def model_card(material: Material, detector: str, findings: Sequence[Finding]) -> str:
    """The card as Markdown with YAML metadata; every value from the data is quoted as JSON, which YAML reads."""
    tables = material.tables
    texts = [_text(finding) for finding in findings if detector in finding.detectors] or [NOTHING]
    trainings = tables.trained(detector)
    sections = [
        ("Where it looks", _table(tables, detector)),
        ("What to know", [f"- {text}" for text in texts]),
        (
            "Training",
            [f"- {title}: {_markdown(text)}" for title, text in training_in_words(trainings)] if trainings else [],
        ),
        ("Data and weights", _data(tables, detector)),
    ]
    lines = [*_head(tables, detector), f"# {_markdown(printable_line(detector))}", "", _about(tables, detector), ""]
    for title, body in sections:
        lines += [f"## {title}", "", *body, ""] if body else []
    version = tables.run.record.get("versions", {}).get("explain2me", "")
    return "\n".join([*lines, f"Measures: *Explain To Me* (arXiv 2303.11969), by explain2me {version}.", ""])


def findings_list(findings: Sequence[Finding]) -> str:
    """What the numbers say, as Markdown, the most decisive first."""
    lines = [f"- **{TAGS[finding.kind]}**: {_text(finding)}" for finding in findings]
    return "\n".join(["# What the numbers say", "", *(lines or [NOTHING]), ""])


def _head(tables: Tables, detector: str) -> list[str]:
    """Metadata between two lines of dashes."""
    metrics = [
        {"type": kind, "name": title, "value": round(value, 6)} for kind, title, value in _metrics(tables, detector)
    ]
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": printable_line(tables.run.config.name), "type": "image-folder"},
        "metrics": metrics,
    }
    head = {
        "library_name": _architecture(tables, detector).partition(":")[0],
        "pipeline_tag": "image-classification",
        "tags": ["explainability", "salience", "explain2me"],
        "model-index": [{"name": printable_line(detector), "results": [result]}],
    }
    return ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()), "---", ""]


def _about(tables: Tables, detector: str) -> str:
    classes = ", ".join(_markdown(printable_line(name)) for name in tables.run.classes)
    return (
        f"An image classifier ({_markdown(_architecture(tables, detector))}), {len(tables.run.models_of(detector))} training run(s), "
        f"classes in the order of the logits: {classes}."
    )


def _architecture(tables: Tables, detector: str) -> str:
    return next(each.architecture for each in tables.run.config.detectors if each.name == detector)


def _table(tables: Tables, detector: str) -> list[str]:
    """A line for AUROC and each measure."""
    rows: list[tuple[str, ...]] = [COLUMNS, ("---",) * len(COLUMNS)]
    auroc = tables.aurocs().get(detector)
    if auroc:
        limits = interval(auroc["ci_low"], auroc["ci_high"])
        rows.append(
            (AUROC.name, AUROC.better, number(auroc["auroc"]), limits, number(0.5), UNKNOWN, count(auroc["n"]), UNKNOWN)
        )
    for score in tables.columns:
        row, fixed = tables.totals(score).get(detector), tables.totals(score, "fixed").get(detector)
        if row:
            rows.append(
                (
                    score.name, score.better, number(row["mean"]), interval(row["ci_low"], row["ci_high"]), number(row["chance"]),
                    number(fixed["mean"]) if fixed else UNKNOWN, count(row["n"]), share(row["dead_share"]),
                )
            )  # fmt: skip
    return [f"| {' | '.join(row)} |" for row in rows]


def _metrics(tables: Tables, detector: str) -> Iterator[tuple[str, str, float]]:
    """(type, title, value) of AUROC and of each measure."""
    row: dict[str, Any] | None = tables.aurocs().get(detector)
    if row:
        yield "roc_auc", AUROC.name, row["auroc"]
    for score in tables.columns:
        row = tables.totals(score).get(detector)
        if row and is_known(row["mean"]):
            yield f"explain2me_{score.key}", score.name, row["mean"]
            if is_known(row["corrected"]):
                yield f"explain2me_{score.key}_corrected", f"{score.name}, above chance", row["corrected"]


def _data(tables: Tables, detector: str) -> list[str]:
    sources = [f"{_markdown(printable_line(s.source))} ({s.stop - s.start})" for s in tables.stretches]
    models = tables.run.models_of(detector)
    return [
        f"Measured on {len(tables.run.image_table)} images: {', '.join(sources)}.",
        "",
        *(f"- run {_markdown(printable_line(model.run))}: sha256 `{model.weights_sha256}`" for model in models),
    ]


def _text(finding: Finding) -> str:
    return _markdown(printable_line(finding.text, most=MOST_TEXT))


def _markdown(text: str) -> str:
    """Text that Markdown and HTML leave alone."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{mark}" if mark in "\\`*_[]|#!" else mark for mark in text)
