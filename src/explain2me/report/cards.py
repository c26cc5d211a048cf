"""A model card of each detector in the format of the Hugging Face Hub, with the measures as metadata."""

import json
from collections.abc import Sequence
from typing import Any

from explain2me.report.findings import TAGS, Finding, auroc_rows
from explain2me.report.material import Material
from explain2me.report.tables import interval, number, share, training_in_words
from explain2me.run.schema import ALL
from explain2me.text import printable_line


def model_card(material: Material, detector: str, findings: Sequence[Finding]) -> str:
    """The card as Markdown with YAML metadata; every value from the data is quoted as JSON, which YAML reads."""
    metrics = list(_metrics(material, detector))
    wanted = next(d for d in material.run.config.detectors if d.name == detector)
    name = printable_line(detector)
    head = {
        "library_name": wanted.architecture.partition(":")[0],
        "pipeline_tag": "image-classification",
        "tags": ["explainability", "salience", "explain2me"],
        "model-index": [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": printable_line(material.run.config.name), "type": "image-folder"},
                        "metrics": [
                            {"type": kind, "name": title, "value": round(value, 6)} for kind, title, value in metrics
                        ],
                    }
                ],
            }
        ],
    }
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()), "---", ""]
    runs = material.run.models_of(detector)
    lines += [f"# {_markdown(name)}", ""]
    lines += [f"An image classifier ({_markdown(wanted.architecture)}), {len(runs)} training run(s), classes in the order of the "
              f"logits: {', '.join(_markdown(printable_line(c)) for c in material.run.classes)}.", ""]  # fmt: skip
    lines += [
        "## Where it looks",
        "",
        "| measure | better | value | 95 % interval | chance | same class held fixed | n | dead |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(line) + " |" for line in _rows(material, detector)]
    said = [finding.text for finding in findings if detector in finding.detectors]
    lines += [
        "",
        "## What to know",
        "",
        *(f"- {_markdown(printable_line(text, most=2000))}" for text in said or ["Nothing stands out."]),
    ]
    told = material.trained(detector)
    if told:
        lines += ["", "## Training", ""]
        lines += [f"- {title}: {_markdown(text)}" for title, text in training_in_words(told)]
    lines += ["", "## Data and weights", ""]
    counts = [f"{_markdown(printable_line(s.source))} ({s.stop - s.start})" for s in material.stretches]
    lines += [f"Measured on {len(material.run.image_table)} images: {', '.join(counts)}.", ""]
    lines += [f"- run {_markdown(printable_line(model.run))}: sha256 `{model.weights_sha256}`" for model in runs]
    lines += ["", "Measures: *Explain To Me* (arXiv 2303.11969), by explain2me "
              f"{material.run.record.get('versions', {}).get('explain2me', '')}.", ""]  # fmt: skip
    return "\n".join(lines)


def findings_list(findings: Sequence[Finding]) -> str:
    """What the numbers say, as Markdown, most decisive first."""
    lines = [
        f"- **{TAGS[finding.kind]}**: {_markdown(printable_line(finding.text, most=2000))}" for finding in findings
    ]
    return "\n".join(["# What the numbers say", "", *(lines or ["Nothing stands out."]), ""])


def _rows(material: Material, detector: str) -> list[tuple[str, ...]]:
    """A line of the table for AUROC and each measure."""
    lines: list[tuple[str, ...]] = []
    found = auroc_rows(material).get(detector)
    if found:
        limits = interval(found["ci_low"], found["ci_high"])
        lines.append(("AUROC", "higher", number(found["auroc"]), limits, "0.500", "-", str(found["n"]), "-"))
    for score in material.columns:
        row = material.totals(score.measure, score.variant, score.condition or ALL).get(detector)
        fixed = material.totals(score.measure, "fixed", score.condition or ALL).get(detector)
        if row:
            better = "higher" if score.higher_is_better else "lower"
            held = number(fixed["mean"]) if fixed else "-"
            limits = interval(row["ci_low"], row["ci_high"])
            lines.append(
                (
                    score.name,
                    better,
                    number(row["mean"]),
                    limits,
                    number(row["chance"]),
                    held,
                    str(row["n"]),
                    share(row["dead_share"]),
                )
            )
    return lines


def _metrics(material: Material, detector: str) -> list[tuple[str, str, float]]:
    """(type, title, value) of AUROC and of each measure."""
    found: list[tuple[str, str, float]] = []
    row: dict[str, Any] | None = auroc_rows(material).get(detector)
    if row:
        found.append(("roc_auc", "AUROC", row["auroc"]))
    for score in material.columns:
        row = material.totals(score.measure, score.variant, score.condition or ALL).get(detector)
        if row and number(row["mean"]) != "-":
            found.append((f"explain2me_{score.key}", score.name, row["mean"]))
            if number(row["corrected"]) != "-":
                found.append((f"explain2me_{score.key}_corrected", f"{score.name}, above chance", row["corrected"]))
    return found


def _markdown(text: str) -> str:
    """Text that Markdown and HTML leave alone."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{mark}" if mark in "\\`*_[]|#!" else mark for mark in text)
