"""Pack many small files of a run into few large ones, for file systems that limit files. No row and no number changes."""

from explain2me.run.files import only_writer
from explain2me.run.folder import Run
from explain2me.run.packs import pack_folder
from explain2me.run.schema import MAPS, SCORES


def compact_run(run: Run) -> dict[str, tuple[int, int]]:
    """Pack the part files of each model, and the scores.

    May be stopped, repeated, and called while shards are missing or explained.

    Returns:
        Number of files before and after, by folder; only of folders that changed.

    Raises:
        BusyError: another process writes into the run.
    """
    with only_writer(run.folder):
        return _pack_folders(run)


def _pack_folders(run: Run) -> dict[str, tuple[int, int]]:
    done: dict[str, tuple[int, int]] = {}
    maps = [(run.folder / "maps" / f"model={model.name}", MAPS) for model in run.models]
    for folder, schema in [*maps, (run.folder / "scores", SCORES)]:
        before = len(list(folder.glob("*.parquet")))
        if folder.is_dir() and pack_folder(folder, schema):
            done[folder.relative_to(run.folder).as_posix()] = before, len(list(folder.glob("*.parquet")))
    return done
