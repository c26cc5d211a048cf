"""Mutated images, configs, checkpoints and run folders: each is read or refused in one clear error, in seconds and in bounded
memory.

    python tests/faults/fuzz.py --count 10000 --seed 0 [images] [configs] [checkpoints] [run-folders]
    python tests/faults/fuzz.py --seed 0 images --only 4711

Input i of a kind depends on (seed, kind, i) only. A child process with a limit on its memory reads them; one that hangs or
dies is replaced, and its input counts as a failure. Exit code 1 when an input failed.
"""

import argparse
import faulthandler
import importlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzzing.checkpoints import change_checkpoint, checkpoints, read_weights
from fuzzing.configs import change_config, configs, read_config
from fuzzing.images import change_image, images, read_image
from fuzzing.mutations import MEMORY, Outcome, check_error, mutate
from fuzzing.run_folders import read_run_folder

SECONDS = {"run-folders": 60.0}
"""Longest time for one input where it is not 5 s: a whole command takes longer on a busy machine."""


TOO_LATE = 1
"""The exit code that faulthandler gives."""


def read_broken(data: bytes, rng: random.Random, folder: Path) -> Outcome:
    """Everything that a reader must not do: shows that this script sees it."""
    match data:
        case b"raises":
            raise KeyError(data)
        case b"hangs":
            while True:
                time.sleep(0.01)
        case b"dies":
            os.abort()
        case b"grows":
            bytes(2 * MEMORY)
        case b"hides":
            try:
                try:
                    bytes(2 * MEMORY)
                except MemoryError:
                    raise ValueError("refused") from None
            except ValueError as error:
                check_error(error)
    return "accepted"


BROKEN = (b"fine", b"raises", b"hangs", b"dies", b"grows", b"hides")


Make = Callable[[random.Random, int], bytes]


KINDS: dict[str, tuple[Make, Callable[[bytes, random.Random, Path], Outcome], tuple[str, ...]]] = {
    "images": (lambda rng, _: mutate(images(), change_image, rng), read_image, ("explain2me.images.decode",)),
    "configs": (lambda rng, _: mutate(configs(), change_config, rng, share=0.9), read_config, ("explain2me.config.schema",)),
    "checkpoints": (
        lambda rng, _: mutate(checkpoints(), change_checkpoint, rng, share=0.8), read_weights, ("explain2me.detectors.load",)
    ),
    "run-folders": (
        lambda *_: b"", read_run_folder, ("explain2me.cli", "explain2me.stages.verify", "explain2me.stages.compact", "explain2me.report.write")
    ),
    "broken": (lambda _, index: BROKEN[index % len(BROKEN)], read_broken, ()),
}  # fmt: skip


def child(kind: str, indices: range, seed: int, seconds: float) -> None:
    """Read the inputs one after the other, and say before each which it is."""
    make, read, modules = KINDS[kind]
    for module in modules:
        importlib.import_module(module)
    make(random.Random(0), 0)  # makes the corpus, and loads what Pillow and torch load late
    faulthandler.enable()
    baseline = Path("/proc/self/statm").read_text().split() if Path("/proc/self/statm").exists() else ["0", "0"]
    size, resident = (int(pages) * resource.getpagesize() for pages in baseline[:2])
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    with tempfile.TemporaryDirectory() as folder:
        for index in indices:
            rng = random.Random(f"{seed} {kind} {index}")
            with warnings.catch_warnings(action="ignore"):  # zipfile, of names that are there twice
                data = make(rng, index)
            tell({"start": index})
            faulthandler.dump_traceback_later(seconds, exit=True)
            started = time.monotonic()
            failure, outcome = "", ""
            try:
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    outcome = read(data, rng, Path(folder))
                assert not said, f"a warning reached the user: {said[0].message}"
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"[:400]
                traceback.print_exc()
            took = time.monotonic() - started
            faulthandler.cancel_dump_traceback_later()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
            tell({"end": index, "outcome": outcome, "failure": failure, "seconds": took, "peak": peak})


def tell(words: dict[str, Any]) -> None:
    print(json.dumps(words), flush=True)


@dataclass
class Tally:
    """What came of the inputs of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)
    slowest: tuple[float, int] = (0.0, -1)
    peak: int = 0


def fuzz(kind: str, indices: range, seed: int, seconds: float) -> Tally:
    """Every input, whatever becomes of the children. A machine can stall: what took too long is tried once more."""
    tally = Tally()
    left = indices
    late = -1
    while left:
        at = None
        code = [0]
        for words in lines_of_child(kind, left, seed, seconds, code):
            if "start" in words:
                at = words["start"]
                continue
            index, at = words["end"], None
            left = range(index + 1, indices.stop)
            if words["failure"]:
                tally.failures[index] = words["failure"]
            else:
                tally.outcomes[words["outcome"]] += 1
            tally.slowest = max(tally.slowest, (words["seconds"], index))
            tally.peak = max(tally.peak, words["peak"])
        if not left:
            break
        if at is None:
            raise SystemExit(f"{kind}: the child ended between two inputs, at {left.start}")
        if code[0] == TOO_LATE and at != late:
            late = at
            left = range(at, indices.stop)
            continue
        tally.failures[at] = (
            f"longer than {seconds} s, twice" if code[0] == TOO_LATE else f"died ({code[0]}); see above"
        )
        left = range(at + 1, indices.stop)
    return tally


def lines_of_child(kind: str, indices: range, seed: int, seconds: float, code: list[int]) -> Iterator[dict[str, Any]]:
    """What a child says; its exit code goes into ``code`` at the end."""
    numbers = [str(number) for number in (indices.start, indices.stop, seed, seconds)]
    command = [sys.executable, __file__, "--child", kind, *numbers]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    code[0] = process.returncode


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        kind, start, stop, seed, seconds = sys.argv[2:]
        child(kind, range(int(start), int(stop)), int(seed), float(seconds))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "kinds",
        nargs="*",
        choices=[*KINDS, []],
        metavar="KIND",
        help="images, configs, checkpoints, run-folders; default: all",
    )
    parser.add_argument("--count", type=int, default=10_000, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="INDEX", help="this input alone")
    parser.add_argument("--seconds", type=float, help="longest time for one input; default: 5, for run folders 60")
    options = parser.parse_args()
    indices = range(options.count) if options.only is None else range(options.only, options.only + 1)
    failed = 0
    for kind in options.kinds or ("images", "configs", "checkpoints", "run-folders"):
        tally = fuzz(kind, indices, options.seed, options.seconds or SECONDS.get(kind, 5.0))
        refused = tally.outcomes.total() - tally.outcomes["accepted"]
        print(
            f"{kind}: {len(indices)} inputs, {tally.outcomes['accepted']} accepted, {refused} refused, "
            f"{len(tally.failures)} failed; slowest {tally.slowest[0]:.2f} s (input {tally.slowest[1]}), "
            f"at most {tally.peak / 2**20:.0f} MiB more than at the start"
        )
        print(
            "  refused: " + ", ".join(f"{name} {n}" for name, n in tally.outcomes.most_common() if name != "accepted")
        )
        for index, failure in tally.failures.items():
            print(
                f"  FAILED {failure}\n    again: python tests/faults/fuzz.py --seed {options.seed} {kind} --only {index}"
            )
        failed += len(tally.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
