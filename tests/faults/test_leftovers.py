"""Files that a process was writing when it ended: ignored, named, and removed in time."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from explain2me.run.leftovers import TEMPORARY, this_process
from explain2me.stages.explain import explain_run
from explain2me.stages.index import IndexChunk, forget_chunks
from explain2me.stages.measure import measure_run
from explain2me.stages.summarise import summarise_run
from explain2me.stages.verify import verify_run
from explain2me.workers.crashes import Attempt, marked, suspected


def test_a_file_that_was_being_written_is_taken_for_nothing(copied_run):
    folder, config = copied_run.folder, copied_run.config
    model = copied_run.models[0].name
    left = [folder / where / ".tmp-x.tmp" for where in ("quarantine", "scores", "summary", f"maps/model={model}", ".")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    run = explain_run(config, folder)
    measure_run(run, run.config)
    summarise_run(run, run.config)
    assert all(path.exists() for path in left)  # another process may be writing it
    names = sorted(str(path.relative_to(folder)) for path in left)
    assert verify_run(run) == [f"left over: {name}, by a process that was stopped" for name in names]
    for path in left:
        os.utime(path, (time.time() - 7200,) * 2)
    explain_run(config, folder)
    assert not any(path.exists() for path in left)


def test_what_ended_workers_were_writing_is_removed(tmp_path, make_images, small_config, monkeypatch):
    manifest = make_images(tmp_path / "images", counts={("fake", "a"): 2, ("real", "b"): 2})
    config = small_config(manifest, shard_size=4)
    worker = subprocess.Popen([sys.executable, "-c", ""])
    worker.wait()
    host = this_process().rpartition("-")[0]
    half = tmp_path / "run" / "maps" / f"{TEMPORARY}{host}-{worker.pid}-0.tmp"

    def end(*_, **__):
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(b"half")
        raise OSError("No space left on device")
        yield

    monkeypatch.setattr("explain2me.stages.explain.run_tasks", end)
    with pytest.raises(OSError, match="No space"):
        explain_run(config, tmp_path / "run")
    assert not half.exists()


def test_a_mark_that_is_being_written_is_not_one_left_over(tmp_path, monkeypatch):
    attempt = Attempt.at(IndexChunk(0, 0, 4, "key", pa.table({})))
    write, seen = Path.write_text, []

    def slowly(path, text, **options):
        write(path, "")
        seen.append(suspected(tmp_path, [attempt]))
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", slowly)
    with marked(tmp_path, attempt):
        assert seen == [set()]
        assert [path.name for path in tmp_path.iterdir()] == [f".running-{attempt.whole.title}"]
    assert list(tmp_path.iterdir()) == []


def test_marks_of_machines_that_explain_already_stay(tmp_path):
    marks = [tmp_path / f".running-{name}-x.parquet" for name in ("part-00000", "a__run0-part-00000")]
    for mark in marks:
        mark.write_text("another machine-1")
    forget_chunks(tmp_path)
    assert [mark.exists() for mark in marks] == [False, True]
