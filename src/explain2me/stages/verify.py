"""Verify a run: it holds every model x image x condition once, or in the quarantine, and no file was changed."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from explain2me.errors import Explain2MeError, ImageError, RunFolderError
from explain2me.images.listing import image_root, resolve
from explain2me.images.reading import read_file
from explain2me.run.checks.tables import open_parquet, read_groups
from explain2me.run.conditions import conditions_for
from explain2me.run.files import FORMAT, encoded, sha256_of
from explain2me.run.folder import Run
from explain2me.run.leftovers import TEMPORARY
from explain2me.run.packs import PACKED, packed_in, read_parquet, table_files
from explain2me.run.plan import Shard, plan, precision_path
from explain2me.run.record import record_hash
from explain2me.run.schema import (
    MAPS,
    MATRIX_COLUMNS,
    QUARANTINE,
    SCORES,
    SUMMARY_COLUMNS,
    maps_schema,
    summary_schema,
)
from explain2me.stages.measure import score_names


def verify_run(run: Run, *, images: bool = False, on_done: Callable[[int, int], None] | None = None) -> list[str]:
    """Look for damage; one line of each kind, and an empty list if the run is whole.

    Args:
        run: every file of it is read.
        images: also read every image, and compare it with the sha256 that the run was made from.
        on_done: called with the number of part files read, and of all.
    """
    problems = [*_check_record(run), *_check_images_table(run)]
    if problems:  # the plan follows from these two
        return problems
    shards = plan(run)
    try:
        refused = run.unexplained()
    except RunFolderError as error:  # the names of the scores follow from the quarantine
        return [*problems, f"damaged: {error}"]
    for i, shard in enumerate(shards):
        where = shard.path(run.folder).relative_to(run.folder)
        problems += _guarded(where, _check_shard(run, shard, refused.get(shard.model.name, set())))
        if on_done:
            on_done(i + 1, len(shards))
    problems += _guarded(Path("quarantine"), _check_quarantine(run))
    problems += [*_check_names(run, shards), *_check_precision(run, shards)]
    problems += [*_check_scores(run), *_check_other_files(run)]
    return problems + (list(_check_images(run)) if images else [])


def _check_record(run: Run) -> Iterator[str]:
    recorded = run.record.get("sha256")
    if recorded is not None and recorded != record_hash(run.record):
        yield "changed: run.json is not as it was written; put back a copy of it, or start a new run"


def _check_images_table(run: Run) -> Iterator[str]:
    path = run.folder / "images.parquet"
    try:
        _ = run.image_table
    except RunFolderError as error:
        yield f"damaged: {error}"
        return
    recorded = run.record.get("images_sha256")
    if recorded is not None and recorded != sha256_of(path):
        yield "changed: images.parquet is not as it was written; put back a copy of it, or start a new run"


def _check_quarantine(run: Run) -> Iterator[str]:
    """Every image of the manifest is in images.parquet or in the quarantine."""
    refused = sum(row["stage"] == "index" for row in run.quarantine().to_pylist())
    lost = run.record.get("num_listed", 0) - len(run.image_table) - refused
    if lost:
        yield f"missing: {lost} images of the manifest are neither in images.parquet nor in quarantine/"


def _check_precision(run: Run, shards: Sequence[Shard]) -> Iterator[str]:
    for shard in shards if run.config.compute.precision != "float32" else ():
        if shard.part == 0 and not (path := precision_path(run, shard)).exists():
            yield f"missing: {path.relative_to(run.folder)}; call the same command to have it made"


def _guarded(where: Path, check: Iterator[str]) -> Iterator[str]:
    """Report any error as damage: a changed byte in a footer makes pyarrow raise anything, or rename columns."""
    try:
        yield from check
    except RunFolderError as error:
        yield f"damaged: {where}: {error}"
    except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError, pa.ArrowException) as error:
        seen = "cannot be read" if isinstance(error, OSError) and error.errno else "damaged"
        yield f"{seen}: {where}: {' '.join(str(error).split())}"


def _check_shard(run: Run, shard: Shard, refused: set[int]) -> Iterator[str]:
    path = shard.path(run.folder)
    where = path.relative_to(run.folder)
    if not path.exists() and path.name not in _packed(path.parent):
        yield f"missing: {where} (images {shard.start} to {shard.stop - 1} of {shard.model.name})"
        return
    table = read_parquet(path, schema=MAPS)
    conditions = [condition.name for condition in conditions_for(run.config.measures, shard.model.input_size)]
    said = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if said.get("model") != shard.model.name or json.loads(said.get("conditions", "[]")) != conditions:
        yield f"of another shard: {where} says that it is of {said.get('model')!r}"
        return
    images = [image for image in range(shard.start, shard.stop) if image not in refused]
    if len(table) > 2 * len(conditions) * (shard.stop - shard.start):
        yield f"doubled rows: {where} has {len(table)}, expected {len(conditions) * len(images)}"
        return
    rows = Counter(zip(table["condition"].to_pylist(), table["image"].to_pylist(), strict=True))
    expected = {(condition, image) for condition in conditions for image in images}
    for kind, number in (
        ("missing", len(expected - rows.keys())),
        ("unknown or quarantined", len(rows.keys() - expected)),
        ("doubled", sum(count > 1 for count in rows.values())),
    ):
        if number:
            yield f"{kind} rows: {number} in {where}"
    if path.exists() and _was_changed(run, path, table):
        yield f"damaged: {where} is not as it was written"


def _packed(folder: Path) -> set[str]:
    """Names in the packs of a folder; a damaged pack counts as empty here, and another check reports it."""
    try:
        return set(packed_in(folder))
    except RunFolderError:
        return set()


def _was_changed(run: Run, path: Path, table: pa.Table) -> bool:
    """Whether a file differs from its rows written again; the same version of pyarrow writes the same bytes."""
    with open_parquet(path) as file:
        writer = str(file.metadata.created_by)
    if writer != _created_by(pa.__version__):
        versions = [run.record["versions"], *run.record.get("later_versions", [])]
        return writer not in {_created_by(version["pyarrow"]) for version in versions}
    if "map" in table.schema.names:  # Parquet names the items of a list otherwise
        schema = maps_schema(table.schema.field("map").type.list_size)
        table = table.cast(schema.with_metadata(table.schema.metadata))
    return encoded(table) != path.read_bytes()


def _created_by(version: str) -> str:
    return f"parquet-cpp-arrow version {version}"


def _check_names(run: Run, shards: Sequence[Shard]) -> Iterator[str]:
    """Find files that are not in the plan, and temporary ones."""
    planned = {shard.path(run.folder) for shard in shards}
    names = {shard.file_name for shard in shards}
    packed = {folder: _packed(folder) for folder in {path.parent for path in planned}}
    for path in sorted((run.folder / "maps").rglob("*")):
        if path.name.startswith(PACKED):
            yield from _guarded(path.relative_to(run.folder), _check_pack(run, path, names))
        elif path.is_file() and path not in planned and not path.name.startswith(TEMPORARY):
            yield f"not in the plan: {path.relative_to(run.folder)}"
        elif path in planned and path.name in packed[path.parent]:
            yield f"left over: {path.relative_to(run.folder)} is in a pack already; call `explain2me compact` again"
    for path in sorted(run.folder.rglob(".*")):
        if path.name.startswith(TEMPORARY):
            yield f"left over: {path.relative_to(run.folder)}, by a process that was stopped"


def _check_pack(run: Run, path: Path, planned: set[str]) -> Iterator[str]:
    where = path.relative_to(run.folder)
    names = [name for name, member in packed_in(path.parent).items() if member.pack == path]
    with open_parquet(path, SCORES if path.parent.name == "scores" else MAPS) as file:
        ours = file.metadata.created_by == _created_by(pa.__version__)
        if ours and _encoded_pack(path, file) != path.read_bytes():
            yield f"damaged: {where} is not as it was written"
    if unknown := [name for name in names if name not in planned]:
        yield f"not in the plan: {len(unknown)} files in {where}, first {unknown[0]}"


def _encoded_pack(path: Path, file: pq.ParquetFile) -> bytes:
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, file.schema_arrow, **FORMAT) as writer:
        for group in range(file.num_row_groups):
            table = read_groups(path, file, [group])
            writer.write_table(table, row_group_size=len(table))
    return sink.getvalue().to_pybytes()


def _check_scores(run: Run) -> Iterator[str]:
    folder = run.folder / "scores"
    try:
        there = table_files(folder)
    except RunFolderError as error:
        yield f"damaged: {error}"
        return
    if not there:
        if (run.folder / "summary").exists():
            yield f"missing: scores/, from which the tables in summary/ were made; call `explain2me measure {run.folder}`"
        return
    names = {path.name for path in there}
    expected = score_names(run, run.config.measures)
    same_settings = any(name in names for name in expected)
    for name in expected if same_settings else ():
        if name not in names:
            yield f"missing: scores/{name}; call `explain2me measure {run.folder}`"
    for path in there:
        if same_settings and path.name not in expected:
            yield f"not in the plan: scores/{path.name}"
        yield from _guarded(path.relative_to(run.folder), _check_score_file(run, path))
    planned = set(expected) if same_settings else names
    for path in sorted(folder.glob(f"{PACKED}*.parquet")):
        yield from _guarded(path.relative_to(run.folder), _check_pack(run, path, planned))


def _check_score_file(run: Run, path: Path) -> Iterator[str]:
    table = read_parquet(path, schema=SCORES)
    unknown = np.setdiff1d(table["image"].to_numpy(), run.image_table["image"].to_numpy())
    if len(unknown):
        yield f"unknown images: {len(unknown)} in scores/{path.name}"
    if path.exists() and _was_changed(run, path, table):
        yield f"damaged: scores/{path.name} is not as it was written"


def _check_other_files(run: Run) -> Iterator[str]:
    folders = [run.folder / name for name in ("precision", "quarantine", "summary")]
    for path in [path for folder in folders for path in sorted(folder.rglob("*.parquet"))]:
        yield from _guarded(path.relative_to(run.folder), _check_other_file(run, path))


def _check_other_file(run: Run, path: Path) -> Iterator[str]:
    if _was_changed(run, path, read_parquet(path, schema=_schema_of(path))):
        yield f"damaged: {path.relative_to(run.folder)} is not as it was written"


def _schema_of(path: Path) -> pa.Schema:
    """The columns of a file of summary/, quarantine/ or precision/."""
    if path.parent.name == "summary":
        return summary_schema(SUMMARY_COLUMNS.get(path.stem, MATRIX_COLUMNS))
    return QUARANTINE if path.parent.name == "quarantine" else MAPS


def _check_images(run: Run) -> Iterator[str]:
    """Compare every image with its hash: damaged bytes inside a JPEG decode to grey without an error."""
    root = image_root(Path(run.config.data.manifest))
    for row in run.image_table.select(["path", "sha256"]).to_pylist():
        try:
            data = read_file(resolve(root, row["path"]))
        except ImageError as error:
            yield f"image {error.kind}: {row['path']}: {error.message}"
        except (Explain2MeError, OSError) as error:
            yield f"image unreadable: {row['path']}: {error}"
        else:
            if hashlib.sha256(data).hexdigest() != row["sha256"]:
                yield f"image changed: {row['path']} is not the file that the run was made from"
