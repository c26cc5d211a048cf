"""Before stage 1: check the config against the files it names, index the images, write run.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from explain2me.config.schema import Config, DetectorConfig
from explain2me.detectors.cards import trained
from explain2me.detectors.load import Detector
from explain2me.detectors.runs import load_model, weights_of
from explain2me.errors import CheckpointError, ManifestError, RunFolderError
from explain2me.run.files import sha256_of, write_json, write_parquet
from explain2me.run.folder import Run, open_run
from explain2me.run.provenance import provenance
from explain2me.run.record import Model, sealed
from explain2me.run.schema import IMAGES, QUARANTINE
from explain2me.salience.batch_size import find_batch_size
from explain2me.stages.check import check
from explain2me.stages.index import forget_chunks, index_run
from explain2me.stages.refusals import open_existing, refuse_other_config
from explain2me.workers.device import engine_of, with_device


def begin_run(
    config: Config,
    folder: Path,
    *,
    share: tuple[int, int] = (0, 1),
    on_indexed: Callable[[int, int], None] | None = None,
) -> Run:
    """Check everything that a run needs, index its images and write run.json, or open the run that is there.

    Args:
        config: of the run.
        folder: of the run; made if missing.
        share: (i, N) of several machines that may do this in one folder at the same time.
        on_indexed: called with the number of images read, and of all.

    Raises:
        Explain2MeError: wrong config, manifest, checkpoint or layer; or ``folder`` holds something else.
    """
    old = open_existing(folder)
    given = config
    config = with_device(config, old.config if old else None)
    if old is not None:
        refuse_other_config(old.config, config, folder)
        _refuse_vanished(old)
    images, record = check(config)
    if old is None and config.compute.batch_size == "auto":
        config = _with_batch_size(config, len(record["classes"]))
        record = record | {"config": json.loads(config.model_dump_json())}
    if old is None and not _begin(config, images, record, folder, share, on_indexed):
        old = open_run(folder)  # another machine has begun it in the meantime
        config = with_device(given, old.config)
        refuse_other_config(old.config, config, folder)
        record = record | {"config": json.loads(config.model_dump_json())}
    if old is not None:
        for key, what in (("listed", "the manifest"), ("models", "a checkpoint")):
            if old.record[key] != record[key]:
                raise RunFolderError(
                    f"{what} is not what {str(folder)!r} was made from; put it back, or give a new folder with --out"
                )
        _record_versions(old, record, folder)
    return open_run(folder)


def _refuse_vanished(old: Run) -> None:
    """A pattern that finds fewer checkpoints than before would be taken for another config."""
    for model in old.models:
        if model.checkpoint is not None and not Path(model.checkpoint).exists():
            raise CheckpointError(
                f"{model.checkpoint!r}, with which the run in {str(old.folder)!r} was begun, is not there any more; put it "
                f"back, or give a new folder with --out"
            )


def _with_batch_size(config: Config, num_classes: int) -> Config:
    def load(wanted: DetectorConfig) -> Detector:
        _, checkpoint, seed = weights_of(wanted, config.seed)[0]
        return load_model(wanted, checkpoint, seed, num_classes)

    compute = config.compute.model_copy(update={"batch_size": find_batch_size(config, load)})
    return config.model_copy(update={"compute": compute})


def _begin(
    config: Config,
    images: pa.Table,
    record: dict[str, Any],
    folder: Path,
    share: tuple[int, int],
    on_indexed: Callable[[int, int], None] | None,
) -> bool:
    """Index the images and write run.json; False where another process was first."""
    source = Path(config.data.manifest)
    engine = engine_of(config)
    limit = config.data.max_pixels
    found = index_run(images, source, folder, engine, max_pixels=limit, share=share, on_done=on_indexed)
    if found is None or (folder / "run.json").exists():
        forget_chunks(folder)
        return False
    usable, refused = found
    if not len(usable):
        forget_chunks(folder)  # which may be what a disk that was not there left
        raise ManifestError(
            f"none of the {len(images)} images of {str(source)!r} can be used; "
            f"the first: {refused['path'][0].as_py()!r}: {refused['message'][0].as_py()}"
        )
    images_file, refused_file = folder / "images.parquet", folder / "quarantine" / "index.parquet"
    write_parquet(_ordered(usable), images_file)
    if len(refused):
        write_parquet(_quarantine_rows(refused), refused_file)
    else:
        refused_file.unlink(missing_ok=True)  # of a call that was stopped
    told = {model["weights_sha256"]: trained(Model(**model)) for model in record["models"]}
    known = {sha256: card for sha256, card in told.items() if card is not None}
    record = record | ({"trained": known} if known else {})
    whole = record | provenance() | {"num_listed": len(images), "images_sha256": sha256_of(folder / "images.parquet")}
    first = write_json(sealed(whole), folder / "run.json", replace=False)
    forget_chunks(folder)
    return first


def _record_versions(old: Run, record: dict[str, Any], folder: Path) -> None:
    """run.json says with which other versions a run was gone on with."""
    versions = provenance()["versions"]
    known = [old.record["versions"], *old.record.get("later_versions", [])]
    later = {} if versions in known else {"later_versions": [*known[1:], versions]}
    found = sealed(old.record | {"config": record["config"]} | later)
    if found != old.record:
        write_json(found, folder / "run.json")


def _ordered(images: pa.Table) -> pa.Table:
    """Rows by label and source, then as in the manifest, so that images to compare stand together."""
    labels, sources = images["label"].to_pylist(), images["source"].to_pylist()
    order = sorted(range(len(images)), key=lambda i: (labels[i] or "", sources[i], i))
    images = images.take(order).append_column("image", pa.array(range(len(images)), pa.int32()))
    return images.select(IMAGES.names).cast(IMAGES)


def _quarantine_rows(refused: pa.Table) -> pa.Table:
    rows = [{"image": None, "model": None, **row} for row in refused.to_pylist()]
    return pa.Table.from_pylist(rows, schema=QUARANTINE)
