"""The chosen batch size is about as fast as any, and a run keeps it."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from explain2me.config.load import load_config
from explain2me.errors import ConfigError
from explain2me.salience.batch_size import fastest
from explain2me.stages import begin
from explain2me.stages.begin import begin_run
from explain2me.stages.explain import explain_run

ENTROPY = "noise = false\nresilience = false\nfocus = false\nstability = false"


def machine(seconds: Callable[[int], float], memory: int = 10**9) -> tuple[Callable[[int], None], Callable[[], float]]:
    """A simulated machine: a function that explains a batch, and its clock."""
    now = itertools.count()
    state = {"time": 0.0}

    def explain(size: int) -> None:
        next(now)
        if size > memory:
            raise torch.cuda.OutOfMemoryError("out of memory")
        state["time"] += seconds(size)

    return explain, lambda: state["time"]


SIZES = (4, 8, 16, 32, 64, 128)


@pytest.mark.parametrize(
    ("seconds", "memory", "expected"),
    [
        (lambda size: size, 1000, 4),  # no gain at all
        (lambda size: max(size, 32), 1000, 32),  # gains up to 32
        (lambda size: 100 + size, 1000, 128),  # gains to the end
        (lambda size: 100 + size, 64, 32),  # memory for 64: half of it
        (lambda size: 100 + size, 4, 4),
        (lambda size: 1, 2, 0),  # none fits
    ],
)
def test_the_smallest_size_that_is_about_as_fast_as_any(seconds, memory: int, expected: int) -> None:
    explain, clock = machine(seconds, memory)
    assert fastest(explain, SIZES, clock=clock) == expected


def test_a_batch_that_takes_too_long_is_not_chosen_unless_it_is_the_smallest() -> None:
    explain, clock = machine(lambda size: 1 + size / 100)  # the larger, the faster
    assert fastest(explain, SIZES, most_seconds=1.2, clock=clock) == 16
    explain, clock = machine(lambda size: 100)
    assert fastest(explain, SIZES, most_seconds=1.2, clock=clock) == 4


def test_a_run_keeps_the_size_that_it_found(write_config: Callable[..., Path], tmp_path: Path, monkeypatch) -> None:
    config = write_config(compute='device = "cpu"\nbatch_size = "auto"\nshard_size = 10', measures=ENTROPY)
    sizes = iter([7, 5])
    monkeypatch.setattr(begin, "find_batch_size", lambda *_: next(sizes))
    run = explain_run(load_config(config), tmp_path / "run")
    assert run.config.compute.batch_size == 7
    assert explain_run(load_config(config), tmp_path / "run").config.compute.batch_size == 7
    assert next(sizes) == 5  # the search did not run again


def test_of_two_machines_that_begin_together_the_second_takes_what_the_first_found(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch
) -> None:
    config = load_config(write_config(compute='device = "cpu"\nbatch_size = "auto"\nshard_size = 10'))
    sizes = iter([5, 7])
    monkeypatch.setattr(begin, "find_batch_size", lambda *_: next(sizes))
    others = []

    def meanwhile(done: int, total: int) -> None:
        if not others and done == total:
            others.append(begin_run(config, tmp_path / "run", share=(1, 2)))

    run = begin_run(config, tmp_path / "run", share=(0, 2), on_indexed=meanwhile)
    assert others[0].config.compute.batch_size == run.config.compute.batch_size == 7
    assert not [path for path in run.folder.iterdir() if path.name not in ("run.json", "images.parquet")]


def test_it_is_found_on_real_networks(write_config: Callable[..., Path], tmp_path: Path) -> None:
    run = begin_run(
        load_config(write_config(compute='device = "cpu"\nbatch_size = "auto"\nshard_size = 16')), tmp_path / "run"
    )
    assert run.config.compute.batch_size in (4, 8, 16)


def test_other_words_are_refused(write_config: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"compute\.batch_size"):
        load_config(write_config(), ["compute.batch_size=much"])
