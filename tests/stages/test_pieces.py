"""A shard that is stopped keeps the batches that were explained, and ends in the same bytes."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from explain2me.config.load import load_config
from explain2me.run.folder import Run, open_run
from explain2me.run.plan import Shard, plan
from explain2me.stages.begin import begin_run
from explain2me.stages.explain import explain_run, num_explained
from explain2me.stages.shards import commit, rows
from explain2me.stages.shards.pieces import PIECES, num_in_pieces


@pytest.fixture
def run(write_config: Callable[..., Path], tmp_path: Path, images: Path) -> Run:
    shutil.copytree(images.parent, tmp_path / "images")
    config = write_config(
        data=f'manifest = "{tmp_path}/images/manifest.csv"',
        measures="resilience = false",
        compute='device = "cpu"\nbatch_size = 4\nshard_size = 16\nthreads = 1',
    )
    return begin_run(load_config(config), tmp_path / "run")


@pytest.fixture
def shard(run: Run) -> Shard:
    return plan(run)[0]


@pytest.fixture
def stopped(run: Run, shard: Shard, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run, stopped in the third batch of its first shard, with a piece for each batch before."""
    monkeypatch.setattr(commit, "PIECE_SECONDS", 0.0)
    explain_batches = rows.explain_batches

    def two_batches(batches: Any, *arguments: Any, **named: Any) -> Iterator[Any]:
        def some() -> Iterator[Any]:
            for i, batch in enumerate(batches):
                if i == 2:
                    raise KeyboardInterrupt
                yield batch

        yield from explain_batches(some(), *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(rows, "explain_batches", two_batches)
        with pytest.raises(KeyboardInterrupt):
            commit.commit_shard(run.folder, shard)
    return run


def whole(run: Run, shard: Shard, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The bytes of a part file that is made in one piece."""
    with monkeypatch.context() as patch:
        patch.setattr(commit, "PIECE_SECONDS", math.inf)
        commit.commit_shard(run.folder, shard)
    data = shard.path(run.folder).read_bytes()
    shard.path(run.folder).unlink()
    return data


def test_a_stop_keeps_the_batches_that_were_explained(stopped, shard):
    assert num_in_pieces(stopped.folder, shard) == 8
    assert num_explained(stopped) == (8, 26 * 2)
    assert not shard.path(stopped.folder).exists()


def test_the_next_call_explains_only_the_others_and_gives_the_same_bytes(stopped, shard, monkeypatch, tmp_path):
    read: list[int] = []
    read_batches = rows._read

    def remember(run: Run, model: Any, detector: Any, images: Any, refused: Any) -> Any:
        read.extend(images)
        return read_batches(run, model, detector, images, refused)

    with monkeypatch.context() as patch:
        patch.setattr(rows, "_read", remember)
        commit.commit_shard(stopped.folder, shard)
    assert read == list(range(8, 16))
    assert not (stopped.folder / PIECES).exists()
    data = shard.path(stopped.folder).read_bytes()
    assert data == whole(stopped, shard, monkeypatch)


def test_pieces_left_beside_their_part_file_are_removed(stopped, shard, monkeypatch):
    whole_part = whole(stopped, shard, monkeypatch)
    (stopped.folder / PIECES / shard.title).mkdir(parents=True)
    shard.path(stopped.folder).write_bytes(whole_part)
    explain_run(stopped.config, stopped.folder)
    assert not (stopped.folder / PIECES).exists()
    assert num_explained(open_run(stopped.folder)) == (52, 52)


def test_a_piece_holds_no_image_that_could_not_be_read(run, shard, monkeypatch):
    monkeypatch.setattr(commit, "PIECE_SECONDS", 0.0)
    paths = run.image_table["path"].to_pylist()
    lost = Path(run.config.data.manifest).parent / paths[5]
    pieces: list[tuple[int, int]] = []
    monkeypatch.setattr(commit, "write_piece", lambda *arguments: pieces.append(arguments[-2:]))
    lost.unlink()
    commit.commit_shard(run.folder, shard)
    assert pieces == [(0, 4)]


def test_progress_after_a_stop_counts_what_is_kept(stopped):
    left: list[int] = []
    done: list[int] = []
    explain_run(
        stopped.config,
        stopped.folder,
        on_start=lambda _, total, missing: left.extend([total, sum(missing.values())]),
        on_done=lambda _, count, seconds: done.append(count),
    )
    assert left == [52, 44]
    assert sum(done) == 44


def test_pieces_that_another_process_cut_differently_are_left_out(stopped, shard, monkeypatch):
    place = stopped.folder / PIECES / shard.title
    first, second = sorted(place.iterdir())
    table = pq.read_table(second, partitioning=None)
    pq.write_table(table, place / first.name.replace("-000000004.", "-000000008."))
    pq.write_table(table, place / "x.parquet")
    commit.commit_shard(stopped.folder, shard)
    data = shard.path(stopped.folder).read_bytes()
    assert data == whole(stopped, shard, monkeypatch)
