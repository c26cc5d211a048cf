"""Before stage 1: check the config against the files that it names, index the images, write run.json."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from explain2me.config.schema import Config
from explain2me.detectors.cards import trained
from explain2me.errors import BusyError, CheckpointError, ManifestError, RunFolderError
from explain2me.images.examine import Indexed, refuse_contradictions
from explain2me.images.select import Selection
from explain2me.run.events import logging_errors
from explain2me.run.files import only_writer, sha256_of, write_json, write_parquet
from explain2me.run.folder import GROWING, Run, open_run
from explain2me.run.plan import shard_settings
from explain2me.run.provenance import provenance, versions
from explain2me.run.record import Model, record_hash, sealed
from explain2me.run.schema import IMAGES, QUARANTINE
from explain2me.salience.batch_size import find_batch_size
from explain2me.stages.check import check
from explain2me.stages.growth import (
    finish_growth,
    growth_text,
    lists_same_images,
    refuse_changed_images,
    refuse_changed_models,
    same_images,
    switch_state,
)
from explain2me.stages.index import forget_chunks, index_run
from explain2me.stages.refusals import open_existing, refuse_other_config
from explain2me.workers.device import engine_of, with_device


def begin_run(
    config: Config,
    folder: Path,
    *,
    selection: Selection | None = None,
    share: tuple[int, int] = (0, 1),
    on_indexed: Callable[[int, int], None] | None = None,
    on_grown: Callable[[str], None] | None = None,
) -> Run:
    """Check a config, index its images and write run.json; or open the run that ``folder`` holds already.

    Where the config names more or other detectors, runs, conditions or images, the run grows.

    Args:
        folder: of the run; created if missing.
        selection: of :func:`explain2me.images.select.select_images`, if it was called already.
        share: (i, N) of several machines that may do this in one folder at the same time.
        on_indexed: called with the number of images read, and of all images.
        on_grown: called with what was added and taken out, in words.

    Raises:
        Explain2MeError: wrong config, manifest, checkpoint or layer; or ``folder`` holds something else.
    """
    finish_growth(folder)
    old = open_existing(folder)
    here = with_device(config, old.config if old else None)
    if old is not None:
        refuse_other_config(old.config, here, folder)
        _refuse_vanished(old, here)
    images, record = check(here, selection)
    if old is None:
        if here.compute.batch_size == "auto":
            batch_size = find_batch_size(here, len(record["classes"]))
            compute = here.compute.model_copy(update={"batch_size": batch_size})
            here = here.model_copy(update={"compute": compute})
            record |= {"config": json.loads(here.model_dump_json())}
        indexed = _index(here, images, folder, share, on_indexed)
        is_first = indexed is not None and _write_new_run(folder, indexed, record)
        forget_chunks(folder)
        if is_first:
            return open_run(folder)
        old = open_run(folder)  # another machine has begun it meanwhile
        here = with_device(config, old.config)
        refuse_other_config(old.config, here, folder)
        record |= {"config": json.loads(here.model_dump_json())}
    if _has_grown(old, here, record):
        return _grow(old, here, images, record, on_indexed, on_grown)
    _record_versions(old, record)
    return open_run(folder)


def _index(
    config: Config,
    images: pa.Table,
    folder: Path,
    share: tuple[int, int],
    on_indexed: Callable[[int, int], None] | None,
) -> Indexed | None:
    engine, data = engine_of(config.compute), config.data
    with logging_errors(folder, share, "index"):
        return index_run(
            images, Path(data.manifest), folder, engine, max_pixels=data.max_pixels, share=share, on_done=on_indexed
        )


def _has_grown(old: Run, config: Config, record: dict[str, Any]) -> bool:
    """Whether the models, the images or the conditions of a config are not those of the run."""
    same = all(old.record[key] == record[key] for key in ("models", "classes"))
    same = same and lists_same_images(old, config, record)
    return not same or shard_settings(old.config) != shard_settings(config)


def _grow(
    old: Run,
    config: Config,
    images: pa.Table,
    record: dict[str, Any],
    on_indexed: Callable[[int, int], None] | None,
    on_grown: Callable[[str], None] | None,
) -> Run:
    """Prepare the next state of a run, and put it in place; see :mod:`explain2me.stages.growth`."""
    refuse_changed_models(old, record)
    with only_writer(old.folder):
        if record_hash(open_run(old.folder).record) != record_hash(old.record):
            raise BusyError(
                f"another command has changed the run in {str(old.folder)!r} meanwhile; call this one again"
            )
        growing = old.folder / GROWING
        indexed = same_images(old, config, record) or _index(config, images, growing, (0, 1), on_indexed)
        assert indexed is not None  # nobody else writes there
        try:
            refuse_changed_images(old, indexed)
        except RunFolderError:
            shutil.rmtree(growing, ignore_errors=True)
            raise
        _write_new_run(growing, indexed, record, before=old)
        switch_state(old.folder)
    new = open_run(old.folder)
    if on_grown:
        on_grown(growth_text(old, new))
    return new


def _refuse_vanished(old: Run, config: Config) -> None:
    """Raise if a checkpoint of the run is missing: without it the pattern would look like one that names fewer."""
    kept = {(detector.name, detector.checkpoints) for detector in config.detectors}
    asked = {each.name for each in old.config.detectors if (each.name, each.checkpoints) in kept}
    for model in old.models:
        if model.detector in asked and model.checkpoint is not None and not Path(model.checkpoint).exists():
            raise CheckpointError(
                f"{model.checkpoint!r}, with which the run in {str(old.folder)!r} began, is missing; put it back, or give "
                f"a new folder with --out"
            )


def _write_new_run(folder: Path, indexed: Indexed, record: dict[str, Any], *, before: Run | None = None) -> bool:
    """Write images.parquet, the quarantine and run.json; False if another process has written run.json first.

    The versions that made the state ``before`` stay in run.json.
    """
    if (folder / "run.json").exists():
        return False
    usable, refused = indexed
    num_listed = len(usable) + len(refused)
    if not len(usable):
        forget_chunks(folder)  # a disk that is gone may be the reason: read all images again next time
        raise ManifestError(
            f"none of the {num_listed} images of {record['config']['data']['manifest']!r} can be used; "
            f"the first: {refused['path'][0].as_py()!r}: {refused['message'][0].as_py()}"
        )
    refuse_contradictions(usable, repr(record["config"]["data"]["manifest"]))
    _write_tables(usable, refused, folder)
    complete = record | _trainings(record["models"]) | provenance()
    complete |= _versions_since(before) if before else {}
    complete |= {"num_listed": num_listed, "images_sha256": sha256_of(folder / "images.parquet")}
    return write_json(sealed(complete), folder / "run.json", replace=False)


def _write_tables(usable: pa.Table, refused: pa.Table, folder: Path) -> None:
    """Write images.parquet and the quarantine of the index."""
    write_parquet(_ordered(usable), folder / "images.parquet")
    quarantine = folder / "quarantine" / "index.parquet"
    if len(refused):
        rows = [{"image": None, "model": None, **row} for row in refused.to_pylist()]
        write_parquet(pa.Table.from_pylist(rows, schema=QUARANTINE), quarantine)
    else:
        quarantine.unlink(missing_ok=True)  # of a call that was stopped


def _ordered(images: pa.Table) -> pa.Table:
    """Rows by label and source, then as in the manifest, so that images to compare stand together."""
    labels, sources = images["label"].to_pylist(), images["source"].to_pylist()
    order = sorted(range(len(images)), key=lambda i: (labels[i] or "", sources[i], i))
    images = images.take(order).append_column("image", pa.array(range(len(images)), pa.int32()))
    return images.select(IMAGES.names).cast(IMAGES)


def _trainings(models: list[dict[str, Any]]) -> dict[str, Any]:
    """How each model was trained, by the hash of its weights, if a card beside its weights says so."""
    cards = {model["weights_sha256"]: trained(Model(**model)) for model in models}
    known = {sha256: card for sha256, card in cards.items() if card is not None}
    return {"trained": known} if known else {}


def _record_versions(old: Run, record: dict[str, Any]) -> None:
    """Record the config and the package versions that resumed this run."""
    updated = sealed(old.record | {"config": record["config"]} | _versions_since(old))
    if updated != old.record:
        write_json(updated, old.folder / "run.json")


def _versions_since(old: Run) -> dict[str, Any]:
    """The package versions with which a run began, and those that resumed it, the present ones included."""
    current = versions()
    known = [old.record.get("versions", {}), *old.record.get("later_versions", [])]
    later = known[1:] if current in known else [*known[1:], current]
    return {"versions": known[0]} | ({"later_versions": later} if later else {})
