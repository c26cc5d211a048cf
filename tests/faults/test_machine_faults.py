"""Faults of the machine: one line, no image in the quarantine, and the same command continues to the same bytes."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
from container_files import png, write_tar
from PIL import PngImagePlugin
from refused import refused

from explain2me.images import decode, reading


@contextmanager
def no_image_opens(code: int, _: Path) -> Iterator[None]:
    genuine = os.open

    def fail(path: Any, *options: Any) -> int:
        if Path(path).suffix == ".png":
            raise OSError(code, os.strerror(code), str(path))
        return genuine(path, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading.os, "open", fail)
        yield


@contextmanager
def no_thread_starts(_: Path) -> Iterator[None]:
    """As ``ulimit -u`` has it on a login node."""
    genuine = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name.startswith("explain2me-images"):
            raise RuntimeError("can't start new thread")
        genuine(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        yield


@contextmanager
def no_memory(_: Path) -> Iterator[None]:
    def fail(*_: object) -> NoReturn:
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PngImagePlugin.PngImageFile, "load", fail)
        patch.setattr(decode, "_check_memory", fail)
        yield


@contextmanager
def lost_disk(images: Path) -> Iterator[None]:
    """One of two; less than half of a shard, and no more than a few images."""
    disk = images / "fake" / "gan_b"
    disk.rename(images / "elsewhere")
    try:
        yield
    finally:
        (images / "elsewhere").rename(disk)


@contextmanager
def unmounted_disk(images: Path) -> Iterator[None]:
    """Its folder is there, and empty."""
    with lost_disk(images):
        (images / "fake" / "gan_b").mkdir()
        try:
            yield
        finally:
            (images / "fake" / "gan_b").rmdir()


FAULTS: dict[str, tuple[Callable[[Path], AbstractContextManager[None]], str]] = {
    "EMFILE": (partial(no_image_opens, errno.EMFILE), "the file cannot be read (Too many open files). Nothing is quar"),
    "EACCES": (partial(no_image_opens, errno.EACCES), "the file may not be read; change its permissions. Nothing is q"),
    "EIO": (partial(no_image_opens, errno.EIO), "the file cannot be read (Input/output error). Nothing is quarantined"),
    "threads": (no_thread_starts, "no more threads can be started here; what is committed stays"),
    "memory": (no_memory, "out of memory; what is committed stays"),
    "a lost disk": (lost_disk, "gan_b' is missing or empty; is its disk there? Nothing is quarantined"),
    "an unmounted disk": (unmounted_disk, "gan_b' is missing or empty; is its disk there?"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_machine_stops_the_run_and_the_next_call_continues(
    driver: Any, tmp_path: Path, images: Path, name: str
) -> None:
    shutil.copytree(images.parent, tmp_path / "images")
    driver.config.write_text(driver.config.read_text().replace(str(images), str(tmp_path / "images" / "manifest.csv")))
    folder, (fault, message) = tmp_path / "run", FAULTS[name]

    def call(*options: str) -> tuple[int, str, str]:
        code, error = driver.call("explain", folder, "--set", "compute.shard_size=13", *options)
        return code, "", error

    with fault(tmp_path / "images"):
        refused(call(), message)
    assert call("--shard", "0/2") == (0, "", "")
    with fault(tmp_path / "images"):
        refused(call(), message)
    assert call() == (0, "", "")
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["stage"] for event in events if event["event"] == "error"] == ["index", "explain"]
    continued = driver.results(folder)
    assert not [path for path in continued if path.startswith("quarantine")]
    shutil.rmtree(folder)
    assert call() == (0, "", "")
    assert driver.results(folder) == continued


def test_a_lost_disk_stops_worker_processes_with_one_line(driver: Any, tmp_path: Path, images: Path) -> None:
    shutil.copytree(images.parent, tmp_path / "images")
    driver.config.write_text(driver.config.read_text().replace(str(images), str(tmp_path / "images" / "manifest.csv")))
    assert driver.call("explain", tmp_path / "run", "--shard", "0/2")[0] == 0
    with lost_disk(tmp_path / "images"):
        code, error = driver.call("explain", tmp_path / "run", "--set", "compute.workers=2")
    refused((code, "", error), "gan_b' is missing or empty; is its disk there? Nothing is quarantined")
    assert driver.call("explain", tmp_path / "run") == (0, "")
    assert not (tmp_path / "run" / "quarantine").exists()


FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from explain2me.cli import main
main()
"""


def test_more_containers_than_files_may_be_open(driver: Any, tmp_path: Path, images: Path) -> None:
    lines = ["path,label"]
    for i in range(70):
        write_tar(tmp_path / f"{i}.tar", {"a.png": png(i)})
        lines.append(f"{i}.tar/a.png,{'real' if i % 2 else 'fake'}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    driver.config.write_text(driver.config.read_text().replace(str(images), str(tmp_path / "manifest.csv")))
    command = [sys.executable, "-c", FEW_FILES, "explain", str(driver.config), "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "--set", "compute.shard_size=70"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "run" / "quarantine").exists()
