"""The tutorial runs as it is written, in an empty folder."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"


SMALLER = {"input_size = 160": "input_size = 64", "epochs = 2": "epochs = 1", "bootstrap = 200": "bootstrap = 20"}
"""Changes of the study that leave every command of the page as it is."""


@pytest.mark.usefixtures("no_pdf")
def test_every_command_of_the_tutorial_runs(call, tmp_path):
    """In this process, where PyTorch is imported already."""
    blocks = re.findall(r"```(\w+)(?: file=(\S+))?\n(.*?)```", TUTORIAL.read_text(), re.S)
    assert [kind for kind, _, _ in blocks] == ["sh", "toml", "sh", "sh", "sh", "python", "python"]
    for kind, name, text in blocks:
        if kind == "toml":
            for words, smaller in SMALLER.items():
                assert words in text
                text = text.replace(words, smaller)
            (tmp_path / name).write_text(text)
        elif kind == "python":
            run_python(text)
        else:
            for line in text.splitlines():
                program, *arguments = shlex.split(line)
                if program == "python":
                    assert arguments[0] == "-c"
                    run_python(arguments[1])
                else:
                    assert program == "explain2me"
                    code, output, errors = call(*arguments)
                    assert code == 0, f"{line}: {output[-500:]}{errors[-2000:]}"
    assert (tmp_path / "results" / "run" / "report" / "index.html").exists()


def run_python(text: str) -> None:
    exec(compile(text, "tutorial", "exec"), {"__name__": "__main__"})


def test_the_installed_command_starts():
    command = Path(sys.executable).with_name("explain2me")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("explain2me ")
