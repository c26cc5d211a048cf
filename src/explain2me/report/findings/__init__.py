"""What the numbers say, in plain words. Pure: summary rows in, sentences out; every sentence follows from a stated rule."""

from explain2me.report.findings.chance import against_chance, aurocs, one_class
from explain2me.report.findings.comparisons import compare, number_of_comparisons, together
from explain2me.report.findings.data import OF_PAIRS, OF_RUNS, absent, dead, few_cells, few_images, few_runs
from explain2me.report.findings.decisions import against_fixed, wrong_way
from explain2me.report.findings.kinds import RULES, TAGS, Finding, Kind, Rows, sign
from explain2me.report.material import Material
from explain2me.report.summary import RunScore

__all__ = [
    "OF_PAIRS",
    "OF_RUNS",
    "RULES",
    "TAGS",
    "Finding",
    "Kind",
    "against_chance",
    "against_fixed",
    "compare",
    "findings",
    "sign",
]


def findings(material: Material) -> list[Finding]:
    """Everything that a reader should know before choosing, the most decisive first."""
    tables = material.tables
    sentences = [*aurocs(tables)]
    variants: list[tuple[RunScore, Rows, Rows]] = []
    for score in tables.columns:
        rows = tables.totals(score)
        sentences += compare(score, rows, tables.pairs(score), tables.pairs(score, "fixed"))
        if score.compares:
            sentences += against_chance(score, rows)
            variants.append((score, rows, tables.totals(score, "fixed")))
    sentences += [*against_fixed(variants), *one_class(material), *wrong_way(tables), *few_runs(tables)]
    sentences += [
        *number_of_comparisons(tables),
        *dead(material),
        *few_images(tables),
        *few_cells(material),
        *absent(tables),
    ]
    order = list(TAGS)
    return sorted(together(sentences), key=lambda finding: order.index(finding.kind))
