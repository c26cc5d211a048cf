"""`explain2me run` and `explain`: the stages of one run."""

import itertools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from explain2me.cli.check import class_order_text
from explain2me.cli.console import duration_text, make_console, print_line, print_start, progress_bars
from explain2me.cli.options import (
    ConfigFile,
    Out,
    Reuse,
    Sets,
    ShardOf,
    VerifyHashes,
    load_settings,
    parse_shard,
    select,
)
from explain2me.cli.results import measure_scores, show_page, summarise_scores, write_page
from explain2me.errors import BusyError, Stopped
from explain2me.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import Console
    from rich.progress import Progress

    from explain2me.config.schema import Config
    from explain2me.images.select import Selection
    from explain2me.run.folder import Run
    from explain2me.run.record import Model
    from explain2me.workers.progress import TimeLeft

Result = TypeVar("Result")


def run(
    config: ConfigFile,
    out: Out = None,
    shard: ShardOf = None,
    reuse: Reuse = None,
    sets: Sets = None,
    verify_hashes: VerifyHashes = False,
) -> None:
    """Explain, measure, summarise and show; a second call does only what is missing.

    With more detectors, runs, conditions or images in CONFIG the run grows; what is there is kept.

    With --shard make a share of the maps; the machine that finds every map there continues with the tables.
    """
    settings, folder = load_settings(config, out, sets)
    share = parse_shard(shard)
    selection = select(settings, verify_hashes=verify_hashes)
    run_all_stages(settings, folder, share, make_console(), selection, reuse or ())


def explain(
    config: ConfigFile,
    out: Out = None,
    shard: ShardOf = None,
    reuse: Reuse = None,
    sets: Sets = None,
    verify_hashes: VerifyHashes = False,
) -> None:
    """Stage 1: make every map that is not there yet."""
    settings, folder = load_settings(config, out, sets)
    share, console = parse_shard(shard), make_console()
    selection = select(settings, verify_hashes=verify_hashes)
    explained = _explain(settings, folder, share, console, selection, reuse or ())
    if _is_whole(explained, console):
        _finish(explained, console)


def run_all_stages(
    config: "Config",
    folder: Path,
    share: tuple[int, int],
    console: "Console",
    selection: "Selection | None" = None,
    reuse: "Sequence[Path]" = (),
) -> None:
    """Run every stage for a share (i, N) of the maps, print the tables and the times; select the images if nobody did."""
    from explain2me.cli.finished import find_finished, remember_finished
    from explain2me.images.select import select_images
    from explain2me.report.terminal import show_run

    selection = selection or select_images(config.data, config.seed)
    if finished := find_finished(config, folder, selection):
        text = "nothing to do: its config, list of images and checkpoints are those of the finished run"
        print_line(console, text)
        print_line(console, class_order_text(finished.run.classes, config.data.positive))
        show_run(finished.run, console)
        if config.report.after_run:
            show_page(finished.run.folder / "report" / "index.html", finished.findings, console)
        _finish(finished.run, console)
        return
    ends = [("", time.monotonic())]
    explained = _when_free(folder, console, lambda: _explain(config, folder, share, console, selection, reuse))
    print_line(console, class_order_text(explained.classes, config.data.positive))
    if not _is_whole(explained, console):
        return
    ends.append(("explain", time.monotonic()))
    _when_free(folder, console, lambda: measure_scores(explained, config, console))
    ends.append(("measure", time.monotonic()))
    _when_free(folder, console, lambda: summarise_scores(explained, explained.config, console))
    ends.append(("summarise", time.monotonic()))
    explained.refuse_changed()
    show_run(explained, console)
    findings: Sequence[tuple[str, str]] = ()
    if config.report.after_run:
        findings = _when_free(folder, console, lambda: write_page(explained, config, console))
    ends.append(("show and report", time.monotonic()))
    times = [f"{stage} {duration_text(end - begin)}" for (_, begin), (stage, end) in itertools.pairwise(ends)]
    console.print(f"time: {', '.join(times)}", markup=False)
    remember_finished(explained, config, selection, findings)
    _finish(explained, console)


def _when_free(folder: Path, console: "Console", stage: "Callable[[], Result]") -> "Result":
    """Run a stage when no other process writes into the run: machines that share a run may finish its maps together."""
    waits = False
    while True:
        try:
            return stage()
        except BusyError:
            if not waits:
                print_line(console, f"waiting for another process that writes into {folder}")
            waits = True
            time.sleep(1)


def _is_whole(run: "Run", console: "Console") -> bool:
    """Whether the shards of all machines are there; print how many are missing."""
    from explain2me.stages.explain import num_missing

    missing = num_missing(run)
    if missing:
        print_line(
            console,
            f"{missing} shards of other machines are missing; the last machine continues, or call the same command "
            f"without --shard. run: {run.folder}",
        )
    return not missing


def _explain(
    config: "Config",
    folder: Path,
    share: tuple[int, int],
    console: "Console",
    selection: "Selection",
    reuse: "Sequence[Path]",
) -> "Run":
    """Run stage 1 under progress bars."""
    _start_fork_server(config)
    from explain2me.run.folder import EARLIER
    from explain2me.stages.explain import explain_run, kept_text

    try:
        with progress_bars(console) as bars:
            progress = _ExplainProgress(
                bars, config.compute.workers, takes_maps=bool(reuse) or (folder / EARLIER).exists()
            )
            return explain_run(
                config,
                folder,
                selection=selection,
                share=share,
                reuse=reuse,
                on_indexed=progress.on_indexed,
                on_grown=lambda text: print_line(console, f"the run in {folder} changes: {text}"),
                on_start=progress.on_start,
                on_done=progress.on_done,
            )
    except KeyboardInterrupt:
        raise Stopped(kept_text(folder)) from None


class _ExplainProgress:
    """Two bars, for the index and for the maps; and the time left."""

    def __init__(self, bars: "Progress", workers: int, *, takes_maps: bool) -> None:
        self._bars, self._workers, self._takes_maps = bars, workers, takes_maps
        self._index = bars.add_task("index", total=None)
        self._explain = bars.add_task("explain", total=None, visible=False)
        self._time_left: TimeLeft[Model] | None = None

    def on_indexed(self, num_done: int, num_images: int) -> None:
        self._bars.update(self._index, completed=num_done, total=num_images)

    def on_start(self, run: "Run", total: int, left: "Mapping[Model, int]") -> None:
        from explain2me.detectors.cards import reading_warnings
        from explain2me.images.examine import copies_warning
        from explain2me.workers.progress import TimeLeft

        num_left = sum(left.values())
        text = f"explain: {num_left} of {total} images x models to be done"
        if num_left and self._takes_maps:
            text += ", fewer where earlier/ or --reuse holds their maps"
        copied = copies_warning(run.image_table)
        for warning in [*reading_warnings(run.models, run.classes), *([copied] if copied else [])]:
            self._bars.console.print(printable(f"warning: {warning}"), markup=False)
        print_start(self._bars.console, text, run.folder)
        self._time_left = TimeLeft(left, workers=self._workers)
        self._bars.update(self._index, total=1, completed=1, visible=False)
        self._bars.update(self._explain, total=total, completed=total - num_left, visible=True)

    def on_done(self, model: "Model", count: int, seconds: float) -> None:
        assert self._time_left is not None
        self._time_left.add(model, count, seconds)
        self._bars.update(self._explain, advance=count, seconds_left=self._time_left.seconds())


def _start_fork_server(config: "Config") -> None:
    """Let the server that forks the workers import PyTorch while this process does, since both take seconds."""
    if sys.platform == "linux" and config.compute.workers > 1 and config.compute.executor == "local":
        import multiprocessing
        from multiprocessing import forkserver

        multiprocessing.get_context("forkserver").set_forkserver_preload(["explain2me.stages.shards.commit"])
        forkserver.ensure_running()


def _finish(run: "Run", console: "Console") -> None:
    """Print the folder of the run; exit code 3 if more images are quarantined than allowed."""
    print_line(console, f"run: {run.folder}")
    refused = run.quarantine()
    quarantined, listed = len(set(refused["path"].to_pylist())), run.record["num_listed"]
    allowed = run.config.data.allowed_quarantine
    if quarantined > allowed * listed:
        text = (
            f"explain2me: {quarantined} of {listed} images are quarantined, more than data.allowed_quarantine = {allowed}; "
            f"first {refused['message'][0].as_py()}; all are in {run.folder / 'quarantine'}"
        )
        print(printable(text), file=sys.stderr)
        raise typer.Exit(3)
