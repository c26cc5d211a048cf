"""The tables of a run on the terminal: whole at any width, and without control characters."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from shown import shown

from explain2me import open_run
from explain2me.report.findings.kinds import TAGS
from explain2me.report.terminal import MOST_FINDINGS, show_findings
from explain2me.run.folder import Run
from explain2me.text import printable

WriteConfig = Callable[..., Path]


EVIL = "\x1b[2J\x1b]0;evil\x07\x9b31m"


@pytest.fixture
def run(finished_run: Run) -> Run:
    return finished_run


def test_a_source_of_one_image_and_one_run_is_shown_without_std(
    write_config: WriteConfig, make_images: Callable[..., Path], weights: Path, detector_table: Callable[..., str],
    tmp_path: Path, run_stages: Callable[..., Run],
) -> None:  # fmt: skip
    manifest = make_images(tmp_path / "few", counts={("real", "camera"): 3, ("fake", "gan"): 1})
    config = write_config(
        data=f'manifest = "{manifest}"', detectors=detector_table("solo", f"{weights}/seed0.safetensors")
    )
    run = run_stages(config, tmp_path / "run", "measures.stability=false", "measures.focus=false")
    summary = run.summary().to_pandas()
    row = summary[(summary.source == "gan") & (summary.condition == "all") & (summary.variant == "predicted")].iloc[0]
    assert (row.n, row.num_values) == (1, 12)
    assert np.isnan(row["std"])
    text = shown(run)
    by_source = text[text.index("By source") : text.index("Resilience by transform")]
    assert "gan" in by_source
    assert f"{row['mean']:.3f}" in by_source
    assert f"{row['mean']:.3f} ±" not in by_source


def test_every_cell_by_source_has_its_chance_level_and_share_of_dead_maps(run: Run) -> None:
    summary = run.summary().to_pandas()
    row = summary[(summary.measure == "noise") & (summary.variant == "predicted") & (summary.source == "gan_a")].iloc[0]
    text = shown(run)
    below = text[text.index("By source") : text.index("Resilience by transform")].splitlines()
    at = next(i for i, line in enumerate(below) if line.strip().startswith("noise"))
    assert f"{row['mean']:.3f} ± {row['std']:.3f}" in below[at]
    assert below[at + 1].split()[:2] == ["chance,", "dead"]
    assert f"{row.chance:.3f}, " in below[at + 1]
    assert below[at + 1].count(" %") == 5
    entropy = next(i for i, line in enumerate(below) if line.strip().startswith("entropy"))
    assert below[entropy + 1].split()[0] == "dead"
    table = text[text.index("Resilience by transform") : text.index("AUROC (softmax)")]
    group = summary[(summary.condition == "flips") & (summary.variant == "predicted") & (summary.label == "all")]
    assert f"{group.chance.item():.3f}, " in table


@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_number_is_cut_at_any_width(run: Run, width: int) -> None:
    text = shown(run, width)
    by_source = text[text.index("By source") : text.index("Resilience by transform")]
    assert "…" not in text[: text.index("AUROC (softmax)")]
    assert max(map(len, text.splitlines())) <= width
    summary = run.summary().to_pandas()
    for row in summary[(summary.source == "gan_b") & (summary.measure == "focus")].itertuples():
        assert f"{row.mean:.3f} ± {row.std:.3f}" in by_source


def test_no_control_character_reaches_the_terminal(copied_run: Run) -> None:
    folder = copied_run.folder
    rows = [{"stage": f"x{EVIL}", "kind": EVIL, "num_images": 1}]
    schema = copied_run.summary("quarantine").schema
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "summary" / "quarantine.parquet")
    for path in [folder / "images.parquet", *(folder / "summary").glob("*.parquet")]:
        table = pq.read_table(path, partitioning=None)
        for name in {"source", "label", "detector", "positives", "negatives", "run"} & set(table.column_names):
            words = [word if word in ("all", None) else f"{word}{EVIL}" for word in table[name].to_pylist()]
            index = table.schema.get_field_index(name)
            table = table.set_column(index, table.schema.field(index), pa.array(words, table.schema.field(index).type))
        pq.write_table(table, path)
    text = shown(open_run(folder))
    assert [char for char in text if not char.isprintable() and char != "\n"] == []
    assert "\\x1b[2J\\x1b]0;evil\\x07\\x9b31m" in text
    assert printable("a\x1b\x9b\u202e\nb") == "a\\x1b\\x9b\\u202e\\nb"


def test_findings_are_printed_most_decisive_first_and_not_without_end():
    def shown(found):
        console = Console(file=io.StringIO(), width=80)
        show_findings([(TAGS[kind], text) for kind, text in found], console)
        return [line.rstrip() for line in console.file.getvalue().splitlines()]

    assert shown([]) == ["What the numbers say", "  Nothing stands out."]
    kinds = list(TAGS)
    found = [(kinds[i % len(kinds)], f"number {i} of [red]x[/red] \x1b[2J") for i in range(MOST_FINDINGS)]
    lines = shown(found)
    assert lines[1] == r"  no reason to choose: number 0 of [red]x[/red] \x1b[2J"
    assert len(lines) == MOST_FINDINGS + 1
    assert shown([*found, *found[:3]]) == [*lines, "  and 3 more, in the report"]
    assert {line[:2] for line in shown([("note", "word " * 40)])[1:]} == {"  "}
