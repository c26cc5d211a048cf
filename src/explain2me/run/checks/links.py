"""A run folder holds files and folders only: through a link, a command would read or change files elsewhere."""

import os
from collections.abc import Collection
from pathlib import Path

from explain2me.errors import RunFolderError

DEEPEST = 32
"""Folders inside each other; those of a run are four, and a person may keep files in the report."""
WRITTEN_IN_PLACE = (".lock", ".mlflow.lock", "events")
"""Start of the names of files that are opened for writing, not replaced."""


def refuse_links(folder: Path, *, inside: Collection[str] = (), skip: Collection[str] = ()) -> None:
    """Refuse a folder with a link, pipe or device at any depth; its own path may be a link.

    Args:
        folder: may be missing.
        inside: names of the files and folders in it to look at; by default all.
        skip: names of folders at any depth whose content others write.

    Raises:
        RunFolderError: names the first one; or folders are too deep, or a log file has a second name elsewhere.
    """
    left = [(str(folder), 0)]
    while left:
        place, depth = left.pop()
        for entry in _entries(place):
            if depth == 0 and inside and entry.name not in inside:
                continue
            _refuse_odd(entry, at_the_top=depth == 0)
            if entry.is_dir(follow_symlinks=False) and entry.name not in skip:
                left.append((entry.path, depth + 1))
        if depth > DEEPEST:
            raise RunFolderError(f"{place[:300]!r} lies {depth} folders deep in a run; expected at most {DEEPEST}")


def _entries(place: str) -> list[os.DirEntry[str]]:
    """What a folder holds; nothing if there is none, or another process has removed it."""
    try:
        with os.scandir(place) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _refuse_odd(entry: os.DirEntry[str], *, at_the_top: bool) -> None:
    """Raise for all but files and folders. The type of an entry comes with its name: no file is looked at."""
    if entry.is_symlink():
        raise RunFolderError(
            f"{entry.path!r} is a link, and commands on a run or study follow none; put the file or folder itself in its "
            f"place, or move the link away. The path of the whole folder may be a link"
        )
    if entry.is_dir(follow_symlinks=False):
        return
    if not entry.is_file(follow_symlinks=False):
        raise RunFolderError(f"{entry.path!r} is a pipe or a device; expected files and folders; move it away")
    if at_the_top and entry.name.startswith(WRITTEN_IN_PLACE) and entry.stat(follow_symlinks=False).st_nlink > 1:
        raise RunFolderError(
            f"{entry.path!r} has a second name (a hard link), and this command would write into both; replace it by a copy"
        )
