"""`explain2me demo`, `train` and `study`: commands that train."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from explain2me.cli.console import make_console, print_line, print_start, progress_bars
from explain2me.cli.options import Out, Sets, ShardOf, StudyFile, VerifyHashes, load_settings, parse_shard
from explain2me.cli.run import run_all_stages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.progress import Progress

    from explain2me.train.study import Study
    from explain2me.train.training import Training


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the demo's images, weights and run.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images and of the training.")] = 7,
) -> None:
    """Train two small detectors, three times each, on real and made faces and compare them; needs no file and no network."""
    from explain2me.config.load import load_config
    from explain2me.demo import ABOUT, prepare
    from explain2me.train.study import plan_study

    console = make_console()
    console.print(ABOUT, markup=False)
    with progress_bars(console) as progress:
        task = progress.add_task("make images", total=None)
        config = load_config(
            prepare(out, seed=seed, progress=lambda _, done, total: progress.update(task, completed=done, total=total))
        )
        progress.update(task, total=1, completed=1)
    _study(plan_study(config, out), (0, 1), console)


def train(config: StudyFile, out: Out = None, shard: ShardOf = None, sets: Sets = None) -> None:
    """Train every detector of CONFIG that is not trained yet; a second call continues where the first stopped."""
    from explain2me.config.load import training_of

    settings, folder = load_settings(config, out, sets)
    share = parse_shard(shard)
    training_of(settings)  # a mistake in it is reported before PyTorch is imported
    from explain2me.train.study import plan_study

    _train(plan_study(settings, folder), share, make_console())


def study(
    config: StudyFile,
    out: Out = None,
    shard: ShardOf = None,
    sets: Sets = None,
    verify_hashes: VerifyHashes = False,
) -> None:
    """Train, run and compare; with --shard train a share, and compare where every share is there."""
    from explain2me.config.load import training_of
    from explain2me.images.select import list_data, require_all_hashes

    settings, folder = load_settings(config, out, sets)
    share = parse_shard(shard)
    listing = list_data(settings.data)  # mistakes in the data and in [training] are reported before PyTorch is imported
    if verify_hashes:
        require_all_hashes(settings.data, settings.training, settings.seed, listing)
    training_of(settings)
    from explain2me.train.study import plan_study

    _study(plan_study(settings, folder), share, make_console())


def _study(study: "Study", share: tuple[int, int], console: "Console") -> None:
    from explain2me.train.study import check_study

    check_study(study)
    # machines share the trainings first; when all of these are done, the next call shares the run
    run_share = (0, 1) if study.unfinished else share
    if _train(study, share, console):
        run_all_stages(study.comparison, study.folder / "run", run_share, console)


def _train(study: "Study", share: tuple[int, int], console: "Console") -> bool:
    """Train what is missing; return whether every training of the study is finished."""
    from explain2me.train.study import train_missing

    folder = study.folder / "training"
    with progress_bars(console) as bars:
        progress = _TrainProgress(bars, folder)
        unfinished = train_missing(
            study, shard=share, on_start=progress.on_start, on_step=progress.on_step, on_trained=progress.on_trained
        )
    print_line(console, f"trained: {folder}")
    if unfinished:
        count, first = len(unfinished), unfinished[0].name
        text = f"{count} trainings are not finished, first {first}; the other shares of --shard make them"
        print_line(console, text)
    return not unfinished


class _TrainProgress:
    """Two bars: the trainings that are over, and the steps of the one under way. A line for each that is over."""

    def __init__(self, bars: "Progress", folder: Path) -> None:
        self._bars, self._folder = bars, folder
        self._trainings = bars.add_task("train", total=None)
        self._steps = bars.add_task("", total=None, visible=False)

    def on_start(self, missing: "Sequence[Training]", total: int) -> None:
        print_start(self._bars.console, f"train: {len(missing)} of {total} trainings to be done", self._folder)
        for training in missing:
            if epochs := training.epochs_committed():
                self._print(f"{training.name} continues after epoch {epochs} of {training.settings.epochs}")
        self._bars.update(self._trainings, total=total, completed=total - len(missing))

    def on_step(self, done: int, total: int, text: str) -> None:
        self._bars.update(self._steps, description=text, completed=done, total=total, visible=True)

    def on_trained(self, training: "Training", done: int, total: int) -> None:
        self._bars.update(self._trainings, completed=done)
        self._print(f"{done} of {total}: {training.outcome()}")

    def _print(self, text: str) -> None:
        print_line(self._bars.console, text)
