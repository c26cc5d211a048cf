"""Columns of the Parquet files of a run."""

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
