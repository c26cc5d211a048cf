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


def test_a_mistake_about_labels_needs_no_torch(write_config: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "unlabelled.csv"
    manifest.write_text(f"path\n{images.parent}/real/camera/000.png\n")
    config = write_config(data=f'manifest = "{manifest}"', extra='[salience]\ntarget = "true"\n')
    script = f"import sys; sys.argv = ['explain2me', 'run', {str(config)!r}]\nfrom explain2me.cli import main\n"
    script += "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "salience.target = 'true' needs labels" in done.stderr
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
    assert "what is committed stays, call the same command to continue" in errors


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
