"""Is a run whole? Every model x image x condition is there once, or in the quarantine."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from explain2me.conditions import conditions_for
from explain2me.errors import RunFolderError
from explain2me.shards import Shard, plan
from explain2me.store import Run, read_parquet


def verify_run(run: Run) -> list[str]:
    """Every kind of damage found, one line each; an empty list means that the run is whole.

    Reads every part file with its checksums, and compares images and conditions with the plan.
    """
    shards = plan(run)
    refused: dict[str, set[int]] = {}
    for row in run.quarantine().to_pylist():
        if row["stage"] == "explain":
            refused.setdefault(row["model"], set()).add(row["image"])
    problems = [
        problem for shard in shards for problem in _check_shard(run, shard, refused.get(shard.model.name, set()))
    ]
    problems += _extra_files(run, shards)
    problems += _check_other_files(run)
    return problems


def _check_shard(run: Run, shard: Shard, refused: set[int]) -> Iterator[str]:
    path = shard.path(run.folder)
    where = path.relative_to(run.folder)
    if not path.exists():
        yield f"missing: {where} (images {shard.start} to {shard.stop - 1} of {shard.model.name})"
        return
    try:
        table = read_parquet(path)
    except RunFolderError as error:
        yield f"damaged: {where}: {error}"
        return
    conditions = [condition.name for condition in conditions_for(run.config.measures, shard.model.input_size)]
    images = [image for image in range(shard.start, shard.stop) if image not in refused]
    found = Counter(zip(table["condition"].to_pylist(), table["image"].to_pylist(), strict=True))
    wanted = {(condition, image) for condition in conditions for image in images}
    twice = sum(count > 1 for count in found.values())
    for what, number in (
        ("missing", len(wanted - found.keys())),
        ("unknown", len(found.keys() - wanted)),
        ("doubled", twice),
    ):
        if number:
            yield f"{what} rows: {number} in {where}"


def _extra_files(run: Run, shards: list[Shard]) -> Iterator[str]:
    planned = {shard.path(run.folder) for shard in shards}
    for path in sorted((run.folder / "maps").rglob("*")):
        if path.is_file() and path not in planned:
            what = "left over" if path.name.startswith(".tmp-") else "not in the plan"
            yield f"{what}: {path.relative_to(run.folder)}"


def _check_other_files(run: Run) -> Iterator[str]:
    for path in sorted([*run.folder.glob("scores/*.parquet"), *run.folder.glob("summary/*.parquet")]):
        try:
            table = read_parquet(path)
        except RunFolderError as error:
            yield f"damaged: {path.relative_to(run.folder)}: {error}"
            continue
        if path.parent.name == "scores":
            unknown = np.setdiff1d(table["image"].to_numpy(), run.image_table["image"].to_numpy())
            if len(unknown):
                yield f"unknown images: {len(unknown)} in {path.relative_to(run.folder)}"
