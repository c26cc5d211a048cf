"""`explain2me demo`, `train` and `study`: commands that train."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from explain2me.cli.console import make_console, print_start, progress_bars
from explain2me.cli.options import Out, Sets, ShardOf, StudyFile, VerifyHashes, load_settings, parse_shard
from explain2me.cli.run import run_all_stages
from explain2me.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from explain2me.config.schema import Config


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the demo's images, weights and run.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images and of the training.")] = 7,
) -> None:
    """Train two small detectors, three times each, on real and made faces and compare them; needs no file and no network."""
    from explain2me.config.load import load_config
    from explain2me.demo import ABOUT, prepare

    console = make_console()
    console.print(ABOUT, markup=False)
    with progress_bars(console) as progress:
        task = progress.add_task("make images", total=None)
        config = load_config(
            prepare(out, seed=seed, progress=lambda _, done, total: progress.update(task, completed=done, total=total))
        )
        progress.update(task, total=1, completed=1)
    _study(config, out, (0, 1), console)


def train(config: StudyFile, out: Out = None, shard: ShardOf = None, sets: Sets = None) -> None:
    """Train every detector of CONFIG that is not trained yet; a second call continues where the first stopped."""
    settings, folder = load_settings(config, out, sets)
    _train(settings, folder, parse_shard(shard), make_console())


def study(
    config: StudyFile,
    out: Out = None,
    shard: ShardOf = None,
    sets: Sets = None,
    verify_hashes: VerifyHashes = False,
) -> None:
    """Train, run and compare; with --shard train a share, and compare where every share is there."""
    from explain2me.images.select import list_data, require_all_hashes

    settings, folder = load_settings(config, out, sets)
    share = parse_shard(shard)
    listing = list_data(settings.data)  # a mistake in it is reported before PyTorch is imported
    if verify_hashes:
        require_all_hashes(settings.data, settings.training, settings.seed, listing)
    _study(settings, folder, share, make_console())


def _train(config: "Config", folder: Path, share: tuple[int, int], console: "Console") -> bool:
    """Train what is missing; return whether every training of the config is finished."""
    from explain2me.train.study import train_missing
    from explain2me.train.training import Training

    def tell(training: Training, done: int, total: int) -> None:
        progress.update(task, completed=done)
        progress.console.print(printable(f"{done} of {total}: {training.outcome()}"), markup=False, soft_wrap=True)

    def start(missing: "Sequence[Training]", total: int) -> None:
        print_start(console, f"train: {len(missing)} of {total} trainings to be done", folder / "training")
        for training in missing:
            if epochs := training.epochs_committed():
                line = f"{training.detector} run {training.run} continues after epoch {epochs} of {training.settings.epochs}"
                console.print(printable(line), markup=False, soft_wrap=True)
        progress.update(task, total=total, completed=total - len(missing))

    with progress_bars(console) as progress:
        task = progress.add_task("train", total=None)
        now = progress.add_task("", total=None, visible=False)
        left = train_missing(
            config,
            folder,
            shard=share,
            on_start=start,
            on_step=lambda done, total, text: progress.update(
                now, description=text, completed=done, total=total, visible=True
            ),
            on_trained=tell,
        )
    console.print(printable(f"trained: {folder / 'training'}"), markup=False, soft_wrap=True)
    if left:
        first = left[0]
        console.print(
            f"{len(left)} trainings are not finished, first {first.detector} run {first.run}; the other shares of --shard make them",
            markup=False,
            soft_wrap=True,
        )
    return not left


def _study(config: "Config", folder: Path, share: tuple[int, int], console: "Console") -> None:
    from explain2me.train.study import check_study, evaluation, trainings

    check_study(config, folder)
    # machines share the trainings first; when all of these are done, the next call shares the run
    is_trained = all(training.done for training in trainings(config, folder))
    if _train(config, folder, share, console):
        run_all_stages(evaluation(config, folder), folder / "run", share if is_trained else (0, 1), console)
