"""Columns of the Parquet files of a run."""

import json
from collections.abc import Sequence

import pyarrow as pa

SCHEMA_VERSION = 1
RESULTS_VERSION = 1
"""Raised by each release in which a number of stage 1 or 2 changes; maps of another one are refused, scores made anew."""
INT, TEXT, WORD = pa.int32(), pa.string(), pa.dictionary(pa.int32(), pa.string())

IMAGES = pa.schema(
    [
        ("image", INT),
        *((name, TEXT) for name in ("image_id", "path", "label", "source")),
        *((name, INT) for name in ("width", "height")),
        ("sha256", TEXT),
    ]
)
SCORES = pa.schema(
    [
        ("image", INT),
        *((name, WORD) for name in ("detector", "run", "other_run", "measure", "variant", "similarity", "condition")),
        ("value", pa.float64()),
        *((name, pa.bool_()) for name in ("valid", "kept", "dead")),
        ("chance", pa.float64()),
    ]
)
QUARANTINE = pa.schema(
    [("image", INT), *((name, TEXT) for name in ("image_id", "path", "model", "stage", "kind", "message"))]
)


def maps_schema(cells: int) -> pa.Schema:
    """The columns of a part file of maps with ``cells`` = h * w cells a map."""
    return pa.schema(
        [
            ("image", INT),
            ("condition", WORD),
            ("logits", pa.list_(pa.float32())),
            ("predicted", INT),
            ("map", pa.list_(pa.float32(), cells)),
            ("map_fixed", pa.list_(pa.float32(), cells)),
        ]
    )


def part_schema(model: str, map_size: str, conditions: Sequence[str]) -> pa.Schema:
    """The schema of a part file with its metadata.

    Args:
        model: name of the model.
        map_size: ``<h>x<w>``.
        conditions: names, in the order of the rows.
    """
    height, _, width = map_size.partition("x")
    metadata = {
        "schema": str(SCHEMA_VERSION),
        "model": model,
        "map_size": map_size,
        "conditions": json.dumps(list(conditions)),
    }
    return maps_schema(int(height) * int(width)).with_metadata(metadata)
