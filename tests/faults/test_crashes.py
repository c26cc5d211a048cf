"""Images that end the process that decodes them: found, quarantined, and nothing else lost."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

import explain2me
from explain2me.config.load import load_config
from explain2me.run.folder import Run, open_run
from explain2me.run.plan import plan
from explain2me.stages.explain import explain_run
from explain2me.stages.verify import verify_run

KILLER = """
import io, os, signal
import PIL.Image

genuine = PIL.Image.open

def deadly(file, *args, **kwargs):
    if isinstance(file, io.BytesIO) and b"KILLER" in file.getvalue():
        os.kill(os.getpid(), signal.SIGSEGV)
    return genuine(file, *args, **kwargs)

PIL.Image.open = deadly
"""


SMALL_CHUNKS = "import explain2me.stages.index\nexplain2me.stages.index.CHUNK = 6\n"


SOURCE = str(Path(explain2me.__file__).parents[1])


COMMAND = "import sys; sys.path.pop(0); from explain2me.cli import main; main()"


@pytest.fixture
def deadly_run(
    tmp_path: Path, make_images: Callable[..., Path], weights: Path, detector_table: Callable[..., str]
) -> Callable[..., tuple[int, str]]:
    """Run 12 images, two of which end any process that opens them; the arguments are ``--set`` values."""
    manifest = make_images(tmp_path / "images", counts={("real", "camera"): 6, ("fake", "gan"): 6})
    for name in ("fake/gan/001.png", "real/camera/004.png"):
        text = PngImagePlugin.PngInfo()
        text.add_text("comment", "KILLER")
        path = manifest.parent / name
        Image.open(path).save(path, pnginfo=text)
    (tmp_path / "patched").mkdir()
    (tmp_path / "patched" / "sitecustomize.py").write_text(KILLER)
    table = detector_table("a", f"{weights}/seed[01].safetensors")
    (tmp_path / "config.toml").write_text(
        f'name = "x"\n{table}[data]\nmanifest = {json.dumps(str(manifest))}\nallowed_quarantine = 0.5\n'
        '[compute]\ndevice = "cpu"\nbatch_size = 4\nshard_size = 8\nthreads = 1\n[report]\nafter_run = false\n'
        "[summary]\nbootstrap = 0\n"
    )

    def run(*sets: str) -> tuple[int, str]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "patched"), SOURCE])}
        options = [word for item in sets for word in ("--set", item)]
        arguments = ["explain", str(tmp_path / "config.toml"), "--out", str(tmp_path / "run"), *options]
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr

    return run


def crashed(run: Run) -> list[tuple[str, str, str | None]]:
    rows = run.quarantine().to_pylist()
    assert all(row["kind"] == "crash" for row in rows)
    return sorted((row["stage"], row["image_id"], row["model"]) for row in rows)


DEADLY = ["fake/gan/001.png", "real/camera/004.png"]


def check_whole(run: Run) -> None:
    assert crashed(run) == [("index", name, None) for name in DEADLY]
    assert len(run.maps()) == 2 * 10 * 16
    assert verify_run(run) == []
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".") or path.name == "index"]


def test_an_image_that_ends_the_index_is_quarantined_at_the_next_call(
    tmp_path: Path, deadly_run: Callable[..., tuple[int, str]]
) -> None:
    assert deadly_run()[0] == -signal.SIGSEGV  # one process does everything
    assert [path.name.partition("-")[0] for path in (tmp_path / "run" / "index").iterdir()] == ["reading"]
    assert deadly_run() == (0, "")
    check_whole(open_run(tmp_path / "run"))


@pytest.mark.parametrize("name", ["SIGKILL", pytest.param("SIGBUS", marks=pytest.mark.slow)])
def test_an_image_whose_process_the_machine_kills_is_not_quarantined(
    tmp_path: Path, deadly_run: Callable[..., tuple[int, str]], name: str
) -> None:
    healthy, patch = tmp_path / "patched" / "healthy.py", tmp_path / "patched" / "sitecustomize.py"
    patch.write_text(KILLER.replace("SIGSEGV", name))
    assert deadly_run()[0] == -signal.Signals[name]
    code, error = deadly_run()
    assert code == 2
    assert len(error.splitlines()) == 1
    assert (
        "image 1 of the list alone is killed (SIGKILL or SIGBUS): too little memory, or a lost disk? Nothing is quar"
        in error
    )
    patch.rename(healthy)
    assert deadly_run() == (0, "")
    assert not (tmp_path / "run" / "quarantine").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_an_image_that_ends_a_worker_is_quarantined_by_the_index(
    tmp_path: Path, deadly_run: Callable[..., tuple[int, str]], engine: str
) -> None:
    if engine == "ray":
        pytest.importorskip("ray", reason="the extra ray is not installed")
    else:
        (tmp_path / "patched" / "sitecustomize.py").write_text(SMALL_CHUNKS + KILLER)
    code, error = deadly_run("compute.workers=2", f"compute.executor={engine}")
    assert code == 0, error
    check_whole(open_run(tmp_path / "run"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_dies_in_explain_loses_nothing_that_is_committed(
    tmp_path: Path, deadly_run: Callable[..., tuple[int, str]], workers: int
) -> None:
    run = explain_run(load_config(tmp_path / "config.toml"), tmp_path / "run")  # on a healthy machine
    parts = {path: path.read_bytes() for path in run.folder.rglob("part-*.parquet")}
    for shard in plan(run)[:2]:
        shard.path(run.folder).unlink()
    code, error = deadly_run(f"compute.workers={workers}")
    if workers == 1:
        assert code == -signal.SIGSEGV
    else:
        assert code == 2
        assert len(error.splitlines()) == 1
        assert "a worker process died 3 times at the same task" in error
        assert "what is committed stays" in error
    assert {path for path in parts if not path.exists()} == {shard.path(run.folder) for shard in plan(run)[:2]}
    explain_run(run.config, run.folder)
    assert {path: path.read_bytes() for path in run.folder.rglob("part-*.parquet")} == parts
    assert verify_run(run) == []
