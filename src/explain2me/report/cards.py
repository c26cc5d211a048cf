"""A model card of each detector in the format of the Hugging Face Hub, with the measures as metadata."""

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from explain2me.report.findings.kinds import TAGS, Finding, Rows
from explain2me.report.formats import UNKNOWN, count, interval, is_known, number, share
from explain2me.report.sheets.data import training_in_words
from explain2me.report.summary import AUROC, RunScore, Tables
from explain2me.text import printable_line

COLUMNS = ("measure", "better", "value", "95 % interval", "chance", "same class held fixed", "n", "dead")
MOST_TEXT = 2000
NOTHING = "Nothing stands out."


class _Numbers(NamedTuple):
    """Rows over all images by detector: of AUROC, and of each score as it is and with the class held fixed."""

    aurocs: Rows
    scores: Sequence[tuple[RunScore, Rows, Rows]]


def model_cards(tables: Tables, findings: Sequence[Finding]) -> Iterator[tuple[str, str]]:
    """The name of each detector and its card: Markdown with YAML metadata.

    Every value from the data is quoted as JSON, which YAML reads.
    """
    scores = [(score, tables.totals(score), tables.totals(score, "fixed")) for score in tables.columns]
    numbers = _Numbers(tables.aurocs(), scores)
    by_detector: dict[str, list[str]] = {name: [] for name in tables.detectors}
    for finding in findings:
        text = _text(finding)
        for name in by_detector.keys() & finding.detectors:
            by_detector[name].append(text)
    for name, texts in by_detector.items():
        yield name, _card(tables, name, numbers, texts or [NOTHING])


def _card(tables: Tables, detector: str, numbers: _Numbers, texts: Sequence[str]) -> str:
    run, models = tables.run, tables.run.models_of(detector)
    architecture = next(each.architecture for each in run.config.detectors if each.name == detector)
    classes = ", ".join(map(_markdown, run.classes))
    about = f"An image classifier ({_markdown(architecture)}), {len(models)} training run(s), classes in the order of the logits: {classes}."
    sources = ", ".join(f"{_markdown(s.source)} ({s.stop - s.start})" for s in tables.stretches)
    weights = [f"- run {_markdown(model.run)}: sha256 `{model.weights_sha256}`" for model in models]
    sections = {
        "Where it looks": _table(numbers, detector),
        "What to know": [f"- {text}" for text in texts],
        "Training": [f"- {title}: {_markdown(text)}" for title, text in training_in_words(tables.trained(detector))],
        "Data and weights": [f"Measured on {len(run.image_table)} images: {sources}.", "", *weights],
    }
    lines = [*_head(tables, detector, architecture, numbers), f"# {_markdown(detector)}", "", about, ""]
    for title, body in sections.items():
        lines += [f"## {title}", "", *body, ""] if body else []
    version = run.record.get("versions", {}).get("explain2me", "")
    return "\n".join([*lines, f"Measures: *Explain To Me* (arXiv 2303.11969), by explain2me {version}.", ""])


def findings_list(findings: Sequence[Finding]) -> str:
    """What the numbers say, as Markdown, the most decisive first."""
    lines = [f"- **{TAGS[finding.kind]}**: {_text(finding)}" for finding in findings]
    return "\n".join(["# What the numbers say", "", *(lines or [NOTHING]), ""])


def _head(tables: Tables, detector: str, architecture: str, numbers: _Numbers) -> list[str]:
    """Metadata between two lines of dashes."""
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": printable_line(tables.run.config.name), "type": "image-folder"},
        "metrics": [{"type": key, "name": name, "value": round(v, 6)} for key, name, v in _metrics(numbers, detector)],
    }
    head = {
        "library_name": architecture.partition(":")[0],
        "pipeline_tag": "image-classification",
        "tags": ["explainability", "salience", "explain2me"],
        "model-index": [{"name": printable_line(detector), "results": [result]}],
    }
    return ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()), "---", ""]


def _table(numbers: _Numbers, detector: str) -> list[str]:
    """A line for AUROC and each measure."""
    rows: list[tuple[str, ...]] = [COLUMNS, ("---",) * len(COLUMNS)]
    if auroc := numbers.aurocs.get(detector):
        value, limits = number(auroc["auroc"]), interval(auroc["ci_low"], auroc["ci_high"])
        rows.append((AUROC.name, AUROC.better, value, limits, number(0.5), UNKNOWN, count(auroc["n"]), UNKNOWN))
    for score, rows_of_score, fixed_rows in numbers.scores:
        row, fixed = rows_of_score.get(detector), fixed_rows.get(detector)
        if row:
            value, limits = number(row["mean"]), interval(row["ci_low"], row["ci_high"])
            held = number(fixed["mean"] if fixed else None)
            n, dead = count(row["n"]), share(row["dead_share"])
            rows.append((score.name, score.better, value, limits, number(row["chance"]), held, n, dead))
    return [f"| {' | '.join(row)} |" for row in rows]


def _metrics(numbers: _Numbers, detector: str) -> Iterator[tuple[str, str, float]]:
    """(type, title, value) of AUROC and of each measure."""
    if auroc := numbers.aurocs.get(detector):
        yield "roc_auc", AUROC.name, auroc["auroc"]
    for score, rows, _ in numbers.scores:
        row = rows.get(detector)
        if row and is_known(row["mean"]):
            yield f"explain2me_{score.key}", score.name, row["mean"]
            if is_known(row["corrected"]):
                yield f"explain2me_{score.key}_corrected", f"{score.name}, above chance", row["corrected"]


def _text(finding: Finding) -> str:
    return _markdown(finding.text, most=MOST_TEXT)


def _markdown(text: str, *, most: int = 300) -> str:
    """Text that Markdown and HTML leave alone, on one line."""
    text = printable_line(text, most).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{mark}" if mark in "\\`*_[]|#!" else mark for mark in text)
