"""Columns of the Parquet files of a run."""

import pyarrow as pa

SCHEMA_VERSION = 1
RESULTS_VERSION = 1
"""Raised by each release in which a number of stage 1 or 2 changes; maps of another one are refused, scores made anew."""
IMAGES = pa.schema(
    [
        ("image", pa.int32()),
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("label", pa.string()),
        ("source", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
    ]
)


WORD = pa.dictionary(pa.int32(), pa.string())


SCORES = pa.schema(
    [
        ("image", pa.int32()),
        ("detector", WORD),
        ("run", WORD),
        ("other_run", WORD),
        ("measure", WORD),
        ("variant", WORD),
        ("similarity", WORD),
        ("condition", WORD),
        ("value", pa.float64()),
        ("valid", pa.bool_()),
        ("kept", pa.bool_()),
        ("dead", pa.bool_()),
        ("chance", pa.float64()),
    ]
)


QUARANTINE = pa.schema(
    [
        ("image", pa.int32()),
        ("image_id", pa.string()),
        ("path", pa.string()),
        ("model", pa.string()),
        ("stage", pa.string()),
        ("kind", pa.string()),
        ("message", pa.string()),
    ]
)


def maps_schema(cells: int) -> pa.Schema:
    """The columns of a part file of maps with ``cells`` = h * w cells a map."""
    return pa.schema(
        [
            ("image", pa.int32()),
            ("condition", WORD),
            ("logits", pa.list_(pa.float32())),
            ("predicted", pa.int32()),
            ("map", pa.list_(pa.float32(), cells)),
            ("map_fixed", pa.list_(pa.float32(), cells)),
        ]
    )
