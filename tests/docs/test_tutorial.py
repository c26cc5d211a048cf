"""The tutorial runs as it is written, in an empty folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

TUTORIAL = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"


def test_every_command_of_the_tutorial_runs(tmp_path):
    blocks = re.findall(r"```(\w+)(?: file=(\S+))?\n(.*?)```", TUTORIAL.read_text(), re.S)
    assert [kind for kind, _, _ in blocks] == ["sh", "toml", "sh", "sh", "sh", "python", "python"]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    for kind, name, text in blocks:
        if kind == "toml":
            (tmp_path / name).write_text(text)
            continue
        commands = [shlex.split(line) for line in text.splitlines()] if kind == "sh" else [["python", "-c", text]]
        for command in commands:
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, f"{command}: {done.stdout[-500:]}{done.stderr[-2000:]}"
    assert (tmp_path / "results" / "run" / "report" / "index.html").exists()
