"""Folders that are replaced as a whole, and the lock of a run folder."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from explain2me.errors import BusyError
from explain2me.run import files
from explain2me.run.files import only_writer, replaced_folder
from explain2me.run.leftovers import remove_leftovers

HOLD = """
import sys, time
from pathlib import Path
from explain2me.run.files import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def fill(folder: Path, text: str, count: int = 5) -> None:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        (folder / f"{i}.txt").write_text(text)


@pytest.fixture(params=["exchange", "three renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With renameat2, and on a system without it."""
    if request.param == "three renames":
        monkeypatch.setattr(files.ctypes, "CDLL", lambda name: object())
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    fill(tmp_path / "tables", "old", 7)
    with replaced_folder(tmp_path / "tables") as new:
        fill(new, "new")
        assert len(list((tmp_path / "tables").iterdir())) == 7
    assert [path.read_text() for path in sorted((tmp_path / "tables").iterdir())] == ["new"] * 5
    assert [path.name for path in tmp_path.iterdir()] == ["tables"]


@pytest.mark.usefixtures("way")
def test_after_an_error_the_old_folder_is_there(tmp_path: Path) -> None:
    fill(tmp_path / "tables", "old")
    with pytest.raises(OSError, match="disk"), replaced_folder(tmp_path / "tables") as new:
        fill(new, "new")
        raise OSError("disk full")
    assert {path.read_text() for path in (tmp_path / "tables").iterdir()} == {"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["tables"]


@pytest.mark.usefixtures("way")
def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tables").symlink_to(tmp_path / "elsewhere")
    with replaced_folder(tmp_path / "run" / "tables") as new:
        fill(new, "new")
    assert not (tmp_path / "run" / "tables").is_symlink()
    assert {path.read_text() for path in (tmp_path / "elsewhere").iterdir()} == {"precious"}


@pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2")
def test_a_reader_never_finds_the_folder_missing(tmp_path: Path) -> None:
    fill(tmp_path / "tables", "0")
    stop, there = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            there.append((tmp_path / "tables").is_dir())

    reader = threading.Thread(target=read)
    reader.start()
    for count in range(200):
        with replaced_folder(tmp_path / "tables") as new:
            fill(new, str(count))
    stop.set()
    reader.join()
    assert all(there)
    assert len(there) > 200


def test_folders_of_ended_processes_are_removed(tmp_path: Path) -> None:
    fill(tmp_path / ".tmp-x.tmp", "half")
    os.utime(tmp_path / ".tmp-x.tmp", (time.time() - 7200,) * 2)
    assert remove_leftovers(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(BusyError, match=r"^another process is writing into .*; wait for it or stop it"),
            only_writer(tmp_path),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with only_writer(tmp_path):  # a killed process holds nothing
        pass
