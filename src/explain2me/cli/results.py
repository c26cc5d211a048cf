"""`explain2me measure`, `summarise`, `report` and `show`: commands on a run folder."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from explain2me.cli.console import make_console, progress_bars
from explain2me.cli.options import RunFolder, set_option
from explain2me.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from explain2me.config.schema import Config
    from explain2me.run.folder import Run


def measure(
    run: RunFolder, sets: Annotated[list[str] | None, set_option('measures.similarity=["ssim","pearson"]')] = None
) -> None:
    """Stage 2: score the maps of RUN, one row per image, measure and condition."""
    from explain2me.run.folder import open_run

    opened = open_run(run)
    config = _override(opened, "measure", sets or [])
    _refuse_single_runs(opened, config)
    console = make_console()
    measure_scores(opened, config, console)
    console.print(
        printable(f"scored; call `explain2me summarise {run}` to bring the tables up to date"),
        markup=False,
        soft_wrap=True,
    )


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

    opened = open_run(run)
    if _stale(opened):
        print("explain2me: the scores are newer than these tables; call `explain2me summarise` first", file=sys.stderr)
    show_run(opened, make_console(), brief=brief)


def _override(run: "Run", stage: str, sets: list[str]) -> "Config":
    """The config of a run with ``--set`` applied; a change that the stage does not read is refused."""
    from explain2me.config.compare import MEASURING_FIELDS
    from explain2me.config.load import override
    from explain2me.errors import ConfigError

    config = override(run.config, sets)
    stages = {"measures": "measure", "summary": "summarise", "report": "report"}
    own = {".".join(field): stages[field[0]] for field in MEASURING_FIELDS}
    for key in _changed(run.config.model_dump(), config.model_dump()):
        reader = next((own[field] for field in own if f"{key}.".startswith(f"{field}.")), None)
        if reader == stage:
            continue
        typed = next((item for item in sets if item.strip().startswith(key)), key)
        todo = "start a new run: `explain2me run CONFIG --out NEW` with it"
        if reader:
            todo = f"give it to `explain2me {reader}`, or start a new run with it"
        known = ", ".join(field for field, user in own.items() if user == stage)
        raise ConfigError(
            f"--set {typed}: `explain2me {stage}` does not read it and can change only {known} of a run; {todo}"
        )
    return config


def _changed(before: object, after: object, key: str = "") -> "Iterator[str]":
    """Dotted names of the fields that differ; a list counts as one field."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in before | after:
            yield from _changed(before.get(name), after.get(name), f"{key}.{name}" if key else name)
    elif before != after:
        yield key


def _refuse_single_runs(run: "Run", config: "Config") -> None:
    """Refuse measures of pairs of training runs that ``--set`` has turned on and the detectors are too few runs for."""
    from explain2me.stages.check import refuse_single_runs

    for detector in run.config.detectors:
        num_runs = len(run.models_of(detector.name))
        count = f"{detector.name!r} has {num_runs}"
        refuse_single_runs(config.measures, num_runs, count=count, remedy="start a new run with more checkpoints")


def measure_scores(run: "Run", config: "Config", console: "Console") -> None:
    """Run stage 2 under a progress bar."""
    from explain2me.stages.measure import measure_run

    with progress_bars(console) as progress:
        task = progress.add_task("measure", total=None)
        measure_run(run, config, on_done=lambda done, total: progress.update(task, total=total, completed=done))
        progress.update(task, total=1, completed=1)


def summarise_scores(run: "Run", config: "Config", console: "Console") -> None:
    """Run stage 3 under a progress bar."""
    from explain2me.stages.summarise import summarise_run

    with progress_bars(console) as progress:
        task = progress.add_task("summarise", total=None)
        summarise_run(run, config, on_done=lambda done, total: progress.update(task, total=total, completed=done))


def _stale(run: "Run") -> bool:
    """Whether scores are newer than the summary."""
    summary = run.folder / "summary" / "measures.parquet"
    newest = max((path.stat().st_mtime_ns for path in (run.folder / "scores").glob("*.parquet")), default=0)
    return summary.exists() and newest > summary.stat().st_mtime_ns


def write_page(run: "Run", config: "Config", console: "Console") -> None:
    """Run stage 4 under a progress bar, then print the findings."""
    from explain2me.report import write_report
    from explain2me.report.findings import Finding
    from explain2me.report.terminal import show_findings

    findings: list[Finding] = []
    with progress_bars(console) as progress:
        task = progress.add_task("report", total=None)
        page = write_report(
            run,
            config,
            on_done=lambda done, total: progress.update(task, total=total, completed=done),
            on_findings=findings.extend,
        )
    show_findings(findings, console)
    console.print(printable(f"report: {page}"), markup=False, soft_wrap=True)
