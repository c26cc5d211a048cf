"""The entry point: help, version, stops, and that no command prints control characters."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refused import refused

from explain2me.text import printable

Call = Callable[..., tuple[int, str, str]]


def test_help_needs_no_torch() -> None:
    script = "import sys; sys.argv = ['explain2me', '--help']\nfrom explain2me.cli import main\n"
    script += "try:\n    main()\nfinally:\n    print(*sorted(m for m in sys.modules if '.' not in m), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "Usage: explain2me" in done.stdout
    assert not {"torch", "pandas", "pyarrow", "numpy", "pydantic", "rich"} & set(done.stderr.split())


@pytest.mark.parametrize(
    ("command", "tables", "message"),
    [
        (
            "run",
            {"extra": '[salience]\ntarget = "true"\n', "data": "manifest = UNLABELLED"},
            "salience.target = 'true' needs labels",
        ),
        ("check", {"data": 'manifest = IMAGES\npositive = "fak"'}, "data.positive"),
        ("check", {"data": "manifest = IMAGES\nsample = {camra = 2}"}, "there is no source 'camra'"),
        ("run", {"detectors": 'TABLE checkpoints = "none/*.pt"'}, "no file matches"),
        ("check", {"detectors": "TABLE random_runs = 1"}, "measures.stability compares training runs"),
        ("study", {}, "training is missing"),
        ("train", {}, "training is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_in_a_config_need_no_torch(
    write_config: Callable[..., Path], images: Path, tmp_path: Path, command: str, tables: dict[str, str], message: str
) -> None:
    (tmp_path / "unlabelled.csv").write_text(f"path\n{images.parent}/real/camera/000.png\n")
    table = '[[detectors]]\nname = "a"\narchitecture = "timm:test_resnet"\n'
    for word, text in (("UNLABELLED", f'"{tmp_path}/unlabelled.csv"'), ("IMAGES", f'"{images}"'), ("TABLE ", table)):
        tables = {name: value.replace(word, text) for name, value in tables.items()}
    config = write_config(**tables)
    script = f"import sys; sys.argv = ['explain2me', {command!r}, {str(config)!r}]\nfrom explain2me.cli import main\n"
    script += "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert message in done.stderr
    assert done.stdout == "False\n"


def test_version(call: Call) -> None:
    code, output, _ = call("--version")
    assert code == 0
    assert output.startswith("explain2me 0.")


@pytest.mark.parametrize("ask", [lambda: bytes(2**60), lambda: torch.empty(2**50)], ids=["python", "torch"])
def test_too_little_memory_is_a_line(call: Call, write_config, monkeypatch, ask) -> None:
    monkeypatch.setattr("explain2me.stages.explain.explain_run", lambda *_, **__: ask())
    refused(call("explain", write_config()), "explain2me: out of memory; what is committed stays.")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_by_the_user_says_what_to_do(call: Call, write_config, monkeypatch, number) -> None:
    def interrupt(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)  # the signal ends it

    before = signal.getsignal(number)
    monkeypatch.setattr("explain2me.stages.explain.explain_run", interrupt)
    code, _, errors = call("explain", write_config())
    assert code == 130
    assert signal.getsignal(number) == before
    assert "stopped; 0 images are read and kept, call the same command to continue" in errors


def test_a_stop_that_an_import_turns_into_another_error_is_one_line(call: Call, write_config, monkeypatch) -> None:
    def half_imported(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            raise SyntaxError("can't load a module") from None

    monkeypatch.setattr("explain2me.stages.explain.explain_run", half_imported)
    code, _, errors = call("explain", write_config())
    assert code == 130
    assert errors == "\nexplain2me: stopped; what is committed stays, call the same command to continue\n"


def test_a_stop_while_the_command_line_is_imported_is_one_line() -> None:
    script = """
import os, signal, sys
class Stop:
    @staticmethod
    def find_spec(name, *_):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Stop)
from explain2me.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "\nexplain2me: stopped before it began\n")


@pytest.mark.parametrize("evil", ["\x1b[2J\x1b]0;evil\x07", "\x9b31m"], ids=["escape", "C1"])
def test_no_command_prints_control_characters(
    call: Call, write_config: Callable[..., Path], rewrite_manifest: Callable[..., Path], evil: str
) -> None:
    rewrite_manifest(lambda text: re.sub(",(real|fake),", rf",\1{evil},", text), "evil.csv")
    config = write_config(data='manifest = "evil.csv"', measures="noise = false\nresilience = false\nfocus = false")
    positive = f"data.positive=fake{evil}"
    folder = f"run{evil.replace('/', '')}"
    results = [call("check", config, "--set", positive), call("run", config, "-o", folder, "--set", positive)]
    if results[1][0] == 0:
        results += [call("show", folder), call("verify", folder)]
        next(Path(folder).glob("maps/*/*")).unlink()
        (Path(folder) / "scores" / f"{evil}.parquet").write_text("damaged")
        results.append(call("verify", folder))
        assert results[-1][0] == 2
    for code, output, errors in results:
        assert code in (0, 2)
        assert [char for char in output + errors if not char.isprintable() and char != "\n"] == []
    assert any(printable(evil) in output + errors for _, output, errors in results)
