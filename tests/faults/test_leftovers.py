"""Files that a process was writing when it ended: ignored, named, and removed in time."""

import os
import subprocess
import sys
import time

import pytest

from explain2me.stages.explain import explain_run
from explain2me.stages.index import forget_chunks
from explain2me.stages.measure import measure_run
from explain2me.stages.summarise import summarise_run
from explain2me.stages.verify import verify_run


def test_files_of_a_stopped_process_are_ignored(copied_run):
    folder, config = copied_run.folder, copied_run.config
    model = copied_run.models[0].name
    left = [folder / where / ".tmp-x.tmp" for where in ("quarantine", "scores", f"maps/model={model}", ".")]
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
    code = "import os, signal; from explain2me.run.leftovers import temporary_prefix\n"
    code += "print(temporary_prefix(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    worker = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    half = tmp_path / "run" / "maps" / f"{worker.stdout.strip()}0.tmp"

    def end(*_, **__):
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(b"half")
        raise OSError("No space left on device")
        yield

    monkeypatch.setattr("explain2me.stages.explain.run_tasks", end)
    with pytest.raises(OSError, match="No space"):
        explain_run(config, tmp_path / "run")
    assert not half.exists()


def test_the_index_goes_with_its_marks(tmp_path):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "reading-part-00000-x.parquet").touch()
    forget_chunks(tmp_path)
    assert list(tmp_path.iterdir()) == []
