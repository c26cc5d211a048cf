"""A process of its own in which the table of scores has three more measures, one of each kind; argument: a run folder.

The scores and summary tables of the new measures are copies of those of measures of the same kind, with other values.
Prints JSON: what the tables, figures, findings and the notebook have.
"""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from explain2me.statistics.scores import MEASURES, FigureRow, Score

COPIES = {"toy": "entropy", "tug": "focus", "pact": "stability"}
CONDITIONS = {"focus_salient": "tug_near", "focus_nonsalient": "tug_far"}


def main(folder: Path) -> None:
    """Add the rows, write the report, print what it has."""
    add_measures()  # before the config is imported, which has a field for each
    from rich.console import Console

    from explain2me import open_run
    from explain2me.report.figures.radar import radar_values
    from explain2me.report.material import gather
    from explain2me.report.notebook import style
    from explain2me.report.terminal import show_run
    from explain2me.report.write import KINDS, write_report

    KINDS["pdf"] = lambda figure, stream: None  # nobody reads them

    for path in (folder / "scores").glob("*.parquet"):
        pq.write_table(with_copies(pq.read_table(path, partitioning=None)), path)
    for name in ("measures", "differences"):
        path = folder / "summary" / f"{name}.parquet"
        pq.write_table(with_copies(pq.read_table(path)), path)
    for suffix in ("parquet", "csv"):
        shutil.copy(folder / "summary" / f"stability_matrix.{suffix}", folder / "summary" / f"pact_matrix.{suffix}")
    run = open_run(folder)
    findings: list = []
    write_report(run, run.config, on_findings=findings.extend)
    console = Console(file=io.StringIO(), width=200, color_system=None)
    show_run(run, console)
    material = gather(run, images_per_measure=1)
    print(
        json.dumps(
            {
                "terminal": console.file.getvalue(),
                "findings": [(finding.kind, finding.text) for finding in findings],
                "radar": radar_values(material.tables),
                "plots": dir(run.plot),
                "columns": list(material.scores.columns),
                "notebook": style(run.summary()).to_html(),
            }
        )
    )


def add_measures() -> None:
    """One measure of single maps, one of two opposite scores, one of pairs of runs."""
    MEASURES["toy"] = replace(
        MEASURES["entropy"], name="toy", title="Toy of maps", question="Is it a toy?", meaning="1: it is.",
        scores=(Score("toy", "toy", "clean", higher_is_better=True),), figures=(FigureRow("extremes", "toy-extremes", "Toys"),),
    )  # fmt: skip
    MEASURES["tug"] = replace(
        MEASURES["focus"], name="tug", title="Tug of war", question="Who pulls?", meaning="Near should be lower.", auroc=False, figures=(),
        scores=(
            Score("tug_near", "tug, near", "tug_near", higher_is_better=False, words="near end pulled"),
            Score("tug_far", "tug, far", "tug_far", higher_is_better=True, words="far end pulled"),
        ),
    )  # fmt: skip
    MEASURES["pact"] = replace(
        MEASURES["stability"], name="pact", title="Pact of runs", question="Do they agree?", meaning="1: they do.",
        scores=(Score("pact", "pact", "clean", higher_is_better=True),), figures=(FigureRow("runs", "pact-runs", "Runs in a pact"), FigureRow("matrices", "pact-matrix", "Agreement in a pact")),
    )  # fmt: skip


def with_copies(table: pa.Table) -> pa.Table:
    """The rows of a table, and a copy of those of each measure in COPIES under its new name."""
    tables = [table]
    for name, original in COPIES.items():
        rows = table.filter(pc.equal(table["measure"].cast(pa.string()), original))
        rows = renamed(renamed(rows, "measure", {original: name}), "condition", CONDITIONS)
        for column in (
            {"ci_low", "ci_high"} & set(rows.column_names) if name == "tug" and "mean" in rows.column_names else ()
        ):
            near = pc.equal(rows["condition"], "tug_near")  # in the wrong order
            values = pc.if_else(near, 0.9 if column == "ci_low" else 0.95, 0.1 if column == "ci_low" else 0.2)
            rows = rows.set_column(rows.schema.get_field_index(column), column, values)
            rows = rows.set_column(rows.schema.get_field_index("dead_share"), "dead_share", pa.array([0.0] * len(rows)))
        tables.append(rows)
    return pa.concat_tables(tables).unify_dictionaries()


def renamed(table: pa.Table, column: str, names: dict[str, str]) -> pa.Table:
    """A table with other words in one column."""
    field = table.schema.field(column)
    words = [names.get(word, word) for word in table[column].cast(pa.string()).to_pylist()]
    return table.set_column(table.schema.get_field_index(column), field, pa.array(words, pa.string()).cast(field.type))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
