"""Walk a folder of images once. Opens no image, and imports nothing heavy."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from explain2me.errors import ManifestError
from explain2me.images.containers import is_container_name
from explain2me.images.rows import SUFFIXES


class FolderFiles(NamedTuple):
    """Files below a folder.

    ``images``: the parts of the path of each image, below the folder. ``num_ignored``: number of other files, and of
    hidden files and folders. ``containers``: names of container files in the folder itself.
    """

    images: list[tuple[str, ...]]
    num_ignored: int
    containers: list[str]


def walk_folder(folder: Path) -> FolderFiles:
    """Find the images below a folder by their suffix. Links are followed, except to a folder above them.

    Raises:
        ManifestError: a folder cannot be read.
    """
    images: list[tuple[str, ...]] = []
    containers: list[str] = []
    num_ignored = 0
    to_visit: list[tuple[str, tuple[str, ...], frozenset[tuple[int, int]]]] = [(str(folder), (), frozenset())]
    while to_visit:
        path, parts, above = to_visit.pop()
        try:
            status = Path(path).stat()
            if (status.st_dev, status.st_ino) in above:  # a link to a folder above: a circle
                continue
            entries = list(os.scandir(path))
        except OSError as error:
            raise ManifestError(
                f"{str(path)!r}: the folder cannot be read ({error.strerror}); mend that or leave it out"
            ) from error
        for entry in entries:
            name = os.fsencode(entry.name).decode("utf-8", "backslashreplace")
            if entry.name.startswith("."):
                num_ignored += 1
            elif Path(entry.name).suffix.lower() in SUFFIXES:
                images.append((*parts, name))
            elif is_folder(Path(entry.path)):
                to_visit.append((entry.path, (*parts, name), above | {(status.st_dev, status.st_ino)}))
            else:
                num_ignored += 1
                if not parts and is_container_name(name):
                    containers.append(name)
    if repeated := ["/".join(parts) for parts, count in Counter(images).items() if count > 1]:
        raise ManifestError(f"{str(folder)!r}: two files are written {repeated[0]!r}; rename the one that is not UTF-8")
    return FolderFiles(images, num_ignored, sorted(containers))


def is_folder(path: Path) -> bool:
    """Whether a path is a folder that can be reached."""
    try:
        return path.is_dir()
    except OSError:  # links in a circle, or a parent that may not be searched
        return False
