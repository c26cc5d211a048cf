"""What the numbers say, in plain words. Pure: summary rows in, sentences out; every sentence follows from a stated rule."""

from explain2me.report.findings.chance import against_chance, aurocs, one_class
from explain2me.report.findings.comparisons import compare, number_of_comparisons, together
from explain2me.report.findings.data import absent, dead, few_cells, few_images, few_runs, not_drawn
from explain2me.report.findings.decisions import against_fixed, wrong_way
from explain2me.report.findings.kinds import TAGS, Finding
from explain2me.report.material import Material


def findings(material: Material) -> list[Finding]:
    """Everything that a reader should know before choosing, the most decisive first."""
    tables = material.tables
    sentences = [*aurocs(tables)]
    for score in tables.columns:
        rows = tables.totals(score)
        sentences += compare(score, rows, tables.pairs(score), tables.pairs(score, "fixed"))
        if score.compares:
            sentences += against_chance(score, rows)
    variants = [
        (score, tables.totals(score), tables.totals(score, "fixed")) for score in tables.columns if score.compares
    ]
    sentences += [
        *against_fixed(variants), *one_class(material), *wrong_way(tables), *few_runs(tables), *number_of_comparisons(tables),
        *dead(material), *few_images(tables), *few_cells(material), *not_drawn(tables), *absent(tables),
    ]  # fmt: skip
    order = list(TAGS)
    return sorted(together(sentences), key=lambda finding: order.index(finding.kind))
