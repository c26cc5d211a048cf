"""`explain2me measure`, `summarise`, `report` and `show`: commands on a run folder."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from explain2me.cli.console import make_console, print_line, progress_bar
from explain2me.cli.options import RunFolder, set_option

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from explain2me.config.schema import Config
    from explain2me.report.findings.kinds import Finding
    from explain2me.run.folder import Run


def measure(
    run: RunFolder, sets: Annotated[list[str] | None, set_option('measures.similarity=["ssim","pearson"]')] = None
) -> None:
    """Stage 2: score the maps of RUN, one row per image, measure and condition."""
    from explain2me.run.folder import open_run

    opened = open_run(run)
    config = _override(opened, "measure", sets or [])
    from explain2me.detectors.runs import refuse_single_runs

    for detector in config.detectors:  # measures of pairs that --set has turned on
        num_runs = len(opened.models_of(detector.name))
        count = f"{detector.name!r} has {num_runs}"
        refuse_single_runs(config.measures, num_runs, count=count, remedy="start a new run with more checkpoints")
    console = make_console()
    measure_scores(opened, config, console)
    print_line(console, f"scored; call `explain2me summarise {run}` to bring the tables up to date")


def summarise(run: RunFolder, sets: Annotated[list[str] | None, set_option("summary.bootstrap=2000")] = None) -> None:
    """Stage 3: tables from the scores of RUN, with intervals and chance levels."""
    from explain2me.run.folder import open_run

    opened = open_run(run)
    summarise_scores(opened, _override(opened, "summarise", sets or []), make_console())


def report(run: RunFolder, sets: Annotated[list[str] | None, set_option("report.images=8")] = None) -> None:
    """Stage 4: write RUN/report: a page to decide from, figures and tables for a paper, model cards."""
    from explain2me.run.folder import open_run

    opened = open_run(run)
    write_page(opened, _override(opened, "report", sets or []), make_console())


def show(
    run: RunFolder,
    brief: Annotated[bool, typer.Option("--brief", help="Only the measures over all sources, and AUROC.")] = False,
) -> None:
    """Print the tables of RUN in the paper's layout."""
    from explain2me.report.terminal import show_run
    from explain2me.run.folder import open_run

    shown = open_run(run)
    if shown.summary_is_old():
        print("explain2me: these tables are of earlier scores; call `explain2me summarise` first", file=sys.stderr)
    show_run(shown, make_console(), brief=brief)


def _override(run: "Run", stage: str, sets: list[str]) -> "Config":
    """The config of a run with ``--set`` applied; a change that the stage does not read is refused."""
    from explain2me.config.compare import ENGINE_FIELDS, MEASURING_FIELDS, flat
    from explain2me.config.load import override
    from explain2me.errors import ConfigError

    config = override(run.config, sets)
    stages = {"measures": "measure", "compute": "measure", "summary": "summarise", "report": "report"}
    own = {".".join(field): stages[field[0]] for field in (*MEASURING_FIELDS, *ENGINE_FIELDS)}
    before, after = flat(run.config.model_dump()), flat(config.model_dump())
    for key in before | after:
        reader = next((own[field] for field in own if f"{key}.".startswith(f"{field}.")), None)
        if reader == stage or before.get(key) == after.get(key):
            continue
        names = {item: item.partition("=")[0].strip() for item in sets}
        typed = next((item for item, name in names.items() if name.startswith(key) or key.startswith(name)), key)
        todo = f"give it to `explain2me {reader}`, or start a new run with it"
        if reader is None:
            todo = "start a new run: `explain2me run CONFIG --out NEW` with it"
        known = ", ".join(field for field, user in own.items() if user == stage)
        raise ConfigError(
            f"--set {typed}: `explain2me {stage}` does not read it and can change only {known} of a run; {todo}"
        )
    return config


def measure_scores(run: "Run", config: "Config", console: "Console") -> None:
    """Run stage 2 under a progress bar."""
    from explain2me.stages.measure import measure_run

    with progress_bar(console, "measure") as on_done:
        measure_run(run, config, on_done=on_done)
        on_done(1, 1)


def summarise_scores(run: "Run", config: "Config", console: "Console") -> None:
    """Run stage 3 under a progress bar."""
    from explain2me.stages.summarise import summarise_run

    with progress_bar(console, "summarise") as on_done:
        summarise_run(run, config, on_done=on_done)


def write_page(run: "Run", config: "Config", console: "Console") -> "Sequence[tuple[str, str]]":
    """Run stage 4 under a progress bar, then print the findings; returns kind and text of each."""
    from explain2me.report.findings.kinds import TAGS
    from explain2me.report.write import write_report

    findings: list[tuple[str, str]] = []

    def keep(found: "Sequence[Finding]") -> None:
        findings.extend((TAGS[finding.kind], finding.text) for finding in found)

    with progress_bar(console, "report") as on_done:
        page = write_report(run, config, on_done=on_done, on_findings=keep)
    show_page(page, findings, console)
    return findings


def show_page(page: "Path", findings: "Sequence[tuple[str, str]]", console: "Console") -> None:
    """Print the findings, and where the page is."""
    from explain2me.report.terminal import show_findings

    show_findings(findings, console)
    print_line(console, f"report: {page}")
