"""`explain2me check`: find mistakes before anything runs."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from explain2me.cli.console import make_console, progress_bars
from explain2me.cli.options import Sets, VerifyHashes, load_settings
from explain2me.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyarrow import Table
    from rich.console import Console

    from explain2me.config.schema import Config
    from explain2me.config.training import TrainingConfig
    from explain2me.images.listing import Listing
    from explain2me.train.data import Splits


MOST_MISMATCHES = 20


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
    """Check CONFIG, its list of images and its checkpoints, and print what would run; writes nothing.

    Images to train on are opened, images to test only with --verify-hashes. With --out the folder is compared with
    CONFIG, too.
    """
    settings, _ = load_settings(config, out, sets)
    from explain2me.detectors.runs import check_runs
    from explain2me.images.listing import list_source
    from explain2me.images.select import list_data, select_images

    listing, training = list_data(settings.data), settings.training  # mistakes are reported before PyTorch is imported
    if training is not None and training.manifest is not None:
        list_source(Path(training.manifest), split=training.split, extra=("salience",), classes=settings.data.classes)
    if settings.detectors:
        select_images(settings.data, settings.seed, listing)
        check_runs(settings.detectors, settings.measures, settings.seed)
    from explain2me.workers.device import with_device

    settings = with_device(settings)
    console = make_console()
    if verify_hashes:
        _verify_hashes(settings, listing, console)
    if training is not None:
        _check_training(settings, out, listing, console)
    if settings.detectors:
        _check_run(settings, out, listing, console)


def _check_run(config: "Config", out: Path | None, listing: "Listing", console: "Console") -> None:
    """Check the detectors that the config names, and print what would run."""
    from explain2me.images.select import select_images
    from explain2me.run.conditions import conditions_for
    from explain2me.stages import check as stage
    from explain2me.stages.refusals import refuse_other_run

    if out is not None and config.training is None:
        refuse_other_run(config, out)
    images, record = stage.check(config, select_images(config.data, config.seed, listing))
    if config.training is None:  # a study has printed its warnings
        _print_warnings(config, record, images, listing, console)
    for model in record["models"]:
        name = f"{model['detector']} {model['run']}: {model['architecture']}"
        console.print(printable(f"{name}, {_sizes(model, record)}"), markup=False)
    conditions = conditions_for(config.measures, tuple(record["models"][0]["input_size"]))
    passes = len(images) * len(conditions) * len(record["models"])
    console.print(printable(class_order_text(record["classes"], config.data.positive)), markup=False)
    console.print("the images were not opened: `explain2me run` does that first and says which cannot be used")
    console.print(
        f"{len(images)} images x {len(conditions)} conditions x {len(record['models'])} models = {passes} forward passes "
        f"on {config.compute.device}",
        markup=False,
    )


def _print_warnings(
    config: "Config", record: "Mapping[str, Any]", images: "Table", listing: "Listing", console: "Console"
) -> None:
    """Print what is allowed and probably not meant."""
    from explain2me.run.record import Model
    from explain2me.stages.check import warnings_of

    models = [Model(**model) for model in record["models"]]
    warnings = warnings_of(config, models, images, listing, classes=record["classes"], map_sizes=record["map_sizes"])
    for warning in warnings:
        console.print(printable(f"warning: {warning}"), markup=False)


def _sizes(model: "Mapping[str, Any]", record: "Mapping[str, Any]") -> str:
    """Of the input and the maps of one model of run.json."""
    height, width = record["map_sizes"][f"{model['detector']}__{model['run']}"]
    sides = "x".join(str(side) for side in model["input_size"])
    return f"input {sides}, layer {model['layer']}, maps of {height}x{width} cells"


def _verify_hashes(config: "Config", listing: "Listing", console: "Console") -> None:
    """Compare every image to test with its hash; exit code 2 if one differs or is missing."""
    from explain2me.images.examine import verify_hashes
    from explain2me.images.listing import image_root
    from explain2me.images.select import require_all_hashes

    images = require_all_hashes(config.data, config.training, config.seed, listing)
    with progress_bars(console) as progress:
        task = progress.add_task("read", total=len(images))
        bad = verify_hashes(
            images,
            image_root(Path(config.data.manifest)),
            on_done=lambda done: progress.update(task, completed=done),
        ).to_pylist()
    if bad:
        lines = [f"{row['path']}: {row['kind']}: {row['message']}" for row in bad[:MOST_MISMATCHES]]
        lines += [f"and {len(bad) - MOST_MISMATCHES} more"] if len(bad) > MOST_MISMATCHES else []
        for line in [*lines, f"{len(bad)} of {len(images)} images are not what the manifest names"]:
            print(printable(f"explain2me: {line}"), file=sys.stderr)
        raise typer.Exit(2)
    console.print(f"{len(images)} images have the bytes that the manifest names")


def _check_training(config: "Config", out: Path | None, listing: "Listing", console: "Console") -> None:
    """Check what a study would train, and print it; every image and human map to train on is opened."""
    from explain2me.train.data import read_splits
    from explain2me.train.study import check_comparison, check_devices, check_runs, plan_study, refuse_other_study
    from explain2me.train.training import check_architectures

    study = plan_study(config, out or Path())
    check_runs(study)
    if out is None or study.unfinished:
        check_devices(study.settings, config.compute.executor)
    splits = read_splits(study.listed, config.data.max_pixels)
    if out is not None:
        refuse_other_study(study, splits)
    _print_strategies(study.settings, splits, console)
    check_architectures(study.trainings, len(splits.classes))
    images, record = check_comparison(study)
    _print_warnings(config, record, images, listing, console)
    for architecture in study.settings.architectures:
        model = next(model for model in record["models"] if model["architecture"] == architecture)
        console.print(printable(f"{architecture}: {_sizes(model, record)}"), markup=False)
    console.print(f"test: {len(images)} images")
    console.print(printable(class_order_text(record["classes"], config.data.positive)), markup=False)
    for detector, count in Counter(training.detector for training in study.trainings).items():
        console.print(printable(f"{detector}: {count} run(s) of {study.settings.epochs} epochs"), markup=False)


def _print_strategies(settings: "TrainingConfig", splits: "Splits", console: "Console") -> None:
    """Print what each strategy minimises, and which images a study trains on."""
    from explain2me.detectors.cards import human_maps_in_words
    from explain2me.train.human_maps import CHECK_SIZE, read_human_maps

    for strategy in settings.strategies:
        maps = read_human_maps(strategy, splits.training, CHECK_SIZE)
        kind = f"human maps: {human_maps_in_words(None if maps is None else maps.record)}"
        console.print(printable(f"strategy {strategy.name}: {strategy.loss}, {kind}"), markup=False)
    for name in ("training", "validation"):
        if name in splits.record:
            counts = splits.record[name]["by_label_and_source"].items()
            shown = ", ".join(f"{group} {count}" for group, count in counts)
            console.print(printable(f"{name}: {splits.record[name]['images']} images ({shown})"), markup=False)


def class_order_text(classes: "Sequence[str]", positive: str) -> str:
    """The classes in the order of the logits, and which is positive, as one line."""
    shown = ", ".join(classes) if len(classes) <= 12 else f"{', '.join(classes[:10])}, ... ({len(classes)})"
    use = f"positive: {positive}" if positive in classes else "no labels, so no AUROC"
    return f"classes, in the order of the logits: {shown}; {use}"
