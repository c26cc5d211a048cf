"""The command line: parse, call, print. Nothing heavy is imported before a command needs it."""

import contextlib
import itertools
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pyarrow import Table
    from rich.console import Console
    from rich.progress import Progress, Task

    from explain2me.config import Config
    from explain2me.store import Model, Run

app = typer.Typer(
    name="explain2me",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    help="Measure where image classifiers look, over whole datasets, to choose which of them to trust.",
)

MOST_MISMATCHES = 20


def _version(wanted: bool) -> None:
    if wanted:
        from explain2me import __version__

        print(f"explain2me {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Measure where image classifiers look, over whole datasets, to choose which of them to trust."""


def _setting(example: str) -> Any:
    return typer.Option("--set", metavar="KEY=VALUE", help=f"Change one field, e.g. {example}.")


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file of the run.", show_default=False)]
StudyFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file of the study.", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the run or study; default: runs/NAME.")]
ShardOf = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Do the I-th (from 0) of N shares; N machines work in one folder."),
]
Sets = Annotated[list[str] | None, _setting("measures.noise.levels=[0,0.1]")]
VerifyHashes = Annotated[
    bool, typer.Option("--verify-hashes", help="Insist on a sha256 in the manifest for every image, and compare it.")
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the demo's images, weights and run.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images and of the training.")] = 7,
) -> None:
    """Train two small detectors, three times each, on real and made faces and compare them; needs no file and no network."""
    from explain2me.config import load_config
    from explain2me.demo import ABOUT, prepare

    console = _console()
    console.print(ABOUT, markup=False)
    with _progress(console) as progress:
        task = progress.add_task("make images", total=None)
        config = load_config(
            prepare(out, seed=seed, progress=lambda _, done, total: progress.update(task, completed=done, total=total))
        )
        progress.update(task, total=1, completed=1)
    _study(config, out, None, console)


@app.command()
def check(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML file of the run or study.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to compare with CONFIG; default: none.")
    ] = None,
    sets: Sets = None,
    verify_hashes: VerifyHashes = False,
) -> None:
    """Check CONFIG, its list of images and its checkpoints, and say what would run; writes nothing.

    Images to train on are opened, images to test only with --verify-hashes. With --out what is in that folder is
    compared with CONFIG, too.
    """
    settings, _ = _settings(config, out, sets)  # a mistake in it is told before PyTorch is imported
    from explain2me import prepare
    from explain2me.conditions import conditions_for

    settings = prepare.with_device(settings)
    console = _console()
    if verify_hashes:
        _verify_hashes(settings, console)
    if out is not None and settings.training is None:
        prepare.refuse_other_run(settings, out)
    if settings.training is not None:
        _check_training(settings, out, console)
        if not settings.detectors:
            return
    images, record = prepare.check(settings)
    if settings.training is None:  # or else it was told with what it trains
        _warn(settings, record, images, console)
    for model in record["models"]:
        name = f"{model['detector']} {model['run']}: {model['architecture']}"
        console.print(_printable(f"{name}, {_sizes(model, record)}"), markup=False)
    conditions = conditions_for(settings.measures, tuple(record["models"][0]["input_size"]))
    passes = len(images) * len(conditions) * len(record["models"])
    console.print(_printable(_class_order(record["classes"], settings)), markup=False)
    console.print("the images were not opened: `explain2me run` does that first and says which cannot be used")
    console.print(
        f"{len(images)} images x {len(conditions)} conditions x {len(record['models'])} models = {passes} forward passes "
        f"on {settings.compute.device}",
        markup=False,
    )


@app.command()
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
    _run(*_settings(config, out, sets, verify_hashes=verify_hashes), shard, _console())


@app.command()
def train(config: StudyFile, out: Out = None, shard: ShardOf = None, sets: Sets = None) -> None:
    """Train every detector of CONFIG that is not trained yet; a second call goes on where the first stopped."""
    _train(*_settings(config, out, sets), shard, _console())


@app.command()
def study(
    config: StudyFile,
    out: Out = None,
    shard: ShardOf = None,
    sets: Sets = None,
    verify_hashes: VerifyHashes = False,
) -> None:
    """Train, run and compare; with --shard train a share, and compare where every share is there."""
    _study(*_settings(config, out, sets, verify_hashes=verify_hashes), shard, _console())


@app.command()
def explain(
    config: ConfigFile,
    out: Out = None,
    shard: ShardOf = None,
    sets: Sets = None,
    verify_hashes: VerifyHashes = False,
) -> None:
    """Stage 1: make every map that is not there yet."""
    console = _console()
    done = _explain(*_settings(config, out, sets, verify_hashes=verify_hashes), shard, console)
    if _is_whole(done, console):
        _finish(done, console)


@app.command()
def measure(
    run: RunFolder, sets: Annotated[list[str] | None, _setting('measures.similarity=["ssim","pearson"]')] = None
) -> None:
    """Stage 2: score the maps of RUN, one row per image, measure and condition."""
    from explain2me.store import open_run

    opened = open_run(run)
    config = _override(opened, "measure", sets or [])
    if config.measures.stability:
        _refuse_single_runs(opened)
    console = _console()
    _measure(opened, config, console)
    console.print(
        _printable(f"scored; call `explain2me summarise {run}` to bring the tables up to date"),
        markup=False,
        soft_wrap=True,
    )


@app.command()
def summarise(run: RunFolder, sets: Annotated[list[str] | None, _setting("summary.bootstrap=2000")] = None) -> None:
    """Stage 3: tables from the scores of RUN, with intervals and chance levels."""
    from explain2me.store import open_run

    opened = open_run(run)
    _summarise(opened, _override(opened, "summarise", sets or []), _console())


@app.command()
def report(run: RunFolder, sets: Annotated[list[str] | None, _setting("report.images=8")] = None) -> None:
    """Stage 4: write RUN/report: a page to decide from, figures and tables for a paper, model cards."""
    from explain2me.store import open_run

    opened = open_run(run)
    _report(opened, _override(opened, "report", sets or []), _console())


@app.command()
def show(
    run: RunFolder,
    brief: Annotated[bool, typer.Option("--brief", help="Only the measures over all sources, and AUROC.")] = False,
) -> None:
    """Print the tables of RUN in the paper's layout."""
    from explain2me.show import show_run
    from explain2me.store import open_run

    opened = open_run(run)
    if _stale(opened):
        print("explain2me: the scores are newer than these tables; call `explain2me summarise` first", file=sys.stderr)
    show_run(opened, _console(), brief=brief)


@app.command()
def verify(
    run: RunFolder,
    verify_hashes: Annotated[
        bool, typer.Option("--verify-hashes", help="Read every image too and compare its sha256.")
    ] = False,
) -> None:
    """Check that every model x image x condition of RUN is there once, or in the quarantine, and no file changed."""
    from explain2me.store import open_run
    from explain2me.verify import verify_run

    console = _console()
    with _progress(console) as bars:
        task = bars.add_task("verify", total=None)
        problems = verify_run(
            open_run(run), images=verify_hashes, on_done=lambda n, total: bars.update(task, completed=n, total=total)
        )
    for problem in problems:
        console.print(_printable(problem), markup=False, soft_wrap=True)
    if problems:
        console.print(
            "Call `explain2me run` with the same config and folder to make what is missing; delete what is damaged first."
        )
        raise typer.Exit(2)
    console.print("whole")


@app.command()
def compact(run: RunFolder) -> None:
    """Put the many small files of RUN into few large ones; nothing is lost and every command reads them.

    Not while another command works on RUN.
    """
    from explain2me.compact import compact_run
    from explain2me.store import open_run

    console = _console()
    done = compact_run(open_run(run))
    for folder, (before, after) in done.items():
        console.print(_printable(f"{folder}: {before} files -> {after}"), markup=False, soft_wrap=True)
    if not done:
        console.print("nothing to do")


def main() -> None:
    """Entry point: wrong input gives one line and exit code 2, our own bugs a traceback and 1."""
    from explain2me.errors import Explain2MeError

    try:
        with _stopped_by_sigterm():
            app(standalone_mode=True)
    except SystemExit as stop:
        if stop.code == 130:
            print("\nexplain2me: stopped; what is committed stays, call the same command to go on", file=sys.stderr)
        raise
    except Explain2MeError as error:
        line = " ".join(str(error).split())
        print(f"explain2me: {_printable(line)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"explain2me: {_printable(str(error.strerror or error) + where)}; what is committed stays", file=sys.stderr
        )
        sys.exit(2)
    except Exception as error:
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
            print(
                "explain2me: out of memory; what is committed stays. End what else needs memory, or lower compute.workers (or "
                "compute.batch_size, in a new folder), and call the same command again",
                file=sys.stderr,
            )
            sys.exit(2)
        if not type(error).__module__.startswith("pyarrow"):
            raise
        text = _printable(" ".join(str(error).split()))
        print(
            f"explain2me: a file of the run is damaged ({text}); `explain2me verify RUN` names it: delete it and call the "
            f"same command again",
            file=sys.stderr,
        )
        sys.exit(2)


@contextlib.contextmanager
def _stopped_by_sigterm() -> "Iterator[None]":
    """What a scheduler sends before it kills stops a command as Ctrl-C does."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _settings(
    config: Path, out: Path | None, sets: list[str] | None, *, verify_hashes: bool = False
) -> "tuple[Config, Path]":
    """The config with ``--set`` applied, and the folder of its run; every image must have a hash where that is asked."""
    from explain2me.config import load_config

    settings = load_config(config, sets or ())
    if verify_hashes:
        from explain2me.prepare import require_all_hashes

        require_all_hashes(settings)
    return settings, out or Path("runs") / settings.name


def _warn(config: "Config", record: "Mapping[str, Any]", images: "Table", console: "Console") -> None:
    """Print what is allowed and probably not meant, in what :func:`explain2me.prepare.check` returned."""
    from explain2me.prepare import warnings_of
    from explain2me.store import Model

    models = [Model(**model) for model in record["models"]]
    for warning in warnings_of(config, models, images, classes=record["classes"], map_sizes=record["map_sizes"]):
        console.print(_printable(f"warning: {warning}"), markup=False)


def _sizes(model: "Mapping[str, Any]", record: "Mapping[str, Any]") -> str:
    """Of the input and the maps of one model of run.json."""
    height, width = record["map_sizes"][f"{model['detector']}__{model['run']}"]
    sides = "x".join(str(side) for side in model["input_size"])
    return f"input {sides}, layer {model['layer']}, maps of {height}x{width} cells"


def _verify_hashes(config: "Config", console: "Console") -> None:
    """Read every image to test and compare it to its hash; exit code 2 where one differs or is not there."""
    from explain2me.images import verify_hashes
    from explain2me.manifest import image_root
    from explain2me.prepare import require_all_hashes

    images = require_all_hashes(config)
    with _progress(console) as progress:
        task = progress.add_task("read", total=len(images))
        bad = verify_hashes(
            images,
            image_root(Path(config.data.manifest)),
            on_done=lambda done: progress.update(task, completed=done),
        ).to_pylist()
    for row in bad[:MOST_MISMATCHES]:
        print(_printable(f"explain2me: {row['path']}: {row['kind']}: {row['message']}"), file=sys.stderr)
    if len(bad) > MOST_MISMATCHES:
        print(f"explain2me: and {len(bad) - MOST_MISMATCHES} more", file=sys.stderr)
    if bad:
        print(f"explain2me: {len(bad)} of {len(images)} images are not what the manifest names", file=sys.stderr)
        raise typer.Exit(2)
    console.print(f"{len(images)} images have the bytes that the manifest names")


def _check_training(config: "Config", out: Path | None, console: "Console") -> None:
    """Say what a study would train; every image and human map to train on is opened."""
    from collections import Counter

    from explain2me.study import (
        check_architectures,
        check_comparison,
        check_devices,
        check_settings,
        refuse_other_study,
        trainings,
    )
    from explain2me.train.data import read_human_maps, read_splits
    from explain2me.trained import human_maps_in_words

    assert config.training is not None
    check_settings(config)
    if out is None or not all(training.done for training in trainings(config, out)):
        check_devices(config)
    splits = read_splits(config, config.training)
    if out is not None:
        refuse_other_study(config, out, splits)
    for strategy in config.training.strategies:
        maps = read_human_maps(strategy, splits.training, (32, 32))
        kind = f"human maps: {human_maps_in_words(None if maps is None else maps.record)}"
        console.print(_printable(f"strategy {strategy.name}: {strategy.loss}, {kind}"), markup=False)
    for name in ("training", "validation"):
        if name in splits.record:
            found = ", ".join(f"{key} {count}" for key, count in splits.record[name]["by_label_and_source"].items())
            console.print(_printable(f"{name}: {splits.record[name]['images']} images ({found})"), markup=False)
    every = trainings(config, Path())
    check_architectures(every)
    images, record = check_comparison(config)
    _warn(config, record, images, console)
    for architecture in config.training.architectures:
        model = next(model for model in record["models"] if model["architecture"] == architecture)
        console.print(_printable(f"{architecture}: {_sizes(model, record)}"), markup=False)
    console.print(f"test: {len(images)} images")
    console.print(_printable(_class_order(record["classes"], config)), markup=False)
    for detector, count in Counter(training.detector for training in every).items():
        console.print(_printable(f"{detector}: {count} run(s) of {config.training.epochs} epochs"), markup=False)


def _class_order(classes: "Sequence[str]", config: "Config") -> str:
    shown = ", ".join(classes) if len(classes) <= 12 else f"{', '.join(classes[:10])}, ... ({len(classes)})"
    positive = f"; positive: {config.data.positive}" if config.data.positive in classes else "; no labels, so no AUROC"
    return f"classes, in the order of the logits: {shown}{positive}"


def _run(config: "Config", folder: Path, shard: str | None, console: "Console") -> None:
    from explain2me.show import show_run

    ends = [("", time.monotonic())]
    done = _explain(config, folder, shard, console)
    console.print(_printable(_class_order(done.classes, config)), markup=False, soft_wrap=True)
    if not _is_whole(done, console):
        return
    ends.append(("explain", time.monotonic()))
    _measure(done, done.config, console)
    ends.append(("measure", time.monotonic()))
    _summarise(done, done.config, console)
    ends.append(("summarise", time.monotonic()))
    show_run(done, console)
    if config.report.after_run:
        _report(done, config, console)
    ends.append(("show and report", time.monotonic()))
    times = [f"{stage} {_duration(end - begin)}" for (_, begin), (stage, end) in itertools.pairwise(ends)]
    console.print(f"time: {', '.join(times)}", markup=False)
    _finish(done, console)


def _is_whole(run: "Run", console: "Console") -> bool:
    """Whether every shard is there, of all machines; says how many are not."""
    from explain2me.explain import num_missing

    missing = num_missing(run)
    if missing:
        console.print(
            _printable(
                f"{missing} shards of other machines are not there yet; the last one goes on, or call the same command "
                f"without --shard. run: {run.folder}"
            ),
            markup=False,
            soft_wrap=True,
        )
    return not missing


def _duration(seconds: float) -> str:
    """As ``1 h 02 min``, ``3 min 20 s`` or ``4.5 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min {int(seconds) % 60:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _train(config: "Config", folder: Path, shard: str | None, console: "Console") -> bool:
    """Train; whether every training of the config is finished."""
    from explain2me.study import train_missing
    from explain2me.train.trainer import Training

    def tell(training: Training, done: int, total: int) -> None:
        progress.update(task, completed=done)
        progress.console.print(_printable(f"{done} of {total}: {training.outcome()}"), markup=False, soft_wrap=True)

    def start(missing: "Sequence[Training]", total: int) -> None:
        _say_where(console, f"train: {len(missing)} of {total} trainings to be done", folder / "training")
        for training in missing:
            if epochs := training.epochs_committed():
                says = (
                    f"{training.detector} run {training.run} goes on after epoch {epochs} of {training.settings.epochs}"
                )
                console.print(_printable(says), markup=False, soft_wrap=True)
        progress.update(task, total=total, completed=total - len(missing))

    with _progress(console) as progress:
        task = progress.add_task("train", total=None)
        now = progress.add_task("", total=None, visible=False)
        left = train_missing(
            config,
            folder,
            shard=_parse_shard(shard),
            on_start=start,
            on_step=lambda done, total, text: progress.update(
                now, description=text, completed=done, total=total, visible=True
            ),
            on_trained=tell,
        )
    console.print(_printable(f"trained: {folder / 'training'}"), markup=False, soft_wrap=True)
    if left:
        first = left[0]
        console.print(
            f"{len(left)} trainings are not finished, first {first.detector} run {first.run}; the others of --shard make them",
            markup=False,
            soft_wrap=True,
        )
    return not left


def _study(config: "Config", folder: Path, shard: str | None, console: "Console") -> None:
    from explain2me.study import check_study, evaluation, trainings

    check_study(config, folder)
    # trainings are shared first; once they are all there, the next call shares the run
    trained = shard is not None and all(training.done for training in trainings(config, folder))
    if _train(config, folder, shard, console):
        _run(evaluation(config, folder), folder / "run", shard if trained else None, console)


def _parse_shard(shard: str | None) -> tuple[int, int]:
    """``I/N``, 0 <= I < N."""
    from explain2me.errors import ConfigError

    if shard is None:
        return 0, 1
    index, slash, count = shard.partition("/")
    if not slash or not index.isdecimal() or not count.isdecimal() or int(index) >= int(count):
        raise ConfigError(f"--shard: expected I/N with I from 0 to N-1, such as 0/4, got {shard!r}")
    return int(index), int(count)


def _explain(config: "Config", folder: Path, shard: str | None, console: "Console") -> "Run":
    _start_fork_server(config)
    from explain2me.explain import explain_run
    from explain2me.progress import TimeLeft
    from explain2me.trained import reading_warnings

    with _progress(console) as bars:
        index = bars.add_task("index", total=None)
        task = bars.add_task("explain", total=None, visible=False)
        clock: TimeLeft[Model] | None = None

        def start(run: "Run", total: int, left: "Mapping[Model, int]") -> None:
            nonlocal clock
            for warning in reading_warnings(run.models, run.classes):
                bars.console.print(_printable(f"warning: {warning}"), markup=False)
            _say_where(bars.console, f"explain: {sum(left.values())} of {total} images x models to be done", run.folder)
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
            share=_parse_shard(shard),
            on_indexed=lambda done, total: bars.update(index, completed=done, total=total),
            on_start=start,
            on_done=done,
        )


def _start_fork_server(config: "Config") -> None:
    """Workers are forks of a server that imports PyTorch first, which takes seconds: as long as it takes us."""
    if sys.platform == "linux" and config.compute.workers > 1 and config.compute.executor == "local":
        import multiprocessing
        from multiprocessing import forkserver

        multiprocessing.get_context("forkserver").set_forkserver_preload(["explain2me.explain"])
        forkserver.ensure_running()


def _override(run: "Run", stage: str, sets: list[str]) -> "Config":
    """The config of a run with ``--set`` applied; a change that the stage would not see is refused."""
    from explain2me.config import MEASURING_FIELDS, override
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


def _refuse_single_runs(run: "Run") -> None:
    """Stability compares runs; the config may have been changed since the run began."""
    from explain2me.errors import ConfigError

    for detector in run.config.detectors:
        count = len(run.models_of(detector.name))
        if count < 2:
            raise ConfigError(
                f"measures.stability compares training runs and needs at least 2 of each detector, {detector.name!r} has "
                f"{count}; start a new run with more checkpoints, or set measures.stability = false"
            )


def _measure(run: "Run", config: "Config", console: "Console") -> None:
    from explain2me.measure import measure_run

    with _progress(console) as progress:
        task = progress.add_task("measure", total=None)
        measure_run(run, config, on_done=lambda done, total: progress.update(task, total=total, completed=done))
        progress.update(task, total=1, completed=1)


def _summarise(run: "Run", config: "Config", console: "Console") -> None:
    from explain2me.summarise import summarise_run

    with _progress(console) as progress:
        task = progress.add_task("summarise", total=None)
        summarise_run(run, config, on_done=lambda done, total: progress.update(task, total=total, completed=done))


def _stale(run: "Run") -> bool:
    """Whether scores are newer than the summary."""
    summary = run.folder / "summary" / "measures.parquet"
    newest = max((path.stat().st_mtime_ns for path in (run.folder / "scores").glob("*.parquet")), default=0)
    return summary.exists() and newest > summary.stat().st_mtime_ns


def _report(run: "Run", config: "Config", console: "Console") -> None:
    from explain2me.report import write_report
    from explain2me.report.findings import Finding
    from explain2me.show import show_findings

    found: list[Finding] = []
    with _progress(console) as progress:
        task = progress.add_task("report", total=None)
        page = write_report(
            run,
            config,
            on_done=lambda done, total: progress.update(task, total=total, completed=done),
            on_findings=found.extend,
        )
    show_findings(found, console)
    console.print(_printable(f"report: {page}"), markup=False, soft_wrap=True)


def _finish(run: "Run", console: "Console") -> None:
    """Say where the run is; exit code 3 when more images were quarantined than allowed."""
    refused = run.quarantine()
    quarantined = len(set(refused["path"].to_pylist()))
    listed = run.record["num_listed"]
    console.print(_printable(f"run: {run.folder}"), markup=False, soft_wrap=True)
    if quarantined > run.config.data.allowed_quarantine * listed:
        allowed = run.config.data.allowed_quarantine
        print(
            f"explain2me: {quarantined} of {listed} images are quarantined, more than data.allowed_quarantine = {allowed}; "
            f"first {_printable(refused['message'][0].as_py())}; all are in "
            f"{_printable(str(run.folder / 'quarantine'))}",
            file=sys.stderr,
        )
        raise typer.Exit(3)


def _console() -> "Console":
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def _progress(console: "Console") -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class TimeLeftColumn(ProgressColumn):
        """What is left by our own count, where there is one: models differ in speed."""

        def render(self, task: "Task") -> Text:
            seconds = task.fields.get("seconds_left", task.time_remaining)
            return Text("" if seconds is None or task.finished else f"{_duration(seconds)} left")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeLeftColumn(),
    )
    return Progress(*columns, console=console, transient=False, disable=not console.is_terminal)


def _say_where(console: "Console", what: str, folder: Path) -> None:
    """In a log, which has no bars, what begins and where it can be followed."""
    if not console.is_terminal:
        console.print(_printable(f"{what}, in {folder}"), markup=False, soft_wrap=True)


def _printable(text: str) -> str:
    """Control characters of hostile names must not reach the terminal."""
    from explain2me.show import printable

    return printable(text)
