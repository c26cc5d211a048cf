"""The second run of a finished folder does nothing, quickly; any change makes it look again."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from explain2me.cli import finished
from explain2me.cli.finished import FINISHED, find_finished
from explain2me.config.load import load_config
from explain2me.images.select import select_images

SMALL = {
    "measures": "resilience = false\nfocus = false",
    "summary": "bootstrap = 10",
    "report": "images = 1",
    "compute": 'device = "cpu"\nbatch_size = 8\nthreads = 1',
}
Found = Callable[..., object]


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("once")


@pytest.fixture
def config(write_config: Callable[..., Path], tmp_path: Path, weights: Path, images: Path, detector_table) -> Path:
    """A config whose checkpoints and manifest are copies."""
    for i in range(2):
        shutil.copy(weights / f"seed{i}.safetensors", tmp_path)
    shutil.copy(images, images.parent / "copy.csv")
    detectors = detector_table("a", f"{tmp_path}/seed[01].safetensors")
    return write_config(detectors=detectors, data=f'manifest = "{images.parent}/copy.csv"', **SMALL)


@pytest.fixture
def folder(once: Path, call, config: Path, tmp_path: Path) -> Path:
    """A finished run: made once, but remembered for the files of each test."""
    if not (once / "run").exists():
        assert call("run", config, "-o", once / "run")[0] == 0
    shutil.copytree(once / "run", tmp_path / "run")
    state = json.loads((tmp_path / "run" / FINISHED).read_text())
    settings = load_config(config)
    state["from"] = finished._sources(settings, select_images(settings.data, settings.seed))
    (tmp_path / "run" / FINISHED).write_text(json.dumps(state))
    return tmp_path / "run"


@pytest.fixture
def found(config: Path, folder: Path) -> Found:
    def find(*sets: str) -> object:
        settings = load_config(config, sets)
        return find_finished(settings, folder, select_images(settings.data, settings.seed))

    return find


def test_the_same_command_prints_the_same_tables_without_pytorch(folder, config):
    script = (
        "import sys; from explain2me.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    words = [sys.executable, "-c", script, "run", str(config), "-o", str(folder)]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "nothing to do: its config, list of images and checkpoints are those of the finished run"
    assert lines[-1] == "False"
    assert f"report: {folder}/report/index.html" in lines
    assert "What the numbers say" in lines
    assert "Nothing stands out." not in done.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_it_is_found_as_long_as_nothing_changes(found):
    assert found() is not None


@pytest.mark.parametrize("sets", ["report.images=2", "summary.bootstrap=20", 'measures.similarity=["pearson"]'])
def test_another_setting_is_looked_at(found, sets):
    assert found(sets) is None


@pytest.mark.parametrize("name", ["summary/measures.parquet", "summary/measures.csv", "report/index.html", "run.json"])
@pytest.mark.parametrize("gone", [True, False], ids=["gone", "changed"])
def test_a_product_that_is_gone_or_changed_is_looked_at(found, folder, name, gone):
    if gone:
        (folder / name).unlink()
    else:
        with (folder / name).open("ab") as file:
            file.write(b" ")
    assert found() is None


@pytest.mark.parametrize("pattern", ["maps/*/part-*", "scores/*"])
def test_maps_or_scores_that_are_gone_are_looked_at(found, folder, pattern):
    next(folder.glob(pattern)).unlink()
    assert found() is None


def test_another_checkpoint_of_the_same_name_is_looked_at(found, tmp_path):
    path = tmp_path / "seed1.safetensors"
    time = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(time, time))  # neither size nor time tells
    assert found() is None


def test_another_list_of_images_is_looked_at(found, images):
    copy = images.parent / "copy.csv"
    copy.write_text("\n".join(copy.read_text().splitlines()[:-1]) + "\n")
    assert found() is None


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"findings": 3}'])
def test_a_damaged_note_is_no_error(found, folder, text):
    (folder / FINISHED).write_text(text)
    assert found() is None


@pytest.mark.parametrize("name", ["report/tables/overview.csv", "report/findings.md"])
def test_a_file_of_the_report_that_is_gone_is_looked_at(found, folder, name):
    (folder / name).unlink()
    assert found() is None


def test_a_pipe_in_its_place_is_not_opened(found, folder):
    (folder / FINISHED).unlink()
    os.mkfifo(folder / FINISHED)
    assert found() is None


def test_another_version_of_a_library_is_looked_at(found, monkeypatch):
    monkeypatch.setattr(finished, "versions", lambda: {"torch": "0.1"})
    assert found() is None
