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


MAPS = maps_schema(0)
"""Columns of a part file of maps of any size."""
MEASURE_COLUMNS = (
    "detector", "measure", "variant", "similarity", "condition", "label", "source", "n", "num_values", "num_images", "num_runs",
    "mean", "std", "ci_low", "ci_high", "num_invalid", "num_dead", "dead_share", "kept_share", "num_kept", "mean_kept",
    "num_flipped", "mean_flipped", "chance", "corrected", "corrected_low", "corrected_high",
)  # fmt: skip
MATRIX_COLUMNS = ("detector", "variant", "similarity", "run", "other_run", "mean", "n")
DIFFERENCE_COLUMNS = (
    "detector", "other_detector", "measure", "variant", "similarity", "condition", "label", "source", "num_images", "num_runs",
    "num_other_runs", "difference", "std_error", "df", "ci_low", "ci_high", "p", "corrected", "corrected_low",
    "corrected_high",
)  # fmt: skip
PERFORMANCE_COLUMNS = (
    "detector", "run", "condition", "score", "positives", "negatives", "n", "num_positive", "num_negative", "auroc", "std",
    "ci_low", "ci_high", "auroc_clean", "accuracy", "kept_share", "num_invalid", "num_tied_pairs",
)  # fmt: skip
PRECISION_COLUMNS = (
    "detector", "measure", "variant", "similarity", "num_values", "max_difference", "mean_difference", "num_one_sided",
)  # fmt: skip
QUARANTINE_COLUMNS = ("stage", "kind", "num_images")
SUMMARY_COLUMNS = {
    "measures": MEASURE_COLUMNS,
    "differences": DIFFERENCE_COLUMNS,
    "performance": PERFORMANCE_COLUMNS,
    "precision": PRECISION_COLUMNS,
    "quarantine": QUARANTINE_COLUMNS,
}
"""Columns of the tables of summary/; every other table is a matrix."""
TEXT_COLUMNS = {
    "detector", "other_detector", "run", "other_run", "measure", "variant", "similarity", "condition", "label", "source", "score",
    "positives", "negatives", "stage", "kind",
}  # fmt: skip
"""Columns of words in summary/; columns named ``n`` or ``num_...`` hold integers, all others floats."""
ADDED_LATER = {"num_tied_pairs"}
"""Columns that tables of earlier versions lack."""
FILLED = {
    "image", "image_id", "path", "source", "detector", "run", "measure", "variant", "condition", "positives", "negatives",
    "score", "stage", "kind", "message", "valid", "dead", "n", "sha256",
}  # fmt: skip
"""Columns without empty cells, in every table that has them. ``image`` is empty in the quarantine of the index."""


def summary_schema(columns: Sequence[str]) -> pa.Schema:
    """The schema of a table of summary/ with these columns."""
    return pa.schema([(column, _type_of(column)) for column in columns])


def _type_of(column: str) -> pa.DataType:
    if column == "n" or column.startswith("num_"):
        return pa.int64()
    return TEXT if column in TEXT_COLUMNS else pa.float64()
