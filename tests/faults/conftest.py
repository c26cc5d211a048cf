"""A small run in a process of its own, that tests kill, starve and compare."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from explain2me.config.load import load_config
from explain2me.config.schema import Config

FEW = "[measures]\nresilience = false\nfocus = false\n"
"""Two conditions of sixteen: enough where only the order of events counts."""
COMMAND = "import sys; sys.path.pop(0); from explain2me.cli import main; main()"


@dataclass
class Driver:
    """The command line over one config; every call is a process of its own."""

    config: Path
    here: Callable[..., tuple[int, str, str]]
    environment: dict[str, str] = field(default_factory=dict)
    started: list[subprocess.Popen] = field(default_factory=list)

    def use_every_condition(self) -> None:
        """Runs that take longer, and larger files."""
        self.config.write_text(self.config.read_text().replace(FEW, ""))

    def start(self, command: str, out: Path, *options: str) -> subprocess.Popen:
        """Begin and do not wait."""
        words = [sys.executable, "-c", COMMAND, command, str(self.config), "--out", str(out), *options]
        log = self.config.with_name(f"stderr-{len(self.started)}")
        with log.open("w") as stderr:
            process = subprocess.Popen(
                words,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=os.environ | self.environment,
                start_new_session=True,
            )
        process.log = log
        self.started.append(process)
        return process

    def call(self, command: str, out: Path, *options: str) -> tuple[int, str]:
        """Exit code and standard error; in this process where nothing is done to it, which is faster."""
        if not any("workers" in option or "ray" in option for option in options):
            code, _, error = self.here(command, self.config, "--out", out, *options)
            return code, error
        process = self.start(command, out, *options)
        return process.wait(300), process.log.read_text()

    @staticmethod
    def results(folder: Path, *, but: Sequence[str] = ()) -> dict[str, bytes]:
        """Every file of a run that holds a result."""
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith("events") and path.name not in but
        }

    @staticmethod
    def workers_of(driver: subprocess.Popen) -> list[psutil.Process]:
        """Worker processes: forks of the server that the driver has for them."""
        found = []
        try:
            for child in psutil.Process(driver.pid).children(recursive=True):
                if child.ppid() != driver.pid and any("forkserver" in word for word in child.cmdline()):
                    found.append(child)
        except psutil.NoSuchProcess:
            pass
        return found

    @staticmethod
    def wait_until(condition: Callable[[], object], seconds: float = 120) -> bool:
        """Whether it became true."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.01)
        return False


@pytest.fixture
def driver(
    tmp_path: Path,
    images: Path,
    weights: Path,
    detector_table: Callable[..., str],
    call: Callable[..., tuple[int, str, str]],
) -> Iterator[Driver]:
    config = tmp_path / "config.toml"
    table = detector_table("a", f"{weights}/seed[01].safetensors")
    config.write_text(
        f'name = "x"\n{table}[data]\nmanifest = "{images}"\n{FEW}[summary]\nbootstrap = 20\n[report]\nafter_run = false\n'
        '[compute]\ndevice = "cpu"\nbatch_size = 4\nshard_size = 2\nthreads = 1\n'
    )
    made = Driver(config, call)
    yield made
    for process in made.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def small_config(write_config: Callable[..., Path]) -> Callable[..., Config]:
    """The config of a few images: (manifest, *, shard_size, other tables) -> config."""

    def make(manifest: Path, *, shard_size: int, **tables: str) -> Config:
        compute = f'device = "cpu"\nbatch_size = 8\nshard_size = {shard_size}'
        report = "images = 1\nafter_run = false"
        data = f'manifest = "{manifest}"'
        return load_config(write_config(data=data, compute=compute, report=report, summary="bootstrap = 10", **tables))

    return make
