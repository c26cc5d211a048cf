"""Many small files of a run to few large ones, for file systems that count files. No row and no number changes."""

from pathlib import Path

from explain2me.run.folder import Run
from explain2me.run.packs import pack_folder


def compact_run(run: Run) -> dict[str, tuple[int, int]]:
    """Pack the part files of each model, and the scores.

    May be stopped, repeated, and called while shards are still to come; not while another process is at work.

    Returns:
        Files before and after, by folder; only folders in which something was done.
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
