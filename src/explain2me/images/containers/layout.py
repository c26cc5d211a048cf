"""Find container files: on the way of a path, in a folder, and where ``datasets`` saved a data set to disk.

The split of a container without a column or key ``split`` comes from its name: first from a numbered name
(``train-00000-of-00002.parquet``), then from the nearest folder above it that is called train, val, test or the like,
then from such a word in the name (``faces-test-000.tar``).
"""

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from explain2me.errors import ManifestError
from explain2me.images.containers.formats import FORMATS
from explain2me.images.containers.rows import Container, as_text, json_object
from explain2me.images.rows import SUFFIXES

COMPRESSED_TARS = (".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz", ".tar.zst", ".tar.lz4")
MAX_STATE = 2**24
"""Bytes of ``state.json`` and ``dataset_dict.json``."""
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EILSEQ)
"""Codes of an OSError about a path that leads to no file."""
SPLITS = frozenset(("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"))


def container_of(path: Path) -> tuple[Path, str] | None:
    """The container file that ``path`` leads into, and the rest of the path; None where it leads into none.

    >>> container_of(Path("no/such.tar/real/001.jpg"))
    """
    for folder in path.parents:
        try:
            mode = folder.stat().st_mode
        except ValueError:
            continue
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
            continue
        if stat.S_ISREG(mode) and folder.suffix.lower() in FORMATS:
            return folder, path.relative_to(folder).as_posix()
        return None
    return None


def container_files(source: Path) -> list[Container]:
    """The container files of a data set: a container, or a folder; none where the folder holds images as files.

    Raises:
        ManifestError: a folder cannot be read, or what ``datasets`` saved is damaged.
    """
    if is_container_name(source.name) and not source.is_dir():
        return [_container(source.parent, (source.name,))]
    try:
        if (source / "dataset_dict.json").exists():
            splits = _names_in(_read_object(source / "dataset_dict.json"), "splits", source / "dataset_dict.json")
            return [file for split in splits for file in _saved(source, (split,), split=split)]
        if (source / "state.json").exists() and (source / "dataset_info.json").exists():
            return _saved(source, (), split=None)
        return _files_below(source)
    except OSError as error:
        where = repr(str(error.filename or source))
        raise ManifestError(f"{where}: cannot be read ({error.strerror}); mend that or leave it out") from error


def is_container_name(name: str) -> bool:
    """Whether a file of this name holds images. Compressed tars count; they are refused when they are read.

    >>> is_container_name("shard-0001.tar"), is_container_name("manifest.csv")
    (True, False)
    """
    return name.lower().endswith((*FORMATS, *COMPRESSED_TARS))


def _container(folder: Path, parts: Sequence[str], split: str | None = None) -> Container:
    name = as_text(os.fsencode("/".join(parts)))
    return Container(folder.joinpath(*parts), name, _split_of(parts) if split is None else split)


def _split_of(parts: Sequence[str]) -> str:
    """The split that the name of a container or of a folder above it tells, as it is written; "" for none."""
    numbered = re.match(r"(.+)-\d{5}-of-\d{5}", parts[-1])
    if numbered and numbered[1] != "data":  # what datasets calls the files that it saves
        return as_text(os.fsencode(numbered[1]))
    for part in (*parts[-2::-1], Path(parts[-1]).stem):
        words = {word for word in re.split(r"[-._ \d]+", part) if word.lower() in SPLITS}
        if len(words) == 1:
            return words.pop()
    return ""


def _files_below(folder: Path) -> list[Container]:
    """Container files at any depth, in order; none as soon as an image is met."""
    files: list[Container] = []
    for parts in _walk(folder):
        if Path(parts[-1]).suffix.lower() in SUFFIXES:
            return []
        if is_container_name(parts[-1]):
            files.append(_container(folder, parts))
    return sorted(files)


def _walk(folder: Path) -> Iterator[tuple[str, ...]]:
    """Parts of the path of each file that is not hidden. Links are followed, each folder is entered once."""

    def refuse(error: OSError) -> None:
        raise error

    entered: set[tuple[int, int]] = set()
    for path, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        status = Path(path).stat()
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from ((*Path(path).relative_to(folder).parts, name) for name in files if not name.startswith("."))


def _saved(source: Path, parts: tuple[str, ...], *, split: str | None) -> list[Container]:
    """The files of one data set that ``datasets`` saved, in its order."""
    state_file = source.joinpath(*parts, "state.json")
    state = _read_object(state_file)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ManifestError(
            f"{str(state_file)!r}: rows chosen by a list of indices are not read; call flatten_indices() and save again"
        )
    if split is None:
        split = state["_split"] if isinstance(state.get("_split"), str) else ""
    names = _names_in(state, "_data_files", state_file, key="filename")
    return [_container(source, (*parts, name), split) for name in names]


def _names_in(tree: Mapping[str, Any], field: str, where: Path, *, key: str | None = None) -> list[str]:
    """The list of plain file names in a field of a JSON object."""
    items = tree.get(field)
    items = items if isinstance(items, list) else []
    names = [item.get(key) if key and isinstance(item, dict) else item for item in items]
    plain = [name for name in names if isinstance(name, str) and re.fullmatch(r"(?!\.)[^/\\\0]+", name)]
    if not plain or len(plain) < len(names):
        raise ManifestError(
            f"{str(where)!r}: expected a list of plain file names in {field!r}, got {str(names)[:100]!r}; save the data "
            f"set again"
        )
    return plain


def _read_object(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return json_object(file.read(MAX_STATE), repr(str(path)))
