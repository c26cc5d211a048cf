"""Nothing lost, nothing doubled, the same bytes: whatever is killed, however the work is shared."""

import contextlib
import json
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from explain2me.run.folder import open_run
from explain2me.stages.verify import verify_run

IMAGES, MODELS, SHARDS = 26, 2, 26
RUN_JSON = ("run.json", "finished.json")  # they say how many workers there were


def events(folder: Path) -> list[dict]:
    lines = [line for path in folder.glob("events*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]  # a kill may cut the last line


def check_whole(driver: Any, folder: Path, reference: dict[str, bytes], *, but: tuple[str, ...] = ()) -> None:
    run = open_run(folder)
    maps = run.maps(["image", "condition"]).to_pandas()
    assert len(maps) == IMAGES * maps.condition.nunique() * MODELS
    assert not maps.duplicated(["detector", "run", "image", "condition"]).any()
    assert verify_run(run) == []
    found = driver.results(folder, but=but)
    assert sorted(found) == sorted(set(reference) - set(but))
    assert all(found[name] == reference[name] for name in found)


def kill_some(driver: Any, process: subprocess.Popen, who: str) -> int:
    """Kill the driver, a worker or all; how many tasks were lost at most."""
    workers = driver.workers_of(process)
    lost = len(workers) if who in ("driver", "both") else 1
    if who in ("driver", "both"):
        process.kill()
    for worker in workers if who == "both" else workers[:1] if who == "worker" else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    return max(lost, 1)


def run_under_fire(driver: Any, folder: Path, *, kills: int, seed: int, workers: int) -> None:
    """Kill at random points of progress until ``kills`` are spent; a run that gets through is checked and begun anew.

    What is compared with, and what ends each run, is one process without workers.
    """
    driver.use_every_condition()  # so that there is time to kill
    rng = random.Random(seed)
    options = ("--set", f"compute.workers={workers}")
    reference_folder = folder.with_name("reference")
    assert driver.call("run", reference_folder)[0] == 0
    reference = driver.results(reference_folder)
    spent, finished, redone, allowed, who_was = 0, 0, 0, 0, Counter()
    while spent < kills:
        current = folder / str(finished)
        process = driver.start("explain", current, *options)
        while process.poll() is None and spent < kills:
            done = sum(event["event"] == "end" for event in events(current)) if current.exists() else 0
            target = done + rng.randint(0, 4)
            before_first = rng.random() < 0.1  # while the process starts, or indexes
            if not before_first:
                driver.wait_until(
                    lambda p=process, f=current, n=target: (
                        p.poll() is not None
                        or (
                            f.exists()
                            and sum(event["event"] == "end" for event in events(f)) >= n
                            and (workers == 1 or driver.workers_of(p))  # one works in the driver itself
                        )
                    )
                )
            time.sleep(rng.random() * 0.1)
            if process.poll() is not None:
                break
            who = rng.choice(["driver", "worker", "both"]) if workers > 1 else "driver"
            allowed += kill_some(driver, process, who)
            spent += 1
            who_was[who] += 1
            if who != "worker":
                process.wait(60)
        if process.wait(300) == 0:
            assert driver.call("run", current)[0] == 0
            check_whole(driver, current, reference, but=RUN_JSON)
            redone += Counter(event["event"] for event in events(current))["begin"] - SHARDS
            finished += 1
        else:
            assert process.returncode == -signal.SIGKILL, process.log.read_text()
    current = folder / str(finished)
    code, error = driver.call("run", current)
    assert code == 0, error
    check_whole(driver, current, reference, but=RUN_JSON)
    redone += Counter(event["event"] for event in events(current))["begin"] - SHARDS
    print(f"{spent} kills ({dict(who_was)}), {finished + 1} runs, {redone} shards begun again of {allowed} allowed")
    assert redone <= allowed


def test_a_few_kills(driver: Any, tmp_path: Path) -> None:
    run_under_fire(driver, tmp_path / "runs", kills=2, seed=17, workers=2)  # a worker, then all at once


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_hundred_kills(driver: Any, tmp_path: Path, workers: int) -> None:
    run_under_fire(driver, tmp_path / "runs", kills=100 if workers == 2 else 20, seed=workers, workers=workers)


def test_shares_give_the_same_bytes(driver: Any, tmp_path: Path) -> None:
    assert driver.call("run", tmp_path / "one")[0] == 0
    other = driver.start("run", tmp_path / "shared", "--shard", "0/2")
    assert driver.wait_until((tmp_path / "shared").exists)
    assert driver.call("run", tmp_path / "shared", "--shard", "1/2")[0] == 0
    assert other.wait(300) == 0
    if not (tmp_path / "shared" / "summary" / "measures.csv").exists():  # both ended at the same moment
        assert driver.call("run", tmp_path / "shared", "--shard", "0/2")[0] == 0
    check_whole(driver, tmp_path / "shared", driver.results(tmp_path / "one"))


@pytest.mark.slow
def test_two_workers_give_the_same_bytes(driver: Any, tmp_path: Path) -> None:
    assert driver.call("run", tmp_path / "one")[0] == 0
    assert driver.call("run", tmp_path / "two", "--set", "compute.workers=2")[0] == 0
    check_whole(driver, tmp_path / "two", driver.results(tmp_path / "one"), but=RUN_JSON)


@pytest.mark.slow
def test_ray_gives_the_same_bytes_though_a_worker_and_then_the_driver_is_killed(driver: Any, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    assert driver.call("run", tmp_path / "one")[0] == 0
    options = ("--set", "compute.executor=ray", "--set", "compute.workers=2")
    folder = tmp_path / "ray"
    first = driver.start("run", folder, *options)

    def done() -> int:
        return sum(event["event"] == "end" for event in events(folder)) if folder.exists() else 0

    assert driver.wait_until(lambda: done() >= 3 or first.poll() is not None, 200)
    actors = [
        child
        for child in psutil.Process(first.pid).children(recursive=True)
        if any("ray::_Actor" in word for word in child.cmdline())
    ]
    assert actors
    actors[0].kill()
    assert driver.wait_until(lambda: done() >= 8 or first.poll() is not None, 200)
    assert first.poll() is None, first.log.read_text()
    first.kill()
    first.wait(60)
    assert 0 < done() < SHARDS
    assert driver.call("run", folder, *options)[0] == 0
    check_whole(driver, folder, driver.results(tmp_path / "one"), but=RUN_JSON)
    begun = Counter(event["event"] for event in events(folder))["begin"]
    assert begun <= SHARDS + 1 + 2
