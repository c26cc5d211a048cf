"""A finished run remembers what it was made from, so that the same command finds at once that nothing is to be done.

Imports no PyTorch, which alone takes seconds.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from explain2me.config.compare import digest
from explain2me.config.schema import Config
from explain2me.detectors.runs import weights_of
from explain2me.errors import Explain2MeError
from explain2me.images.select import Selection
from explain2me.run.files import sha256_of, write_json
from explain2me.run.folder import Run, open_run
from explain2me.run.plan import missing_of, plan
from explain2me.run.provenance import versions

FINISHED = "finished.json"
MOST_BYTES = 2**20
Said = Sequence[tuple[str, str]]
"""Kind and text of each finding."""


class Finished(NamedTuple):
    """A run that is whole, and its findings."""

    run: Run
    findings: Said


def remember_finished(run: Run, config: Config, selection: Selection, findings: Said) -> None:
    """Write down what a finished run was made from, and the hashes of its tables and pages."""
    made = {name: sha256_of(run.folder / name) for name in _products(run.folder)}
    state = {"from": _sources(config, selection), "scores": run.scores_key(), "made": made, "findings": findings}
    write_json(state, run.folder / FINISHED)


def find_finished(config: Config, folder: Path, selection: Selection) -> Finished | None:
    """The run in a folder, if this very config has finished it; None if anything differs, or was changed since."""
    try:
        run = open_run(folder)  # first: it refuses links and pipes
        with (folder / FINISHED).open("rb") as file:
            state = json.loads(file.read(MOST_BYTES))
        whole = (
            state["from"] == _sources(config, selection)
            and not missing_of(plan(run), folder)
            and state["scores"] == run.scores_key()
            and not run.summary_is_old()
            and not run.mended_images()
            and state["made"] == {name: sha256_of(folder / name) for name in _products(folder)}
        )
        findings = [(str(kind), str(text)) for kind, text in state["findings"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, Explain2MeError):
        return None  # the stages say what is wrong, or mend it
    return Finished(run, findings) if whole else None


def _sources(config: Config, selection: Selection) -> dict[str, Any]:
    """What decides every file of a run: config, list of images, bytes of the checkpoints, versions."""
    weights = [weights for detector in config.detectors for weights in weights_of(detector, config.seed)]
    return {
        "config": digest(json.loads(config.model_dump_json())),
        "listed": digest(selection.images.to_pylist()),
        "checkpoints": {path: sha256_of(Path(path)) for _, path, _ in weights if path is not None},
        "versions": versions(),
    }


def _products(folder: Path) -> Iterator[str]:
    """Names of the tables, and of the files of the report."""
    for pattern in ("run.json", "images.parquet", "summary/*", "report/**/*"):
        yield from (path.relative_to(folder).as_posix() for path in sorted(folder.glob(pattern)) if path.is_file())
