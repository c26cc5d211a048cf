"""Refuse a folder that holds a run of another config, and images without a hash."""

from pathlib import Path

import pyarrow as pa

from explain2me.config.compare import fingerprint, was_and_is
from explain2me.config.schema import Config
from explain2me.errors import RunFolderError
from explain2me.images.listing import list_images, require_hashes, sample_images
from explain2me.run.folder import Run, open_run
from explain2me.run.leftovers import TEMPORARY
from explain2me.stages.index import PARTS
from explain2me.workers.device import with_device


def refuse_other_run(config: Config, folder: Path) -> None:
    """Raise a RunFolderError where ``folder`` holds a run of another config."""
    old = open_existing(folder)
    if old is not None:
        refuse_other_config(old.config, with_device(config, old.config), folder)


def other_than_run(config: Config, folder: Path) -> str | None:
    """What changed since the run in ``folder`` was begun, or None, also where there is no run."""
    old = open_existing(folder)
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


def open_existing(folder: Path) -> Run | None:
    """The run in a folder, or None where there is none yet.

    Raises:
        RunFolderError: the folder holds something else.
    """
    if (folder / "run.json").exists():
        return open_run(folder)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{str(folder)!r} is a file; give a new folder with --out")
    ours = ("images.parquet", "quarantine", "events", PARTS, TEMPORARY)  # of a call stopped before run.json
    if folder.exists() and not all(path.name.startswith(ours) for path in folder.iterdir()):
        if (folder / "run.json").exists():  # another machine has just written it
            return open_run(folder)
        todo = "call `explain2me study`, or give" if (folder / "training").exists() else "give"
        raise RunFolderError(f"{str(folder)!r} is not empty and not a run; {todo} a new folder with --out")
    return None


def refuse_other_config(old: Config, new: Config, folder: Path) -> None:
    """Raise a RunFolderError where two configs would give other maps."""
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
