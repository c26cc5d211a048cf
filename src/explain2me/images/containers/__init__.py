"""Images inside container files: members of a WebDataset tar, rows of a Parquet or Arrow file. Nothing is unpacked.

The path of such an image continues behind the path of its container: ``shards/a.tar/real/001.jpg``, or the number of a
row, counted from 0: ``train.parquet/00000017``. :func:`container_of` splits such a path, :func:`read_member` reads the
image, and :func:`read_rows` lists the images of :func:`container_files` without reading any.

A container from outside is refused whole rather than read in part. Names of members are only looked up, never opened.
:data:`explain2me.images.containers.formats.FORMATS` is the table of formats: a new format is one file and one row there.
"""

from explain2me.images.containers.formats import read_member, read_rows
from explain2me.images.containers.layout import NOT_THERE, container_files, container_of, is_container_name

__all__ = [
    "NOT_THERE",
    "container_files",
    "container_of",
    "is_container_name",
    "read_member",
    "read_rows",
]
