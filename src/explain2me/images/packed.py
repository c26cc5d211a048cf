"""The rows of a data set in container files: WebDataset tars, Parquet files, and what ``datasets`` saved to disk.

Rows have the cells of a manifest, see :func:`explain2me.images.listing.list_images`; no image is read.

A tar holds samples: files whose names are alike up to the first dot after the last slash. The image is the one whose
extension is an image suffix (``KEY.jpg``); ``KEY.cls`` holds the label as text or as a number, ``KEY.json`` an object
with the keys label, source, split, image_id and sha256, each of which may be absent (that sha256 of img2dataset is left out: it
is of the download, before it was resized, as are the Parquet files beside its tars); other files and names that begin
with a dot are left out. Without labels in these, folders name them: ``label/source/KEY.jpg``. ``KEY.salience.png`` (or
.npy, .csv) is the human map of a sample, unless its JSON names one.

Parquet and Arrow files have a column of images and columns by the names of a manifest. Without a column or key
``split`` a numbered name tells it as it is written (``train-00000-of-00002.parquet``), or else the nearest folder above
the file that is called train, val, test or the like, or else such a word in its name (``faces-test-000.tar``).

A number as a label is the name that the file gives to it (``ClassLabel``), or else its place in ``classes``, or else
its decimal digits.
"""

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from explain2me.errors import ImageError, ManifestError
from explain2me.images.containers import KINDS, ROW_DIGITS, Rows, Tar, member_text, open_tar
from explain2me.images.rows import COLUMNS, Row, check_names, folder_labels, is_container_name

MAX_JSON = 2**20
MAX_LABEL = 4096
"""Bytes of a member .json, and of a member .cls."""
_SPLITS = frozenset(
    ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"),
)


class Container(NamedTuple):
    """A container file; ``name``: below the folder of the data set; ``split``: as the data set says, if it does."""

    path: Path
    name: str
    split: str


def container_files(source: Path, image_suffixes: Collection[str]) -> list[Container]:
    """The container files of a data set; none where it is a CSV file, or a folder that holds images as files.

    Raises:
        ManifestError: a folder cannot be read, or what ``datasets`` saved is damaged.
    """
    if is_container_name(source.name) and not source.is_dir():
        return [Container(source, _text_of(source.name), _split_of((source.name,)))]
    try:
        if not source.is_dir():
            return []
        if (source / "dataset_dict.json").exists():
            splits = _list_of(_read_object(source / "dataset_dict.json"), "splits", source / "dataset_dict.json")
            return [file for split in splits for file in _saved(source, split, parts=(split,))]
        if (source / "state.json").exists() and (source / "dataset_info.json").exists():
            return _saved(source, None, parts=())
        return _found_below(source, image_suffixes)
    except OSError as error:
        where = repr(str(error.filename or source))
        raise ManifestError(f"{where}: cannot be read ({error.strerror}); allow it or leave it out") from error


def read_rows(
    source: Path,
    files: Sequence[Container],
    *,
    extra: Sequence[str],
    classes: Sequence[str] | None,
    suffixes: Collection[str],
) -> tuple[list[Row], int]:
    """Rows of all container files, and how many members were left out.

    Args:
        source: as the config names it, for messages.
        files: of :func:`container_files`.
        extra: further columns; read beside :data:`COLUMNS`.
        classes: labels in the order of the logits, for labels that are numbers.
        suffixes: of image files.

    Raises:
        ManifestError: a container cannot be used; the message names it and the member.
    """
    kinds = sorted({file.path.suffix.lower() for file in files})
    if kinds == [".parquet", ".tar"]:
        tars = {file.path.with_suffix("") for file in files if file.path.suffix.lower() == ".tar"}
        files = [file for file in files if file.path.with_suffix("") not in tars or not _tells_of_a_tar(file.path)]
        kinds = sorted({file.path.suffix.lower() for file in files})
    if len(kinds) > 1:
        raise ManifestError(
            f"{str(source)!r}: expected container files of one kind, got {', '.join(kinds)}; give one of them alone"
        )
    names = (*COLUMNS, *extra)
    rows: list[Row] = []
    ignored = 0
    for file in files:
        where = f"{str(source)!r}: {file.name!r}"
        try:
            if kinds == [".tar"]:
                found, left_out = _tar_rows(open_tar(file.path), file, names, classes, suffixes, where)
                ignored += left_out
            elif kinds[0] in KINDS:
                found = _table_rows(Rows(file.path), file, names, classes, where)
            else:
                raise ManifestError(
                    f"{where} is compressed: its members cannot be reached one by one; decompress it to a .tar"
                )
        except ImageError as error:
            raise ManifestError(f"{str(source)!r}: {error.message}") from error
        except OSError as error:
            raise ManifestError(
                f"{where} cannot be read ({error.strerror or error}); give a file that is there"
            ) from error
        rows += found
    if not rows:
        todo = f"the suffixes of images are {', '.join(sorted(suffixes))}"
        raise ManifestError(f"{str(source)!r}: expected images in {len(files)} container files, got none; {todo}")
    if kinds == [".tar"] and not any(row.cells["label"] for row in rows):
        _label_by_folders(rows, repr(str(source)))
    if not any(row.cells["split"] for row in rows):
        for row in rows:
            del row.cells["split"]
    return rows, ignored


# ----------------------------------------------------------------------------------------------- which files there are


def _text_of(path: str) -> str:
    return member_text(os.fsencode(path))


def _found_below(folder: Path, image_suffixes: Collection[str]) -> list[Container]:
    """Container files at any depth, in order; none as soon as an image is met. Links are followed, each folder once."""

    def refuse(error: OSError) -> None:
        raise error

    found: list[Container] = []
    seen: set[tuple[int, int]] = set()
    for path, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        status = Path(path).stat()
        known = (status.st_dev, status.st_ino) in seen
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in sorted(folders) if not (known or name.startswith("."))]
        if known:
            continue
        for name in files:
            if name.startswith("."):
                continue
            if Path(name).suffix.lower() in image_suffixes:
                return []
            if is_container_name(name):
                parts = (*Path(path).relative_to(folder).parts, name)
                found.append(Container(folder.joinpath(*parts), _text_of("/".join(parts)), _split_of(parts)))
    return sorted(found)


def _split_of(parts: Sequence[str]) -> str:
    """The split that the name of a container or of a folder above it tells, as it is written; "" for none."""
    numbered = re.match(r"(.+)-\d{5}-of-\d{5}", parts[-1])
    if numbered and numbered[1] != "data":  # what datasets calls the files that it saves
        return _text_of(numbered[1])
    for part in (*parts[-2::-1], Path(parts[-1]).stem):
        words = {word for word in re.split(r"[-._ \d]+", part) if word.lower() in _SPLITS}
        if len(words) == 1:
            return words.pop()
    return ""


def _saved(source: Path, split: str | None, *, parts: tuple[str, ...]) -> list[Container]:
    """The files of one saved data set, in its order."""
    state_file = source.joinpath(*parts, "state.json")
    state = _read_object(state_file)
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ManifestError(
            f"{str(state_file)!r}: rows chosen by a list of indices are not read; call flatten_indices() and save again"
        )
    files = _list_of(state, "_data_files", state_file, key="filename")
    known = state.get("_split")
    split = split if split is not None else known if isinstance(known, str) else ""
    return [Container(source.joinpath(*parts, name), _text_of("/".join((*parts, name))), split) for name in files]


def _list_of(tree: Mapping[str, Any], name: str, where: Path, *, key: str | None = None) -> list[str]:
    """A list of plain file names in a JSON object."""
    items = tree.get(name)
    items = items if isinstance(items, list) else []
    names = [item.get(key) if key and isinstance(item, dict) else item for item in items]
    plain = [item for item in names if isinstance(item, str) and re.fullmatch(r"(?!\.)[^/\\\0]+", item)]
    if not plain or len(plain) < len(names):
        got = str(names)[:100]
        raise ManifestError(
            f"{str(where)!r}: expected a list of plain file names in {name!r}, got {got!r}; save the data set again"
        )
    return plain


def _read_object(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return _object(file.read(16 * MAX_JSON), repr(str(path)))


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: no valid JSON ({type(error).__name__}); expected an object {{...}}") from error
    if not isinstance(tree, dict):
        raise ManifestError(f"{where}: expected a JSON object {{...}}, got a {type(tree).__name__}")
    return tree


# --------------------------------------------------------------------------------------------------------------- tar


def _tar_rows(
    tar: Tar,
    file: Container,
    names: Sequence[str],
    classes: Sequence[str] | None,
    suffixes: Collection[str],
    where: str,
) -> tuple[list[Row], int]:
    samples, ignored = _samples(tar, where)
    rows: list[Row] = []
    for members in samples.values():
        image = _image_of(members, suffixes, where)
        if image is None:
            if "cls" in members:
                todo = f"put both into one tar, the image as one of {', '.join(sorted(suffixes))}"
                raise ManifestError(f"{where}: the member {member_text(members['cls'])!r} labels no image; {todo}")
            ignored += len(members)
            continue
        cells = _cells_of(tar, members, names, classes, where)
        for name in set(names) - set(COLUMNS) - {name for name, cell in cells.items() if cell}:
            maps = [member for extension, member in members.items() if extension.partition(".")[0] == name]
            cells[name] = f"{file.name}/{member_text(maps[0])}" if maps else ""
        shown = member_text(image)
        cells |= {"path": f"{file.name}/{shown}", "split": cells["split"] or file.split}
        rows.append(Row(f"member {shown!r} of {file.name!r}", cells, shown))
    return rows, ignored


def _samples(tar: Tar, where: str) -> tuple[dict[bytes, dict[str, bytes]], int]:
    """Members by sample and extension (lower case), and how many belong to none."""
    samples: dict[bytes, dict[str, bytes]] = {}
    ignored = 0
    for member in tar.members:
        folder, _, name = member.rpartition(b"/")
        stem, dot, extension = name.partition(b".")
        if not (stem and dot) or any(part.startswith(b".") for part in folder.split(b"/")):
            ignored += 1
        else:
            sample = samples.setdefault(folder + b"/" + stem, {})
            other = sample.setdefault(member_text(extension).lower(), member)
            if other != member:
                first, second = member_text(other), member_text(member)
                raise ManifestError(f"{where}: {first!r} and {second!r} differ in case only; rename one")
    return samples, ignored


def _image_of(members: Mapping[str, bytes], suffixes: Collection[str], where: str) -> bytes | None:
    """The member that is the image: KEY.jpg before KEY.anything.jpg; human maps are none."""
    images = [member for extension, member in members.items() if f".{extension}" in suffixes]
    images = images or [
        member
        for extension, member in members.items()
        if not extension.startswith("salience.") and f".{extension.rpartition('.')[2]}" in suffixes
    ]
    if len(images) > 1:
        first, second = sorted(map(member_text, images))[:2]
        raise ManifestError(
            f"{where}: expected one image a sample, got {first!r} and {second!r}; samples are told by their names up to the "
            f"first dot: rename one"
        )
    return images[0] if images else None


def _tells_of_a_tar(path: Path) -> bool:
    """Whether this is the Parquet file that img2dataset writes beside a tar: where each image came from, and none of them."""
    return path.suffix.lower() == ".parquet" and {"url", "status"} <= set(Rows(path).schema.names)


def _cells_of(
    tar: Tar, members: Mapping[str, bytes], names: Sequence[str], classes: Sequence[str] | None, where: str
) -> dict[str, str]:
    """What KEY.json and KEY.cls say of a sample."""
    said: dict[str, Any] = {}
    if "json" in members:
        place = f"{where}: the member {member_text(members['json'])!r}"
        said = _object(_read_small(tar, members["json"], MAX_JSON, where), place)
        cells = {name: _cell(said.get(name), f"{place}, {name}") for name in names}
        if {
            "url",
            "status",
            "sha256",
        } <= said.keys():  # img2dataset's is of what it downloaded, before it made it smaller
            cells["sha256"] = ""
    else:
        cells = dict.fromkeys(names, "")
    if isinstance(said.get("label"), int):
        cells["label"] = _class_name(cells["label"], classes)
    if "cls" in members:
        text = _read_small(tar, members["cls"], MAX_LABEL, where).decode("utf-8", "backslashreplace").strip()
        if not text:
            raise ManifestError(
                f"{where}: the member {member_text(members['cls'])!r} is empty; write the label into it"
            )
        cells["label"] = _class_name(text, classes)
    return cells


def _read_small(tar: Tar, member: bytes, max_bytes: int, where: str) -> bytes:
    span = tar.members[member]
    if span.size > max_bytes:
        raise ManifestError(
            f"{where}: the member {member_text(member)!r} has {span.size} bytes; expected at most {max_bytes}"
        )
    return tar.read(span)


def _cell(value: object, where: str) -> str:
    """A cell as a CSV file would have it; None is an empty one."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ManifestError(f"{where}: expected text or a whole number, got a {type(value).__name__}; write it as text")


def _class_name(text: str, classes: Sequence[str] | None) -> str:
    """A number is the place of a class in ``classes``, unless a class is called so; what is none is left as it is."""
    if classes is None or text in classes or not (text.isascii() and text.isdigit()):
        return text
    return classes[int(text)] if int(text) < len(classes) else text


def _label_by_folders(rows: Sequence[Row], where: str) -> None:
    """Fill in the labels that no member says; sources as well, where no member says any."""
    labels, sources = folder_labels([row.inner.split("/") for row in rows], where)
    unsaid = not any(row.cells["source"] for row in rows)
    for i, row in enumerate(rows):
        row.cells.update({"label": labels[i] if labels else ""} | ({"source": sources[i]} if unsaid else {}))


# ------------------------------------------------------------------------------------------------- Parquet and Arrow


def _table_rows(
    table: Rows, file: Container, names: Sequence[str], classes: Sequence[str] | None, where: str
) -> list[Row]:
    columns = table.names
    repeated = sorted({name for name in columns if columns.count(name) > 1})
    if repeated:
        raise ManifestError(f"{where}: the column {repeated[0]!r} is there twice; rename one")
    check_names(columns, where, extra=names[len(COLUMNS) :])
    images = table.image_column  # raises where there is none
    there = [name for name in names if name in columns and name != images]
    cells = _columns(table, there, classes, where)
    rows = []
    for row in range(len(table)):
        values = {name: cells[name][row] if name in cells else "" for name in names}
        values |= {"path": f"{file.name}/{row:0{ROW_DIGITS}d}", "split": values["split"] or file.split}
        rows.append(Row(f"row {row} of {file.name!r}", values))
    return rows


def _columns(table: Rows, names: Sequence[str], classes: Sequence[str] | None, where: str) -> dict[str, list[str]]:
    if not names:
        return {}
    features, found = table.features, table.columns(names)
    columns: dict[str, list[str]] = {}
    for name in names:
        kind = found.schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise ManifestError(f"{where}: expected text or whole numbers in the column {name!r}, got {kind}")
        cells = [_cell(value, f"{where}, {name}") for value in found[name].to_pylist()]
        if pa.types.is_integer(kind) and features.get(name, {}).get("_type") == "ClassLabel":
            cells = _named(cells, features[name].get("names"), f"{where}: the column {name!r}")
        elif pa.types.is_integer(kind) and name == "label":
            cells = [_class_name(cell, classes) for cell in cells]
        columns[name] = cells
    return columns


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _named(numbers: Sequence[str], names: object, where: str) -> list[str]:
    """Names of a ClassLabel's numbers; -1 is none, as in test splits that keep their labels back."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ManifestError(f"{where}: the names of its classes are damaged; write the file again")
    known = {str(i): name for i, name in enumerate(names)} | {"": "", "-1": ""}
    unknown = sorted({number for number in numbers if number not in known})
    if unknown:
        raise ManifestError(f"{where}: expected numbers below {len(names)}, its classes, got {unknown[0]}")
    return [known[number] for number in numbers]
