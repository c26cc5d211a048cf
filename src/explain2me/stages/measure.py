"""Stage 2: maps to scores, one row an image, measure, variant, similarity and condition. No model is touched."""

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from explain2me.config.compare import digest
from explain2me.config.load import parse_config
from explain2me.config.schema import Config
from explain2me.errors import RunFolderError
from explain2me.measures import SIMILARITIES, entropy, is_dead, resilience, ssim_windowed
from explain2me.run.conditions import Condition, conditions_for
from explain2me.run.events import log_event
from explain2me.run.files import write_parquet
from explain2me.run.folder import Run, open_run
from explain2me.run.packs import committed_in, packed_in, read_parquet, table_files
from explain2me.run.parts import Part, read_part
from explain2me.run.plan import Shard, missing_of, plan
from explain2me.run.record import Model
from explain2me.run.schema import RESULTS_VERSION, SCORES
from explain2me.statistics.chance import partners
from explain2me.workers import Engine, run_tasks
from explain2me.workers.device import engine_of

VARIANTS = ("predicted", "fixed")


FILES_FOR_WORKERS = 16
"""Score files for each worker from which on workers are worth their start."""
What = dict[str, str | None]
"""What rows are about: detector, run, other_run, measure, variant, similarity, condition."""


class Scores(NamedTuple):
    """One measure of one part: ``value``, ``chance`` float64 (N,), ``valid``, ``dead`` bool (N,), ``kept`` int8 (N,):
    1 kept, 0 flipped, -1 where there are no two predictions to compare."""

    value: np.ndarray
    chance: np.ndarray
    valid: np.ndarray
    dead: np.ndarray
    kept: np.ndarray


Compare = Callable[[Tensor, Tensor], Tensor]
"""(maps (N, h, w), maps (N, h, w)) -> (N,)"""


def measure_run(run: Run, config: Config, *, on_done: Callable[[int, int], None] | None = None) -> None:
    """Score every committed map of a run; score files that are there already are kept, those of other settings go.

    Args:
        run: with its maps.
        config: of the run, possibly with other measuring settings.
        on_done: called with the number of score files made and to make.

    Raises:
        RunFolderError: a part file of maps is missing or damaged.
    """
    started = time.monotonic()
    shards = plan(run)
    missing = missing_of(shards, run.folder)
    if missing:
        first = missing[0].path(run.folder)
        raise RunFolderError(
            f"{len(missing)} of {len(shards)} part files of maps are missing, the first is {first}; call `explain2me explain` with the same config first"
        )
    names = score_names(run, config)
    folder = run.folder / "scores"
    _remove_others(folder, set(names))
    there = committed_in(folder)
    todo = [name for name in names if name not in there]
    work = functools.partial(_commit_scores, run.folder.resolve(), config)
    engine = engine_of(config)
    if len(todo) < FILES_FOR_WORKERS * engine.workers:  # done before they were started
        engine = Engine(threads=engine.threads)
    for i, _ in enumerate(run_tasks(work, todo, engine)):
        if on_done:
            on_done(i + 1, len(todo))
    log_event(run.folder, (0, 1), "measure", "done", files=len(todo), seconds=round(time.monotonic() - started, 3))


def score_names(run: Run, config: Config) -> list[str]:
    """Of every score file that a run should have, in order."""
    return [name for name, _ in _jobs(run, config, plan(run))]


def _remove_others(folder: Path, wanted: set[str]) -> None:
    """Scores of other settings; a pack with any of them goes whole, since scores are cheap to make."""
    for member in {member.pack for name, member in packed_in(folder).items() if name not in wanted}:
        member.unlink(missing_ok=True)
    for path in table_files(folder):
        if path.name not in wanted:
            path.unlink(missing_ok=True)


def _commit_scores(folder: Path, config: Config, name: str) -> None:
    jobs, reader = _open_jobs(folder.resolve(), (folder / "run.json").stat().st_mtime_ns, config.model_dump_json())
    write_parquet(jobs[name](reader), folder / "scores" / name)


@functools.lru_cache(maxsize=1)
def _open_jobs(folder: Path, _: int, config: str) -> "tuple[dict[str, Job], MapReader]":
    """Kept between the files that one process makes."""
    run = open_run(folder)
    shards = plan(run)
    return dict(_jobs(run, parse_config(json.loads(config)), shards)), MapReader(run, shards)


class MapReader:
    """Reads part files, and the maps of single images from whichever part holds them; keeps the latest few parts."""

    def __init__(self, run: Run, shards: Sequence[Shard]) -> None:
        self._folder = run.folder
        self._size = run.config.compute.shard_size
        self._shards = {(shard.model.name, shard.part): shard for shard in shards}
        most_runs = max(len(run.models_of(detector.name)) for detector in run.config.detectors)
        self._read = functools.lru_cache(maxsize=4 + 2 * most_runs)(read_part)
        self.partners = functools.lru_cache(maxsize=1 + most_runs)(functools.partial(_partners, run, shards))

    def part(self, model: Model, part: int) -> Part:
        """One part of one model."""
        return self._read(self._shards[model.name, part].path(self._folder))

    def take(self, model: Model, images: np.ndarray) -> Part:
        """The maps of some images, in their order; NaN maps where an image is -1 or was quarantined."""
        found = self.part(model, max(int(images.max(initial=0)), 0) // self._size)
        shape = (len(found.conditions), len(images), *found.maps.shape[2:])
        result = Part(
            images,
            found.conditions,
            np.full(shape, np.nan, np.float32),
            np.full(shape, np.nan, np.float32),
            np.full(shape[:2], -1),
        )
        for number in sorted(set((images[images >= 0] // self._size).tolist())):
            part = self.part(model, number)
            where = np.searchsorted(part.images, images)
            where[where == len(part.images)] = 0
            here = (part.images[where] == images) if len(part.images) else np.zeros(len(images), bool)
            for ours, theirs in zip(result[2:], part[2:], strict=True):
                ours[:, here] = theirs[:, where[here]]
        return result


def _partners(run: Run, shards: Sequence[Shard], model: Model) -> np.ndarray:
    """Of each image under one model, for the chance level; reads the predictions of the clean images alone."""
    predicted = np.full(len(run.image_table), -1)
    for shard in shards:
        if shard.model == model:
            table = read_parquet(shard.path(run.folder), ["image", "condition", "predicted"])
            table = table.filter(pc.equal(table["condition"].cast(pa.string()), "clean"))
            predicted[table["image"].to_numpy()] = table["predicted"].fill_null(-1).to_numpy()
    return partners(run.image_table, predicted, seed=run.config.seed)


def score_part(
    part: Part, partner: Part | None, conditions: Sequence[Condition], config: Config, input_size: tuple[int, int]
) -> Iterator[tuple[What, Scores]]:
    """Score one part of one model: entropy of the clean maps, and each perturbed map against the clean one.

    Args:
        part: all conditions of some images.
        partner: the same of another image for each, for the chance level; None leaves it out.
        conditions: of the run.
        config: says which measures and similarities.
        input_size: (height, width) of the model in pixels.

    Yields:
        What the rows are (measure, variant, similarity, condition), and their values.
    """
    clean = torch.from_numpy(part.maps[part.of("clean")])
    if config.measures.entropy:
        unknown = np.full(len(clean), -1, np.int8)
        for estimator in ("spatial", "intensity"):
            value = entropy(clean.double(), estimator=estimator).numpy()
            what: What = {"measure": "entropy", "variant": estimator, "similarity": None, "condition": "clean"}
            yield what, Scores(value, np.full(len(value), np.nan), ~np.isnan(value), is_dead(clean).numpy(), unknown)
    for condition, name, variant in itertools.product(conditions[1:], config.measures.similarity, VARIANTS):
        compare = _comparison(condition, name, input_size)
        index = part.of(condition.name)
        perturbed = torch.from_numpy((part.maps if variant == "predicted" else part.fixed)[index])
        other = None
        if partner is not None:
            other = torch.from_numpy((partner.maps if variant == "predicted" else partner.fixed)[index])
        kept = _kept(part.predicted[index], part.predicted[part.of("clean")])
        what = {"measure": condition.measure, "variant": variant, "similarity": name, "condition": condition.name}
        yield what, _compare(compare, clean, perturbed, other, kept)


def score_pair(
    a: Part, b: Part, b_partner: Part, config: Config, input_size: tuple[int, int], *, labelled: bool
) -> Iterator[tuple[What, Scores]]:
    """Score the agreement of two runs of a detector on their clean maps (section 3.5)."""
    kept = _kept(a.predicted[a.of("clean")], b.predicted[b.of("clean")])
    for name, variant in itertools.product(config.measures.similarity, VARIANTS if labelled else VARIANTS[:1]):
        ours, theirs, others = (
            torch.from_numpy((part.maps if variant == "predicted" else part.fixed)[part.of("clean")])
            for part in (a, b, b_partner)
        )
        what: What = {"measure": "stability", "variant": variant, "similarity": name, "condition": "clean"}
        yield what, _compare(_similarity(name, input_size), ours, theirs, others, kept)


def _kept(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where((a < 0) | (b < 0), -1, a == b).astype(np.int8)


def _compare(compare: Compare, clean: Tensor, perturbed: Tensor, other: Tensor | None, kept: np.ndarray) -> Scores:
    value = compare(clean.double(), perturbed.double()).numpy()
    chance = np.full(len(value), np.nan) if other is None else compare(clean.double(), other.double()).numpy()
    return Scores(value, chance, ~np.isnan(value), (is_dead(clean) | is_dead(perturbed)).numpy(), kept)


def _comparison(condition: Condition, name: str, input_size: tuple[int, int]) -> Compare:
    if condition.measure != "resilience":
        return _similarity(name, input_size)
    return lambda clean, perturbed: resilience(clean, perturbed, condition.kind, input_size, similarity=name)


def _similarity(name: str, input_size: tuple[int, int]) -> Compare:
    if name == "ssim_windowed":
        return functools.partial(ssim_windowed, input_size=input_size)
    return SIMILARITIES[name]


Job = Callable[[MapReader], pa.Table]


def _jobs(run: Run, config: Config, shards: Sequence[Shard]) -> Iterator[tuple[str, Job]]:
    """Name of each score file that the run should have, and how it is made."""
    keys = {(shard.model.name, shard.part): shard.key for shard in shards}
    settings = [RESULTS_VERSION, config.measures.model_dump(mode="json"), run.config.seed]
    for shard in shards:
        key = digest([settings, shard.key])
        yield (
            f"{shard.model.name}-part-{shard.part:05d}-{key}.parquet",
            functools.partial(_score_shard, run, config, shard),
        )
    if not config.measures.stability:
        return
    for detector in run.config.detectors:
        models = run.models_of(detector.name)
        for part in sorted({part for name, part in keys if name == models[0].name}):
            key = digest([settings, [keys[model.name, part] for model in models]])
            name = f"{detector.name}__stability-part-{part:05d}-{key}.parquet"
            yield name, functools.partial(_score_stability, run, config, models, part)


def _score_shard(run: Run, config: Config, shard: Shard, reader: MapReader) -> pa.Table:
    part = reader.part(shard.model, shard.part)
    partner = reader.take(shard.model, reader.partners(shard.model)[part.images])
    conditions = conditions_for(run.config.measures, shard.model.input_size)
    names: What = {"detector": shard.model.detector, "run": shard.model.run, "other_run": None}
    return _rows(
        (part.images, names | what, scores)
        for what, scores in score_part(part, partner, conditions, config, shard.model.input_size)
    )


def _score_stability(run: Run, config: Config, models: Sequence[Model], number: int, reader: MapReader) -> pa.Table:
    labelled = run.image_table["label"].null_count < len(run.image_table)
    tables = []
    for a, b in itertools.combinations(models, 2):
        ours = reader.part(a, number)
        theirs = reader.take(b, ours.images)
        partner = reader.take(b, reader.partners(b)[ours.images])
        names: What = {"detector": a.detector, "run": a.run, "other_run": b.run}
        tables += [
            (ours.images, names | what, scores)
            for what, scores in score_pair(ours, theirs, partner, config, a.input_size, labelled=labelled)
        ]
    return _rows(iter(tables))


def _rows(groups: Iterator[tuple[np.ndarray, What, Scores]]) -> pa.Table:
    """One table of all rows; words are dictionary-encoded by hand, since there are thousands of rows a word."""
    parts = list(groups)
    if not parts:
        return SCORES.empty_table()
    counts = [len(images) for images, _, _ in parts]
    columns: dict[str, Any] = {}
    for name in ("detector", "run", "other_run", "measure", "variant", "similarity", "condition"):
        words = [what[name] for _, what, _ in parts]
        known = sorted({word for word in words if word is not None})
        codes = np.repeat([known.index(word) if word is not None else 0 for word in words], counts)
        null = np.repeat([word is None for word in words], counts)
        columns[name] = pa.DictionaryArray.from_arrays(
            pa.array(codes.astype(np.int32), mask=null), pa.array(known, pa.string())
        )
    columns["image"] = np.concatenate([images for images, _, _ in parts]).astype(np.int32)
    for name in ("value", "chance", "valid", "dead"):
        columns[name] = np.concatenate([getattr(scores, name) for _, _, scores in parts])
    kept = np.concatenate([scores.kept for _, _, scores in parts])
    columns["kept"] = pa.array(kept == 1, mask=kept < 0)
    return pa.table(columns).select(SCORES.names).cast(SCORES)
