"""Before stage 1: check the config against the files it names, index the images, write run.json."""

import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from glob import glob
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

import explain2me
from explain2me.batch_size import find_batch_size
from explain2me.cells import FEW_CELLS
from explain2me.conditions import conditions_for
from explain2me.config import Config, DetectorConfig, digest, fingerprint, was_and_is
from explain2me.crashes import RUNNING
from explain2me.detectors import Detector, load_detector
from explain2me.errors import CheckpointError, ConfigError, Explain2MeError, ManifestError, RunFolderError, nearest
from explain2me.executors import Engine
from explain2me.files import TEMPORARY, sha256_of, write_json, write_parquet
from explain2me.index import PARTS, forget_chunks, index_run
from explain2me.manifest import (
    check_labels,
    list_images,
    missing_files,
    require_hashes,
    sample_images,
    splits_of,
    unread_containers,
)
from explain2me.salience import GradCAM
from explain2me.store import IMAGES, QUARANTINE, SCHEMA_VERSION, Model, Run, open_run, sealed
from explain2me.trained import reading_warnings, trained

RESERVED = "all"
"""What tables call every label, every source and the mean over runs."""


def prepare(
    config: Config,
    folder: Path,
    *,
    share: tuple[int, int] = (0, 1),
    on_indexed: Callable[[int, int], None] | None = None,
) -> Run:
    """Check everything that a run needs, index its images and write run.json, or open the run that is there.

    Args:
        config: of the run.
        folder: of the run; made if missing.
        share: (i, N) of several machines that may do this in one folder at the same time.
        on_indexed: called with the number of images read, and of all.

    Raises:
        Explain2MeError: wrong config, manifest, checkpoint or layer; or ``folder`` holds something else.
    """
    old = _open_old(folder)
    given = config
    config = with_device(config, old.config if old else None)
    if old is not None:
        _refuse_other(old.config, config, folder)
        _refuse_vanished(old)
    images, record = check(config)
    if old is None and config.compute.batch_size == "auto":
        config = _with_batch_size(config, len(record["classes"]))
        record = record | {"config": json.loads(config.model_dump_json())}
    if old is None and not _begin(config, images, record, folder, share, on_indexed):
        old = open_run(folder)  # another machine has begun it in the meantime
        config = with_device(given, old.config)
        _refuse_other(old.config, config, folder)
        record = record | {"config": json.loads(config.model_dump_json())}
    if old is not None:
        for key, what in (("listed", "the manifest"), ("models", "a checkpoint")):
            if old.record[key] != record[key]:
                raise RunFolderError(
                    f"{what} is not what {str(folder)!r} was made from; put it back, or give a new folder with --out"
                )
        _record_versions(old, record, folder)
    return open_run(folder)


def _refuse_vanished(old: Run) -> None:
    """A pattern that finds fewer checkpoints than before would be taken for another config."""
    for model in old.models:
        if model.checkpoint is not None and not Path(model.checkpoint).exists():
            raise CheckpointError(
                f"{model.checkpoint!r}, with which the run in {str(old.folder)!r} was begun, is not there any more; put it "
                f"back, or give a new folder with --out"
            )


def _with_batch_size(config: Config, num_classes: int) -> Config:
    def load(wanted: DetectorConfig) -> Detector:
        _, checkpoint, seed = weights_of(wanted, config.seed)[0]
        return load_model(wanted, checkpoint, seed, num_classes)

    compute = config.compute.model_copy(update={"batch_size": find_batch_size(config, load)})
    return config.model_copy(update={"compute": compute})


def engine_of(config: Config) -> Engine:
    """Who carries the shards."""
    compute = config.compute
    gpus = compute.gpus_per_worker if compute.device.startswith("cuda") else 0.0
    return Engine(compute.executor, compute.workers, compute.threads, compute.ray_address, gpus)


def _begin(
    config: Config,
    images: pa.Table,
    record: dict[str, Any],
    folder: Path,
    share: tuple[int, int],
    on_indexed: Callable[[int, int], None] | None,
) -> bool:
    """Index the images and write run.json; False where another process was first."""
    source = Path(config.data.manifest)
    engine = engine_of(config)
    limit = config.data.max_pixels
    found = index_run(images, source, folder, engine, max_pixels=limit, share=share, on_done=on_indexed)
    if found is None or (folder / "run.json").exists():
        forget_chunks(folder)
        return False
    usable, refused = found
    if not len(usable):
        forget_chunks(folder)  # which may be what a disk that was not there left
        raise ManifestError(
            f"none of the {len(images)} images of {str(source)!r} can be used; "
            f"the first: {refused['path'][0].as_py()!r}: {refused['message'][0].as_py()}"
        )
    images_file, refused_file = folder / "images.parquet", folder / "quarantine" / "index.parquet"
    write_parquet(_ordered(usable), images_file)
    if len(refused):
        write_parquet(_quarantine_rows(refused), refused_file)
    else:
        refused_file.unlink(missing_ok=True)  # of a call that was stopped
    told = {model["weights_sha256"]: trained(Model(**model)) for model in record["models"]}
    known = {sha256: card for sha256, card in told.items() if card is not None}
    record = record | ({"trained": known} if known else {})
    whole = record | provenance() | {"num_listed": len(images), "images_sha256": sha256_of(folder / "images.parquet")}
    first = write_json(sealed(whole), folder / "run.json", replace=False)
    forget_chunks(folder)
    return first


def _record_versions(old: Run, record: dict[str, Any], folder: Path) -> None:
    """run.json says with which other versions a run was gone on with."""
    versions = provenance()["versions"]
    known = [old.record["versions"], *old.record.get("later_versions", [])]
    later = {} if versions in known else {"later_versions": [*known[1:], versions]}
    found = sealed(old.record | {"config": record["config"]} | later)
    if found != old.record:
        write_json(found, folder / "run.json")


def check(config: Config) -> tuple[pa.Table, dict[str, Any]]:
    """Validate a config against the files it names; computes nothing and writes nothing.

    Returns:
        The listed images, and the start of run.json.

    Raises:
        Explain2MeError: the first thing that is wrong.
    """
    images, classes = check_images(config)
    sizes = check_models(config, len(classes) or None)
    models = list(sizes)
    if not classes:
        classes = tuple(str(i) for i in range(models[0].num_classes))
    if config.salience.target not in ("predicted", "true", *classes):
        raise ConfigError(
            f"salience.target: expected predicted, true or a class, got {config.salience.target!r}; "
            f"{nearest(config.salience.target, ['predicted', 'true', *classes])}"
        )
    record = {
        "schema": SCHEMA_VERSION,
        "config": json.loads(config.model_dump_json()),
        "classes": list(classes),
        "models": json.loads(json.dumps([asdict(model) for model in models])),
        "map_sizes": {model.name: list(size) for model, size in sizes.items()},
        "listed": digest(images.to_pylist()),
    }
    return images, record


def check_images(config: Config) -> tuple[pa.Table, tuple[str, ...]]:
    """The listed images and their classes in the order of the logits; opens no image.

    Raises:
        Explain2MeError: the first thing that is wrong.
    """
    images = list_images(Path(config.data.manifest), split=config.data.split, classes=config.data.classes)
    for name in ("label", "source"):
        if RESERVED in images[name].to_pylist():
            raise ManifestError(f"{config.data.manifest!r}: the {name} {RESERVED!r} means all of them; rename it")
    images = sample_images(images, config.data.sample, seed=config.seed)
    labelled = images["label"].null_count < len(images)
    if not labelled and config.salience.target == "true":
        raise ConfigError("salience.target = 'true' needs labels, the manifest has none; use 'predicted'")
    return images, class_names(config, images, repr(config.data.manifest))


def refuse_other_run(config: Config, folder: Path) -> None:
    """Raise a RunFolderError where ``folder`` holds a run of another config."""
    old = _open_old(folder)
    if old is not None:
        _refuse_other(old.config, with_device(config, old.config), folder)


def other_than_run(config: Config, folder: Path) -> str | None:
    """What changed since the run in ``folder`` was begun, or None, also where there is no run."""
    old = _open_old(folder)
    return None if old is None else _changed(old.config, with_device(config, old.config))


def require_all_hashes(config: Config) -> pa.Table:
    """The images to test, after a check that each, and each to train on, has a hash in its manifest.

    Raises:
        ManifestError: an image without one, or a manifest that is wrong.
    """
    source = Path(config.data.manifest)
    training = config.training
    if training is not None:
        trained = Path(training.manifest or source)
        splits = {training.split, training.validation_split or training.split}
        for split in sorted(splits, key=str):
            require_hashes(list_images(trained, split=split, classes=config.data.classes), trained)
    listed = list_images(source, split=config.data.split, classes=config.data.classes)
    images = sample_images(listed, config.data.sample, seed=config.seed)
    require_hashes(images, source)
    return images


def warnings_of(
    config: Config,
    models: Sequence[Model],
    images: pa.Table,
    *,
    classes: Sequence[str] = (),
    map_sizes: Mapping[str, Sequence[int]] | None = None,
) -> list[str]:
    """What is allowed and probably not meant.

    Args:
        config: of the run.
        models: of it.
        images: that are listed; of a manifest some are looked for, none is opened.
        classes: in the order of the logits.
        map_sizes: height and width of the maps of each model in cells, by its name.
    """
    found = reading_warnings(models, classes)
    sizes = {(model.architecture, tuple((map_sizes or {})[model.name])) for model in models} if map_sizes else set()
    found += [
        f"the maps of {architecture} have only {size[0]} x {size[1]} cells: they say little of where a model looks; a larger "
        f"input_size {'gives' if config.training else 'or an earlier layer gives'} finer maps"
        for architecture, size in sorted(sizes)
        if math.prod(size) < FEW_CELLS
    ]
    missing, looked = missing_files(Path(config.data.manifest), images)
    if missing:
        of_them = (
            f"{looked} images"
            if looked == len(images)
            else f"{looked} images that were looked for ({len(images)} in all)"
        )
        found.append(
            f"no file where the manifest says it is, for {len(missing)} of {of_them}, first {missing[0]!r}: paths are relative to the "
            f"folder of the manifest, or absolute"
        )
    if "positive" in config.data.model_fields_set and images["label"].null_count == len(images):
        found.append(
            f"data.positive = {config.data.positive!r} is set, but no image has a label (column 'label' of a manifest, the folders "
            f"of a folder), so there is no AUROC"
        )
    splits = splits_of(Path(config.data.manifest))
    if config.data.split is None and len(splits) > 1:
        named = ", ".join(f"{name!r} ({count})" for name, count in sorted(splits.items()))
        found.append(f"data.split is not set, so the rows of all splits are taken: {named}")
    unread = unread_containers(Path(config.data.manifest))
    if unread:
        found.append(
            f"data.manifest is read as a folder of images, so its {len(unread)} container files are left out, first {unread[0]!r}"
        )
    return found


def class_names(
    config: Config,
    images: pa.Table,
    where: str,
    *,
    alone: str = "add images of another label, without which there is no AUROC, or name in data.classes all labels that "
    "the model knows, in the order of its logits",
) -> tuple[str, ...]:
    """Labels in the order of the logits: two labels are (other, positive), more are sorted; () without labels.

    Args:
        config: says which class is positive, and perhaps the order.
        images: with the column label.
        where: they are listed, for errors.
        alone: what to do where all have one label, for errors.

    Raises:
        ManifestError: a label that is not among data.classes.
        ConfigError: data.positive is not a class.
    """
    found = sorted(set(images["label"].drop_null().to_pylist()))
    classes, positive = config.data.classes, config.data.positive
    folded = {label.casefold().strip() for label in found}
    if len(folded) < len(found):
        raise ManifestError(
            f"{where}: expected labels that differ by more than case and spaces, got {found}; write each "
            f"class in one way"
        )
    if classes is not None:
        check_labels(images, classes)
    elif len(found) == 1:
        raise ConfigError(f"{where}: expected images of at least two labels, got only {found[0]!r}; {alone}")
    else:
        classes = tuple(sorted(found, key=lambda label: (label == positive and len(found) == 2, label)))
    if classes and positive not in classes:
        raise ConfigError(
            f"data.positive: expected one of the labels {', '.join(map(repr, classes))} of {where}, got {positive!r}; "
            f"{nearest(positive, classes)}"
        )
    return classes


def check_models(config: Config, num_classes: int | None) -> dict[Model, tuple[int, int]]:
    """Load every checkpoint once, and check its classes, layer and conditions.

    Returns:
        Every model, and height and width of its maps in cells.

    Raises:
        CheckpointError, LayerError, ConfigError: the first detector that cannot be used.
    """
    if not config.detectors:
        raise ConfigError(
            "detectors: this config has none but trains its own ([training]); call `explain2me study` with it, which "
            "trains and then runs"
        )
    sizes: dict[Model, tuple[int, int]] = {}
    for wanted in config.detectors:
        runs = weights_of(wanted, config.seed)
        if config.measures.stability and len(runs) < 2:
            raise ConfigError(
                f"measures.stability compares training runs and needs at least 2 of each detector, {wanted.name!r} has "
                f"{len(runs)}; add checkpoints, or set measures.stability = false"
            )
        found = dict(_check_model(config, wanted, *weights, num_classes) for weights in runs)
        _refuse_copies(wanted.name, list(found))
        sizes |= found
    heads = {model.num_classes for model in sizes}
    if len(heads) > 1:
        raise ConfigError(
            f"detectors: expected the same number of classes in all, got {sorted(heads)}; compare like with like"
        )
    return sizes


def _refuse_copies(detector: str, models: Sequence[Model]) -> None:
    """The same weights twice are no two training runs: they would agree perfectly."""
    seen: dict[str, Model] = {}
    for model in models:
        first = seen.setdefault(model.weights_sha256, model)
        if first is not model:
            raise CheckpointError(
                f"detector {detector!r}: {first.checkpoint or first.run!r} and {model.checkpoint or model.run!r} hold the "
                f"same weights, so they are not two training runs; list one of them"
            )


def weights_of(detector: DetectorConfig, seed: int) -> list[tuple[str, str | None, int]]:
    """(run name, checkpoint or None, seed of random weights) of each run of a detector.

    Raises:
        CheckpointError: a pattern matches no file.
    """
    if detector.checkpoints is None:
        if detector.random_runs is None:
            return [("pretrained", None, seed)]
        return [(f"random{i}", None, seed + i) for i in range(detector.random_runs)]
    patterns = (detector.checkpoints,) if isinstance(detector.checkpoints, str) else detector.checkpoints
    paths: list[str] = []
    for pattern in patterns:
        exists = os.path.exists(pattern)  # noqa: PTH110 - False for a name that no file can have
        found = [pattern] if exists else sorted(glob(pattern, recursive=True))  # noqa: PTH207 - patterns may be absolute
        if not found:
            raise CheckpointError(
                f"detector {detector.name!r}: no file matches checkpoints = {pattern!r}; give a path or a pattern, "
                f"such as weights/*.safetensors, relative to the TOML file"
            )
        paths += [path for path in found if path not in paths]
    stems = [Path(path).stem.replace("__", "_").lstrip(".") for path in paths]
    if len(set(stems)) < len(stems) or RESERVED in stems:
        stems = [f"run{i:02d}" for i in range(len(paths))]
    return [(stem, path, seed) for stem, path in zip(stems, paths, strict=True)]


def load_model(wanted: DetectorConfig, checkpoint: str | None, seed: int, num_classes: int | None) -> Detector:
    """The detector of one run, on the CPU and in evaluation mode; errors name the detector."""
    size = (wanted.input_size, wanted.input_size) if isinstance(wanted.input_size, int) else wanted.input_size
    try:
        return load_detector(
            wanted.architecture,
            Path(checkpoint) if checkpoint else None,
            num_classes=num_classes,
            pretrained=wanted.pretrained,
            input_size=size,
            mean=wanted.mean,
            std=wanted.std,
            interpolation=wanted.interpolation,
            seed=seed,
        )
    except Explain2MeError as error:
        raise type(error)(f"detector {wanted.name!r}: {error}") from None


def provenance(*more: str) -> dict[str, Any]:
    """Versions, of ``more`` packages too, git state and hardware kind of this process."""
    packages = ("torch", "torchvision", "timm", "numpy", "pyarrow", "pillow", *more)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = {"explain2me": explain2me.__version__, "python": platform.python_version()}
    return {
        "versions": versions | {name: version(name) for name in packages},
        "git": _git_state(),
        "hardware": {"device": device, "system": platform.system()},
    }


def with_device(config: Config, old: Config | None = None) -> Config:
    """The config with ``auto`` replaced by the kind of device at hand (cuda, mps or cpu), and threads by a number.

    Args:
        config: of the run.
        old: the config that the run was begun with, whose number of threads and batch size stay.
    """
    device, threads = config.compute.device, config.compute.threads
    if threads is None:
        threads = old.compute.threads if old else max(1, torch.get_num_threads() // config.compute.workers)
    device = real_device(device, "compute.device")
    size = config.compute.batch_size
    if size == "auto" and old is not None:
        size = old.compute.batch_size
    compute = config.compute.model_copy(update={"device": device, "threads": threads, "batch_size": size})
    return config.model_copy(update={"compute": compute})


def real_device(device: str, key: str) -> str:
    """``auto`` replaced by the kind of device at hand.

    Raises:
        ConfigError: the device that ``key`` of the config names is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{key} = {device!r}: {torch.cuda.device_count() or 'no'} CUDA devices are visible here; use 'auto' or "
            f"'cpu'" + (", or a smaller number" if torch.cuda.device_count() else "")
        )
    if device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"{key} = 'mps': there is none here; use 'auto' or 'cpu'")
    return device


def _check_model(
    config: Config, wanted: DetectorConfig, run: str, checkpoint: str | None, seed: int, num_classes: int | None
) -> tuple[Model, tuple[int, int]]:
    detector = load_model(wanted, checkpoint, seed, num_classes)
    conditions_for(config.measures, detector.input_size)
    blank = torch.zeros(1, 3, *detector.input_size, dtype=torch.uint8)
    with GradCAM(detector.model, layer=wanted.layer) as cam:
        try:
            maps, _ = cam(detector.preprocess(blank))
        except Explain2MeError as error:
            raise type(error)(f"detector {wanted.name!r}: {error}") from None
        except Exception:
            _refuse_size(wanted, detector, blank)
            raise
        layer = cam.layer
    model = Model(
        detector=wanted.name,
        run=run,
        architecture=wanted.architecture,
        checkpoint=checkpoint,
        seed=seed,
        weights_sha256=detector.weights_sha256,
        layer=layer,
        input_size=detector.input_size,
        num_classes=detector.num_classes,
        mean=tuple(detector.mean),
        std=tuple(detector.std),
        interpolation=detector.interpolation,
    )
    return model, (maps.shape[-2], maps.shape[-1])


def _refuse_size(wanted: DetectorConfig, detector: Detector, blank: torch.Tensor) -> None:
    """Raise ConfigError where the model alone fails as well: then its input has not the size that it needs."""
    try:
        with torch.no_grad():
            detector.model(detector.preprocess(blank))
    except Exception as error:
        height, width = detector.input_size
        reason = str(error).split("\n", maxsplit=1)[0][:160]
        raise ConfigError(
            f"detector {wanted.name!r}: {wanted.architecture} does not take images of {height} x {width} pixels ({reason}); "
            f"change input_size or leave it out"
        ) from None


def _open_old(folder: Path) -> Run | None:
    if (folder / "run.json").exists():
        return open_run(folder)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{str(folder)!r} is a file; give a new folder with --out")
    ours = ("images.parquet", "quarantine", "events", PARTS, TEMPORARY, RUNNING)  # of a call stopped before run.json
    if folder.exists() and not all(path.name.startswith(ours) for path in folder.iterdir()):
        if (folder / "run.json").exists():  # another machine has just written it
            return open_run(folder)
        todo = "call `explain2me study`, or give" if (folder / "training").exists() else "give"
        raise RunFolderError(f"{str(folder)!r} is not empty and not a run; {todo} a new folder with --out")
    return None


def _refuse_other(old: Config, new: Config, folder: Path) -> None:
    change = _changed(old, new)
    if change:
        raise RunFolderError(
            f"the output folder {str(folder)!r} holds a run of another config: {change}; "
            f"give a new folder with --out, or delete the old one"
        )


def _changed(old: Config, new: Config) -> str | None:
    """The first field that differs and decides numbers, what it was and is."""
    before, after = fingerprint(old), fingerprint(new)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if not changed:
        return None
    key = changed[0]
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return was_and_is(before, after, key) + more


def _ordered(images: pa.Table) -> pa.Table:
    """Rows by label and source, then as in the manifest, so that images to compare stand together."""
    labels, sources = images["label"].to_pylist(), images["source"].to_pylist()
    order = sorted(range(len(images)), key=lambda i: (labels[i] or "", sources[i], i))
    images = images.take(order).append_column("image", pa.array(range(len(images)), pa.int32()))
    return images.select(IMAGES.names).cast(IMAGES)


def _quarantine_rows(refused: pa.Table) -> pa.Table:
    rows = [{"image": None, "model": None, **row} for row in refused.to_pylist()]
    return pa.Table.from_pylist(rows, schema=QUARANTINE)


def _git_state() -> dict[str, Any] | None:
    """Commit of the folder the command was started in, and whether it had changes; None outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
