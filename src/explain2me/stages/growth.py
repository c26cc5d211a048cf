"""A run grows: its config names more or other detectors, runs, conditions or images. No number that is there changes.

The next state is prepared in ``growing/``; its run.json is written last. Then its files are put in place, and what only the
state before planned is moved to ``earlier/``. A kill in between loses nothing: the next command finishes it.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from explain2me.config.compare import was_and_is
from explain2me.config.schema import Config
from explain2me.errors import RunFolderError
from explain2me.images.examine import Indexed
from explain2me.run.conditions import conditions_for
from explain2me.run.files import atomic_path, only_writer, replaced_folder, write_parquet
from explain2me.run.folder import EARLIER, GROWING, Run, open_run
from explain2me.run.packs import packed_in, read_parquet, table_files
from explain2me.run.plan import plan, precision_path
from explain2me.run.record import DECIDING, record_hash
from explain2me.run.schema import QUARANTINE
from explain2me.text import shorten


def refuse_changed_models(old: Run, record: Mapping[str, Any]) -> None:
    """Raise RunFolderError if the classes, or a detector and run of the same names, are not what they were."""
    if list(old.classes) != record["classes"]:
        _refuse(old, f"the classes were {list(old.classes)}, are {record['classes']}")
    now = {(row["detector"], row["run"]): row for row in record["models"]}
    for row in old.record["models"]:
        new = now.get((row["detector"], row["run"]), row)
        _refuse_difference(old, row, new, (*DECIDING, "seed"), f"{row['detector']!r} run {row['run']!r}")


def refuse_changed_images(old: Run, indexed: Indexed) -> None:
    """Raise RunFolderError if an image of the same id is not what it was, or cannot be read any more."""
    columns = ("image_id", "label", "source", "sha256")
    now = {row["image_id"]: row for row in indexed.usable.select(columns).to_pylist()}
    refused = {row["image_id"]: row for row in indexed.quarantine.to_pylist()}
    for row in old.image_table.select(columns).to_pylist():
        name = row["image_id"]
        if name in refused:
            _refuse(old, f"image {name!r} could be read and cannot now ({refused[name]['message']})")
        _refuse_difference(old, row, now.get(name, row), columns, f"image {name!r}")


def _refuse_difference(
    old: Run, before: Mapping[str, Any], after: Mapping[str, Any], names: Iterable[str], what: str
) -> None:
    for name in names:
        if before[name] != after[name]:
            key = f"{name} of {what}"
            _refuse(old, was_and_is({key: before[name]}, {key: after[name]}, key))


def _refuse(old: Run, difference: str) -> None:
    raise RunFolderError(
        f"numbers of the run in {str(old.folder)!r} would change: {difference}; put it back, or give a new folder with --out"
    )


def lists_same_images(old: Run, config: Config, record: Mapping[str, Any]) -> bool:
    """Whether a config takes the images of a run from the same place, with the same limit of size, and none was mended."""
    before, after = old.config.data, config.data
    same_place = before.manifest == after.manifest and before.max_pixels == after.max_pixels
    return same_place and old.record.get("listed") == record["listed"] and not old.mended_images()


def same_images(old: Run, config: Config, record: Mapping[str, Any]) -> Indexed | None:
    """The index of a run if a config takes the same images from the same place; None if they must be read again."""
    if not lists_same_images(old, config, record):
        return None
    path = old.folder / "quarantine" / "index.parquet"
    refused = read_parquet(path, schema=QUARANTINE) if path.exists() else old.quarantine().slice(0, 0)
    return Indexed(old.image_table.drop_columns(["image"]), refused.drop_columns(["image", "model"]))


def finish_growth(folder: Path) -> None:
    """Put the prepared state of a run in place, if a command that prepared one was stopped.

    Raises:
        BusyError: another process writes into the run.
    """
    if (folder / GROWING / "run.json").exists():
        Run(folder, unfinished=True)  # refuses links, also of the lock
        with only_writer(folder):
            switch_state(folder)


def switch_state(folder: Path) -> None:
    """Put the prepared state of a run in place; the caller holds its lock. May be stopped anywhere, and repeated."""
    growing = folder / GROWING
    if not (growing / "run.json").exists():  # another process was first
        return
    old, new = Run(folder, unfinished=True), Run(growing)
    if record_hash(old.record) != record_hash(new.record):  # else all but the last step was done
        _keep_state(old)
        _move_files(old, new)
    for name in ("images.parquet", "quarantine/index.parquet", "run.json"):
        if (growing / name).exists():
            with atomic_path(folder / name) as temporary:
                shutil.copyfile(growing / name, temporary)
        else:
            (folder / name).unlink(missing_ok=True)
    (growing / "run.json").unlink()
    shutil.rmtree(growing)


def _keep_state(old: Run) -> None:
    """Copy run.json and images.parquet to ``earlier/``, where they say what the files of this state are."""
    place = old.folder / EARLIER / record_hash(old.record)
    if not place.exists():
        with replaced_folder(place) as state:
            for name in ("images.parquet", "run.json"):
                shutil.copyfile(old.folder / name, state / name)


def set_aside_strays(run: Run) -> None:
    """Move part files to ``earlier/`` that a process of a state before committed while the run grew."""
    states = sorted((run.folder / EARLIER).glob("*/run.json"))
    known = {shard.path(run.folder) for shard in plan(run)} if states else set()
    for record in states:
        for shard in plan(open_run(record.parent)):
            path = shard.path(run.folder)
            if path not in known and path.exists():
                _move(path, shard.path(run.folder / EARLIER))


def _move_files(old: Run, new: Run) -> None:
    """Move the files that a state does not plan to ``earlier/``, and those that it plans back from there."""
    folder = old.folder
    planned = {Path("maps", f"model={shard.model.name}", shard.file_name) for shard in plan(new)}
    planned |= {precision_path(new, shard).relative_to(new.folder) for shard in plan(new) if shard.part == 0}
    planned |= {Path("quarantine", f"explain-{shard.title}") for shard in plan(new)}
    planned.add(Path("quarantine", "index.parquet"))
    for name in ("scores", "summary"):  # their readers would take them for those of the new state
        if (folder / name).exists():
            shutil.rmtree(folder / EARLIER / name, ignore_errors=True)
            if name == "summary" or old.record.get("images_sha256") == new.record["images_sha256"]:
                _move(folder / name, folder / EARLIER / name)
            else:  # the chance level of a score depends on every image of a run
                shutil.rmtree(folder / name)
    for place in [*(folder / "maps").glob("model=*"), *(folder / "precision").glob("model=*"), folder / "quarantine"]:
        there = place.relative_to(folder)
        if any(there / name not in planned for name in packed_in(place)):
            _unpack(place)
        for path in table_files(place):
            if there / path.name not in planned:
                _move(path, folder / EARLIER / there / path.name)
    for file in planned:
        if (folder / EARLIER / file).exists() and not (folder / file).exists():
            _move(folder / EARLIER / file, folder / file)


def _unpack(place: Path) -> None:
    """Make loose files of the packs of a folder."""
    members = packed_in(place)
    for name in members:
        write_parquet(read_parquet(place / name), place / name)
    for pack in {member.pack for member in members.values()}:
        pack.unlink()


def _move(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)


def growth_text(old: Run, new: Run) -> str:
    """What a run has more and less than before, for people."""

    def counts(what: str, before: Iterable[str], after: Iterable[str]) -> Iterator[str]:
        before, after = set(before), set(after)
        for word, some in (("added", sorted(after - before)), ("taken out", sorted(before - after))):
            if some:
                named = shorten(some[0]) + (", ..." if len(some) > 1 else "")
                yield f"{len(some)} {what if len(some) > 1 else what[:-1]} {word} ({named})"

    names = [[f"{model.detector} {model.run}" for model in run.models] for run in (old, new)]
    images = [run.image_table["image_id"].to_pylist() for run in (old, new)]
    conditions = [_conditions(run) for run in (old, new)]
    texts = [*counts("models", *names), *counts("images", *images), *counts("conditions", *conditions)]
    return "; ".join(texts) or "no model, image or condition added or taken out"


def _conditions(run: Run) -> set[str]:
    return {each.name for model in run.models for each in conditions_for(run.config.measures, model.input_size)}
