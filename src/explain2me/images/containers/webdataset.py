"""Samples of a WebDataset tar: files whose names are alike up to the first dot after the last slash.

The image is the member whose extension is an image suffix (``KEY.jpg``). ``KEY.cls`` holds the label as text or as a
number. ``KEY.json`` holds an object with the keys label, source, split, image_id and sha256, all optional.
``KEY.salience.png`` (or .npy, .csv) is the human map of a sample, unless its JSON names one. Other files and names that
begin with a dot are left out. Without any label in these members, folders name the labels: ``label/source/KEY.jpg``.

img2dataset writes a Parquet file beside each tar, about the downloads: it is left out. So is the sha256 in its JSON,
which is that of the download before img2dataset resized it.
"""

from collections.abc import Mapping, Sequence

from explain2me.errors import ManifestError
from explain2me.images.containers.rows import Container, as_text, cell_text, class_name, json_object
from explain2me.images.containers.tar import Tar, open_tar, read_tar_member
from explain2me.images.rows import COLUMNS, SUFFIXES, Row

MAX_JSON = 2**20
"""Bytes of a member .json."""
MAX_LABEL = 4096
"""Bytes of a member .cls."""
Sample = Mapping[str, bytes]
"""Names of the members of a sample, by their extension in lower case."""


def list_images(file: Container, columns: Sequence[str], classes: Sequence[str] | None) -> tuple[list[Row], int]:
    """One row for each sample with an image, and the number of members that are left out."""
    tar = open_tar(file.path)
    samples, num_ignored = _samples(tar, repr(file.name))
    rows: list[Row] = []
    for sample in samples.values():
        image = _image_of(sample, repr(file.name))
        if image is not None:
            cells = _cells(tar, sample, file, columns, classes)
            cells |= {"path": f"{file.name}/{as_text(image)}", "split": cells["split"] or file.split}
            rows.append(Row(f"member {as_text(image)!r} of {file.name!r}", cells, as_text(image)))
        elif "cls" in sample:
            todo = f"put both into one tar, the image as one of {', '.join(sorted(SUFFIXES))}"
            raise ManifestError(f"{_member(file, sample['cls'])} labels no image; {todo}")
        else:
            num_ignored += len(sample)
    return rows, num_ignored


def _samples(tar: Tar, where: str) -> tuple[dict[bytes, dict[str, bytes]], int]:
    """The samples by folder and key, and how many members belong to none."""
    samples: dict[bytes, dict[str, bytes]] = {}
    num_ignored = 0
    for member in tar.members:
        folder, _, name = member.rpartition(b"/")
        key, dot, extension = name.partition(b".")
        if not (key and dot) or any(part.startswith(b".") for part in folder.split(b"/")):
            num_ignored += 1
            continue
        sample = samples.setdefault(folder + b"/" + key, {})
        other = sample.setdefault(as_text(extension).lower(), member)
        if other != member:
            first, second = as_text(other), as_text(member)
            raise ManifestError(f"{where}: {first!r} and {second!r} differ in case only; rename one")
    return samples, num_ignored


def _image_of(sample: Sample, where: str) -> bytes | None:
    """The member that is the image: KEY.jpg before KEY.anything.jpg; human maps are none."""
    images = [member for extension, member in sample.items() if f".{extension}" in SUFFIXES]
    images = images or [
        member
        for extension, member in sample.items()
        if not extension.startswith("salience.") and f".{extension.rpartition('.')[2]}" in SUFFIXES
    ]
    if len(images) > 1:
        first, second = sorted(map(as_text, images))[:2]
        raise ManifestError(
            f"{where}: expected one image a sample, got {first!r} and {second!r}; names that are alike up to their "
            f"first dot belong to one sample: rename one"
        )
    return images[0] if images else None


def _cells(
    tar: Tar, sample: Sample, file: Container, columns: Sequence[str], classes: Sequence[str] | None
) -> dict[str, str]:
    """The cells that KEY.json, KEY.cls and KEY.salience.png give; the label of KEY.cls comes first."""
    cells = dict.fromkeys(columns, "")
    if "json" in sample:
        where = _member(file, sample["json"])
        values = json_object(_read_small(tar, sample["json"], MAX_JSON, where), where)
        if {"url", "status"} <= values.keys():  # of img2dataset
            values["sha256"] = None
        cells = {name: cell_text(values.get(name), f"{where}, {name}") for name in columns}
        if isinstance(values.get("label"), int | float):
            cells["label"] = class_name(cells["label"], classes)
    if "cls" in sample:
        where = _member(file, sample["cls"])
        text = as_text(_read_small(tar, sample["cls"], MAX_LABEL, where)).strip()
        if not text:
            raise ManifestError(f"{where} is empty; write the label into it")
        cells["label"] = class_name(text, classes)
    for column in set(columns) - set(COLUMNS):  # such as the human map
        maps = [member for extension, member in sample.items() if extension.partition(".")[0] == column]
        if maps and not cells[column]:
            cells[column] = f"{file.name}/{as_text(maps[0])}"
    return cells


def _read_small(tar: Tar, member: bytes, max_bytes: int, where: str) -> bytes:
    span = tar.members[member]
    if span.size > max_bytes:
        raise ManifestError(f"{where} has {span.size} bytes; expected at most {max_bytes}")
    return tar.read(span)


def _member(file: Container, name: bytes) -> str:
    return f"{file.name!r}: the member {as_text(name)!r}"


read_image = read_tar_member
