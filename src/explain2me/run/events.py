"""events.jsonl of a run: a log for people. No result depends on it."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path


def log_event(folder: Path, share: tuple[int, int], stage: str, event: str, **values: object) -> None:
    """Append one line. With several machines each has its own file, ``events-2-of-8.jsonl``."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "stage": stage, "event": event} | values
    name = "events.jsonl" if share[1] == 1 else f"events-{share[0]}-of-{share[1]}.jsonl"
    with (folder / name).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def logging_errors(folder: Path, share: tuple[int, int], stage: str) -> Iterator[None]:
    """Log the error that ends the block, if the disk lets us."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError):
            log_event(folder, share, stage, "error", kind=type(error).__name__, message=str(error))
        raise
