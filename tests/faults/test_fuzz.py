"""A short pass of tests/faults/fuzz.py, and that it sees what it looks for; `make fuzz` is the long one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fuzz.py")


def fuzz(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kind", "count"), [("images", 200), ("configs", 150), ("checkpoints", 100), ("run-folders", 60)]
)
def test_hostile_files_are_read_or_refused(kind: str, count: int) -> None:
    code, output = fuzz(kind, "--count", str(count), "--seed", "1")
    assert code == 0, output
    assert f"{kind}: {count} inputs" in output
    accepted, refused = map(int, re.search(r"(\d+) accepted, (\d+) refused, 0 failed", output).groups())
    assert accepted > count / 100
    assert refused > count / 4


def test_a_reader_that_raises_hangs_dies_or_grows_is_seen() -> None:
    code, output = fuzz("broken", "--count", "7", "--seconds", "1")
    assert code == 1
    assert "7 inputs, 2 accepted, 0 refused, 5 failed" in output
    wanted = (
        "KeyError: b'raises'",
        "longer than 1.0 s, twice",
        "died (-6)",
        "MemoryError",
        "AssertionError: more than 1536 MiB",
    )
    for index, words in enumerate(wanted, start=1):
        again = f"python tests/faults/fuzz.py --seed 0 broken --only {index}"
        assert re.search(rf"FAILED {re.escape(words)}.*\n +again: {re.escape(again)}\n", output), output
    code, output = fuzz("broken", "--only", "1")
    assert code == 1
    assert "1 inputs" in output
