"""Pack many small files of a run into few large ones, for file systems that limit files. No row and no number changes."""

from pathlib import Path

from explain2me.run.folder import Run
from explain2me.run.packs import pack_folder


def compact_run(run: Run) -> dict[str, tuple[int, int]]:
    """Pack the part files of each model, and the scores.

    May be stopped, repeated, and called while shards are missing; not while another process uses the run.

    Returns:
        Number of files before and after, by folder; only of folders that changed.
    """
    folders = [run.folder / "maps" / f"model={model.name}" for model in run.models] + [run.folder / "scores"]
    done: dict[str, tuple[int, int]] = {}
    for folder in folders:
        before = _count(folder)
        if folder.is_dir() and pack_folder(folder):
            done[folder.relative_to(run.folder).as_posix()] = before, _count(folder)
    return done


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*.parquet"))
