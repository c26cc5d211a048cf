"""Rows of images.parquet, without the images."""

import pyarrow as pa

from explain2me.run.schema import IMAGES


def image_rows(groups: dict[tuple[str, str], int]) -> pa.Table:
    """Rows for so many images of each label and source."""
    rows = [(label, source) for (label, source), count in groups.items() for _ in range(count)]
    count = len(rows)
    columns = {
        "image": range(count),
        "image_id": [f"{i}" for i in range(count)],
        "path": [f"{i}.png" for i in range(count)],
        "label": [label for label, _ in rows],
        "source": [source for _, source in rows],
        "width": [8] * count,
        "height": [8] * count,
        "sha256": ["0"] * count,
    }
    return pa.table({name: pa.array(list(column), IMAGES.field(name).type) for name, column in columns.items()})


GROUPS = {("fake", "a"): 30, ("fake", "b"): 1, ("real", "a"): 2, ("real", "c"): 17}
