"""`explain2me run` and `explain`: the stages of one run."""

import itertools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from explain2me.cli.check import class_order_text
from explain2me.cli.console import duration_text, make_console, progress_bars, say_where
from explain2me.cli.options import ConfigFile, Out, Sets, ShardOf, VerifyHashes, load_settings, parse_shard
from explain2me.cli.results import measure_scores, summarise_scores, write_page
from explain2me.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from explain2me.config.schema import Config
    from explain2me.run.folder import Run
    from explain2me.run.record import Model


def run(
    config: ConfigFile,
    out: Out = None,
    shard: ShardOf = None,
    sets: Sets = None,
    verify_hashes: VerifyHashes = False,
) -> None:
    """Explain, measure, summarise and show; a second call does only what is missing.

    With --shard make a share of the maps; the machine that finds every map there goes on with the tables.
    """
    run_all_stages(*load_settings(config, out, sets, verify_hashes=verify_hashes), shard, make_console())


def explain(
    config: ConfigFile,
    out: Out = None,
    shard: ShardOf = None,
    sets: Sets = None,
    verify_hashes: VerifyHashes = False,
) -> None:
    """Stage 1: make every map that is not there yet."""
    console = make_console()
    done = _explain(*load_settings(config, out, sets, verify_hashes=verify_hashes), shard, console)
    if _is_whole(done, console):
        _finish(done, console)


def run_all_stages(config: "Config", folder: Path, shard: str | None, console: "Console") -> None:
    """Run every stage, print the tables and the times."""
    from explain2me.report.terminal import show_run

    ends = [("", time.monotonic())]
    done = _explain(config, folder, shard, console)
    console.print(printable(class_order_text(done.classes, config)), markup=False, soft_wrap=True)
    if not _is_whole(done, console):
        return
    ends.append(("explain", time.monotonic()))
    measure_scores(done, done.config, console)
    ends.append(("measure", time.monotonic()))
    summarise_scores(done, done.config, console)
    ends.append(("summarise", time.monotonic()))
    show_run(done, console)
    if config.report.after_run:
        write_page(done, config, console)
    ends.append(("show and report", time.monotonic()))
    times = [f"{stage} {duration_text(end - begin)}" for (_, begin), (stage, end) in itertools.pairwise(ends)]
    console.print(f"time: {', '.join(times)}", markup=False)
    _finish(done, console)


def _is_whole(run: "Run", console: "Console") -> bool:
    """Whether every shard is there, of all machines; says how many are not."""
    from explain2me.stages.explain import num_missing

    missing = num_missing(run)
    if missing:
        console.print(
            printable(
                f"{missing} shards of other machines are not there yet; the last one goes on, or call the same command "
                f"without --shard. run: {run.folder}"
            ),
            markup=False,
            soft_wrap=True,
        )
    return not missing


def _explain(config: "Config", folder: Path, shard: str | None, console: "Console") -> "Run":
    _start_fork_server(config)
    from explain2me.detectors.cards import reading_warnings
    from explain2me.stages.explain import explain_run
    from explain2me.workers.progress import TimeLeft

    with progress_bars(console) as bars:
        index = bars.add_task("index", total=None)
        task = bars.add_task("explain", total=None, visible=False)
        clock: TimeLeft[Model] | None = None

        def start(run: "Run", total: int, left: "Mapping[Model, int]") -> None:
            nonlocal clock
            for warning in reading_warnings(run.models, run.classes):
                bars.console.print(printable(f"warning: {warning}"), markup=False)
            say_where(bars.console, f"explain: {sum(left.values())} of {total} images x models to be done", run.folder)
            clock = TimeLeft(left, workers=run.config.compute.workers)
            bars.update(index, total=1, completed=1, visible=False)
            bars.update(task, total=total, completed=total - sum(left.values()), visible=True)

        def done(model: "Model", count: int, seconds: float) -> None:
            assert clock is not None
            clock.add(model, count, seconds)
            bars.update(task, advance=count, seconds_left=clock.seconds())

        return explain_run(
            config,
            folder,
            share=parse_shard(shard),
            on_indexed=lambda done, total: bars.update(index, completed=done, total=total),
            on_start=start,
            on_done=done,
        )


def _start_fork_server(config: "Config") -> None:
    """Workers are forks of a server that imports PyTorch first, which takes seconds: as long as it takes us."""
    if sys.platform == "linux" and config.compute.workers > 1 and config.compute.executor == "local":
        import multiprocessing
        from multiprocessing import forkserver

        multiprocessing.get_context("forkserver").set_forkserver_preload(["explain2me.stages.explain"])
        forkserver.ensure_running()


def _finish(run: "Run", console: "Console") -> None:
    """Say where the run is; exit code 3 when more images were quarantined than allowed."""
    refused = run.quarantine()
    quarantined = len(set(refused["path"].to_pylist()))
    listed = run.record["num_listed"]
    console.print(printable(f"run: {run.folder}"), markup=False, soft_wrap=True)
    if quarantined > run.config.data.allowed_quarantine * listed:
        allowed = run.config.data.allowed_quarantine
        print(
            f"explain2me: {quarantined} of {listed} images are quarantined, more than data.allowed_quarantine = {allowed}; "
            f"first {printable(refused['message'][0].as_py())}; all are in "
            f"{printable(str(run.folder / 'quarantine'))}",
            file=sys.stderr,
        )
        raise typer.Exit(3)
