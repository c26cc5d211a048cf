"""Refuse a folder that holds a run of another config."""

from pathlib import Path
from typing import Any

from explain2me.config.compare import fingerprint, was_and_is
from explain2me.config.schema import Config
from explain2me.errors import RunFolderError
from explain2me.run.checks.links import refuse_links
from explain2me.run.folder import Run, open_run
from explain2me.run.leftovers import TEMPORARY
from explain2me.stages.index import PARTS
from explain2me.workers.device import with_device

GROWING_FIELDS = (
    "detectors",
    "measures",
    "data.manifest",
    "data.split",
    "data.sample",
    "data.classes",
    "data.max_pixels",
)
"""Fields by which a run may grow; what they lead to is compared instead, see :mod:`explain2me.stages.growth`."""


def refuse_other_run(config: Config, folder: Path) -> None:
    """Raise a RunFolderError if ``folder`` holds a run of another config."""
    old = open_existing(folder)
    if old is not None:
        refuse_other_config(old.config, with_device(config, old.config), folder)


def other_than_run(config: Config, folder: Path) -> str | None:
    """The first change since the run in ``folder`` began; None if there is no change or no run."""
    old = open_existing(folder)
    return None if old is None else _first_change(old.config, with_device(config, old.config))


def open_existing(folder: Path) -> Run | None:
    """The run in a folder, also one that is being changed, or None if there is none yet.

    Raises:
        RunFolderError: the folder holds something else, or a link.
    """
    refuse_links(folder)
    if (folder / "run.json").exists():
        return Run(folder, unfinished=True)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{str(folder)!r} is a file; give a new folder with --out")
    before_run_json = ("images.parquet", "quarantine", "events", PARTS, TEMPORARY)  # left by a call that was stopped
    if folder.exists() and not all(path.name.startswith(before_run_json) for path in folder.iterdir()):
        if (folder / "run.json").exists():  # another machine has just written it
            return open_run(folder)
        todo = "call `explain2me study`, or give" if (folder / "training").exists() else "give"
        raise RunFolderError(f"{str(folder)!r} is not empty and not a run; {todo} a new folder with --out")
    return None


def refuse_other_config(old: Config, new: Config, folder: Path) -> None:
    """Raise a RunFolderError if two configs give different maps."""
    change = _first_change(old, new)
    if change:
        raise RunFolderError(
            f"the output folder {str(folder)!r} holds a run of another config: {change}; "
            f"give a new folder with --out, or move the old one away"
        )


def _first_change(old: Config, new: Config) -> str | None:
    """The first field that differs and decides numbers that are there, with its old and its new value."""
    before, after = _settled(old), _settled(new)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if not changed:
        return None
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    return was_and_is(before, after, changed[0]) + more


def _settled(config: Config) -> dict[str, Any]:
    """The fields that decide the maps and cannot change while a run grows."""
    return {key: value for key, value in fingerprint(config).items() if not key.startswith(GROWING_FIELDS)}
