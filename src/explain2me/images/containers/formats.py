"""The table of container formats, and what works the same for all of them."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from explain2me.errors import ImageError, ManifestError
from explain2me.images.containers.rows import Container, label_by_folders
from explain2me.images.rows import COLUMNS, SUFFIXES, Row

FORMATS = {
    ".tar": "explain2me.images.containers.webdataset",
    ".parquet": "explain2me.images.containers.parquet",
    ".arrow": "explain2me.images.containers.arrow",
}
"""By the suffix of the container's name, the module of its format, imported when such a file is read.

It has ``read_image(container, inner, max_bytes)``, the bytes of one image, and ``list_images(container, columns, classes)``,
the rows of all images and the number of members left out.
"""


def read_member(container: Path, inner: str, *, max_bytes: int) -> bytes | Path:
    """Read an image in a container; a path where a row names a file instead of holding its bytes.

    ``inner`` is the name of the member, or the number of the row.

    Raises:
        ImageError: missing, too_many_bytes, not_regular, or unreadable: the container cannot be used.
        OSError: the container cannot be opened or read.
    """
    return import_module(FORMATS[container.suffix.lower()]).read_image(container, inner, max_bytes)


def read_rows(
    source: Path, files: Sequence[Container], *, extra: Sequence[str], classes: Sequence[str] | None
) -> tuple[list[Row], int]:
    """List the images of all container files, and count the members that are left out.

    Args:
        source: as the config names it, for messages.
        files: of :func:`explain2me.images.containers.layout.container_files`.
        extra: columns to read besides :data:`explain2me.images.rows.COLUMNS`.
        classes: labels in the order of the logits, for labels that are numbers.

    Raises:
        ManifestError: a container cannot be used; the message names it and the member.
    """
    try:
        rows, num_ignored = _list_files(_without_download_tables(files), (*COLUMNS, *extra), classes)
        if not rows:
            todo = f"the suffixes of images are {', '.join(sorted(SUFFIXES))}"
            raise ManifestError(f"expected images in {len(files)} container files, got none; {todo}")
    except (ImageError, ManifestError) as error:
        raise ManifestError(f"{str(source)!r}: {error}") from error
    label_by_folders(rows, repr(str(source)))
    if not any(row.cells["split"] for row in rows):
        for row in rows:
            del row.cells["split"]
    return rows, num_ignored


def _without_download_tables(files: Sequence[Container]) -> Sequence[Container]:
    """Leave out the tables of downloads that img2dataset writes, each beside the tar of the same name."""
    tars = {file.path.with_suffix("") for file in files if file.path.suffix.lower() == ".tar"}
    tables = [file for file in files if file.path.suffix.lower() == ".parquet" and file.path.with_suffix("") in tars]
    if not tables:
        return files
    is_download_table = import_module(FORMATS[".parquet"]).is_download_table
    return [file for file in files if not (file in tables and is_download_table(file.path))]


def _list_files(
    files: Sequence[Container], columns: Sequence[str], classes: Sequence[str] | None
) -> tuple[list[Row], int]:
    suffixes = sorted({file.path.suffix.lower() for file in files})
    if len(suffixes) > 1:
        raise ManifestError(
            f"expected container files of one kind, got {', '.join(suffixes)}; give the files of one kind alone"
        )
    rows: list[Row] = []
    num_ignored = 0
    for file in files:
        if suffixes[0] not in FORMATS:
            raise ManifestError(
                f"{file.name!r} is compressed: its members cannot be read one by one; decompress it to a .tar"
            )
        try:
            rows_of_file, num_ignored_of_file = import_module(FORMATS[suffixes[0]]).list_images(file, columns, classes)
        except OSError as error:
            raise ManifestError(
                f"{file.name!r} cannot be read ({error.strerror or error}); mend that or leave it out"
            ) from error
        rows += rows_of_file
        num_ignored += num_ignored_of_file
    return rows, num_ignored
