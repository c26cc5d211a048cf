"""Disks that are full, folders that may not be written, files that vanish: one clear line, no half file, and the run continues."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from odd_files import small_files

from explain2me.run.folder import open_run
from explain2me.stages.verify import verify_run


def one_line(error: str) -> str:
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1, error
    assert lines[0].startswith("explain2me: ")
    return lines[0]


def no_half_files(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.name.startswith(".tmp-")]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_the_run_continues(driver: Any, tmp_path: Path, workers: int) -> None:
    driver.use_every_condition()
    options = ("--set", "compute.shard_size=13", *(("--set", f"compute.workers={workers}") if workers > 1 else ()))
    assert driver.call("explain", tmp_path / "whole", *options)[0] == 0
    largest = max(path.stat().st_size for path in (tmp_path / "whole" / "maps").rglob("*.parquet"))
    folder = tmp_path / "run"
    with small_files(largest - 1000):
        code, error = driver.call("explain", folder, *options)
    assert code == 2
    line = one_line(error)
    assert "what is committed stays" in line
    assert "too large" in line or "No space" in line
    assert no_half_files(folder)
    assert driver.call("explain", folder, *options)[0] == 0
    assert verify_run(open_run(folder)) == []
    assert driver.results(folder) == driver.results(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    if (
        not mounted
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "none", place], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("a small disk cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle(driver: Any, tmp_path: Path, small_disk: Path) -> None:
    driver.use_every_condition()
    options = ("--set", "compute.shard_size=6")
    folder = small_disk / "run"
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 170 * 1024)
    code, error = driver.call("run", folder, *options)
    assert code == 2, error
    assert "No space left" in one_line(error)
    assert "what is committed stays" in one_line(error)
    assert no_half_files(folder)
    parts = {path: path.read_bytes() for path in folder.rglob("part-*.parquet")}
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    code, error = driver.call("run", folder, *options)
    assert code == 0, error
    assert verify_run(open_run(folder)) == []
    assert all(path.read_bytes() == data for path, data in parts.items())


def test_a_folder_that_may_not_be_written(driver: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert driver.call("explain", folder, "--shard", "0/2")[0] == 0
    if os.geteuid() == 0:  # root may write everything but a read-only mount
        done = subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False).returncode
        if (
            done
            or subprocess.run(["mount", "-o", "remount,ro,bind", folder], capture_output=True, check=False).returncode
        ):
            pytest.skip("a read-only place cannot be made here")
    else:
        folder.chmod(0o500)
        (folder / "events.jsonl").unlink(missing_ok=True)
    try:
        code, error = driver.call("explain", folder)
        assert code == 2
        assert "Read-only" in one_line(error) or "Permission" in one_line(error)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "-l", folder], check=True)
        else:
            folder.chmod(0o700)
    assert driver.call("explain", folder)[0] == 0
    assert verify_run(open_run(folder)) == []


@pytest.mark.parametrize("what", ["checkpoint", "manifest", "image", "part"])
def test_a_file_that_vanishes_between_two_calls(
    driver: Any, tmp_path: Path, what: str, weights: Path, images: Path
) -> None:
    shutil.copytree(weights, tmp_path / "weights")
    shutil.copytree(images.parent, tmp_path / "images")
    text = driver.config.read_text().replace(str(weights), str(tmp_path / "weights"))
    driver.config.write_text(text.replace(str(images), str(tmp_path / "images" / "manifest.csv")))
    folder = tmp_path / "run"
    assert driver.call("explain", folder, "--shard", "0/2")[0] == 0
    gone = {
        "checkpoint": tmp_path / "weights" / "seed1.safetensors",
        "manifest": tmp_path / "images" / "manifest.csv",
        "image": tmp_path / "images" / "real" / "camera" / "008.png",
        "part": min(folder.rglob("part-*.parquet")),
    }[what]
    data = gone.read_bytes()
    gone.unlink()
    code, error = driver.call("explain", folder)
    if what == "part":
        assert code == 0
        assert gone.read_bytes() == data
    elif what == "image":
        assert code == 3  # one of 26 images is more than 1 %
        assert "quarantined" in one_line(error)
        run = open_run(folder)
        assert run.quarantine()["kind"].to_pylist() == ["missing"]
        assert verify_run(run) == []
    else:
        assert code == 2
        assert ("'a' has 1 (seed0)" if what == "checkpoint" else gone.name) in one_line(error)
        gone.write_bytes(data)
        assert driver.call("explain", folder)[0] == 0
        assert verify_run(open_run(folder)) == []
