"""events.jsonl of a run: what happened when, for people; no result depends on it."""

import json
import time
from pathlib import Path


def log_event(folder: Path, stage: str, event: str, **values: object) -> None:
    """Append one line."""
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "stage": stage, "event": event} | values
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
