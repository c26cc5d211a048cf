"""Stage 2: maps to scores, one row for each image, measure, variant, similarity and condition. Loads no model.

The rows of ``statistics/scores.py`` decide the work: :func:`score_part` scores single maps and perturbed maps,
:func:`compare_maps` also those of two training runs.
"""

import dataclasses
import functools
import itertools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from explain2me.config.compare import digest
from explain2me.config.schema import Config, MeasuresConfig
from explain2me.errors import RunFolderError
from explain2me.measures import SIMILARITIES, is_dead
from explain2me.run.checks.tables import unreadable
from explain2me.run.conditions import CLEAN, Condition, conditions_of
from explain2me.run.events import log_event
from explain2me.run.files import only_writer, put_in_place, write_parquet
from explain2me.run.folder import EARLIER, Run, open_run, refuse_unknown_images
from explain2me.run.leftovers import remove_leftovers
from explain2me.run.packs import committed_in, link_files, read_parquet
from explain2me.run.parts import Part, read_part
from explain2me.run.plan import Shard, missing_of, plan
from explain2me.run.record import Model
from explain2me.run.schema import MAPS, RESULTS_VERSION, SCORES
from explain2me.statistics.chance import partners
from explain2me.statistics.scores import VARIANTS, Measure
from explain2me.workers import Engine, run_tasks
from explain2me.workers.device import engine_of

FILES_FOR_WORKERS = 16
"""Fewest missing score files for each worker that make starting workers worthwhile."""
UNFINISHED = ".scores-"
"""Start of the name of a folder of score files that is not complete."""
Labels = dict[str, str | None]
"""Columns that are the same for many rows: detector, run, other_run, measure, variant, similarity, condition."""


class Scores(NamedTuple):
    """Scores of one measure for the images of one part; a value is NaN where it is not valid.

    ``kept``, int8: 1 kept, 0 flipped, -1 where two predictions cannot be compared.
    """

    value: Float[np.ndarray, " N"]
    chance: Float[np.ndarray, " N"]
    dead: Bool[np.ndarray, " N"]
    kept: Int[np.ndarray, " N"]


Compare = Callable[[Tensor, Tensor], Tensor]
"""Compares two maps of each image: (maps (N, h, w), other maps (N, h, w)) -> (N,)."""


def measure_run(run: Run, config: Config, *, on_done: Callable[[int, int], None] | None = None) -> None:
    """Score every committed map of a run; ``scores/`` is replaced as a whole, and keeps files that stay the same.

    Args:
        run: with its maps.
        config: of the run; its measuring settings may differ.
        on_done: called after each score file with the number of files done and the number in all.

    Raises:
        RunFolderError: a part file of maps is missing or damaged.
        BusyError: another process writes into the run.
    """
    started = time.monotonic()
    shards = plan(run)
    missing = missing_of(shards, run.folder)
    if missing:
        first = missing[0].path(run.folder)
        raise RunFolderError(
            f"{len(missing)} of {len(shards)} part files of maps are missing, the first is {first}; call `explain2me explain` with the same config first"
        )
    with only_writer(run.folder):
        run.refuse_changed()
        num_made = _make_scores(run, config, on_done)
    log_event(run.folder, (0, 1), "measure", "done", files=num_made, seconds=round(time.monotonic() - started, 3))


def _make_scores(run: Run, config: Config, on_done: Callable[[int, int], None] | None) -> int:
    """Make the set of score files that a run should have, and put it in the place of ``scores/`` when it is complete.

    A call that is stopped leaves ``scores/`` as it was; the next one with the same settings continues.

    Returns:
        Number of files made; the others were there.
    """
    names, scores = score_names(run, config.measures), run.folder / "scores"
    if committed_in(scores) == set(names):
        return 0
    unfinished = run.folder / f"{UNFINISHED}{digest(names)}"
    for other in set(run.folder.glob(f"{UNFINISHED}*")) - {unfinished}:
        shutil.rmtree(other)
    unfinished.mkdir(exist_ok=True)
    remove_leftovers(unfinished)
    for place in (scores, run.folder / EARLIER / "scores"):
        link_files(place, unfinished, set(names))
    committed = committed_in(unfinished)
    todo = [name for name in names if name not in committed]
    work = functools.partial(_commit_scores, run.folder.resolve(), unfinished.name, config.measures)
    engine = dataclasses.replace(engine_of(config.compute), gpus=0.0)  # no model is loaded
    if len(todo) < FILES_FOR_WORKERS * engine.workers:  # this process ends before workers have started
        engine = Engine(threads=engine.threads)
    for i, _ in enumerate(run_tasks(work, todo, engine)):
        if on_done:
            on_done(i + 1, len(todo))
    remove_leftovers(unfinished)  # dead workers may have left files
    put_in_place(unfinished, scores)
    return len(todo)


def score_names(run: Run, measures: MeasuresConfig) -> list[str]:
    """Name of every score file that a run should have, in order."""
    return list(_jobs(run, measures))


def _commit_scores(folder: Path, unfinished: str, measures: MeasuresConfig, name: str) -> None:
    jobs, reader = _open_jobs(folder, unfinished, measures)
    write_parquet(jobs[name](reader), folder / unfinished / name)


@functools.lru_cache(maxsize=1)
def _open_jobs(folder: Path, _: str, measures: MeasuresConfig) -> "tuple[dict[str, Job], MapReader]":
    """The jobs and the reader of one run, cached for the next file of this process."""
    run = open_run(folder)
    return _jobs(run, measures), MapReader(run)


class MapReader:
    """Reads part files, and the maps of single images from any part; caches the latest few parts."""

    def __init__(self, run: Run) -> None:
        shards = plan(run)
        self._folder = run.folder
        self._size = run.config.compute.shard_size
        self._shards = {(shard.model.name, shard.part): shard for shard in shards}
        most_runs = max(len(run.models_of(detector.name)) for detector in run.config.detectors)
        self._read = functools.lru_cache(maxsize=4 + 2 * most_runs)(read_part)
        self._num_images = len(run.image_table)
        self._forms: dict[str, tuple[object, ...]] = {}
        self.partners = functools.lru_cache(maxsize=1 + most_runs)(functools.partial(_partners, run, shards))

    def part(self, model: Model, part: int) -> Part:
        """One part of one model; RunFolderError if its maps differ in size or conditions from others of its detector."""
        path = self._shards[model.name, part].path(self._folder)
        read = self._read(path, self._num_images)
        if len(read.images) and read.form != self._forms.setdefault(model.detector, read.form):
            raise unreadable(path, f"its maps differ in size or conditions from others of {model.detector!r}")
        return read

    def take(self, model: Model, images: np.ndarray) -> Part:
        """The maps of some images, in their order; NaN maps where an image is -1 or was quarantined."""
        nearby = self.part(model, max(int(images.max(initial=0)), 0) // self._size)
        shape = (len(nearby.conditions), len(images), *nearby.maps.shape[2:])
        result = Part(
            images,
            nearby.conditions,
            np.full(shape, np.nan, np.float32),
            np.full(shape, np.nan, np.float32),
            np.full(shape[:2], -1),
        )
        for number in sorted(set((images[images >= 0] // self._size).tolist())):
            part = self.part(model, number)
            here = np.flatnonzero(np.isin(images, part.images))
            position = np.searchsorted(part.images, images[here])
            for target, source in zip(result[2:], part[2:], strict=True):
                target[:, here] = source[:, position]
        return result


def _partners(run: Run, shards: Sequence[Shard], model: Model) -> np.ndarray:
    """The partner of each image for the chance level of one model; reads only the predictions of the clean images."""
    predicted = np.full(len(run.image_table), -1)
    for shard in shards:
        if shard.model == model:
            path = shard.path(run.folder)
            table = read_parquet(path, ["image", "condition", "predicted"], schema=MAPS)
            refuse_unknown_images(path, table, len(predicted))
            table = table.filter(pc.equal(table["condition"].cast(pa.string()), CLEAN.name))
            predicted[table["image"].to_numpy()] = table["predicted"].fill_null(-1).to_numpy()
    return partners(run.image_table, predicted, seed=run.config.seed)


def score_part(
    part: Part, partner: Part | None, measures: MeasuresConfig, input_size: tuple[int, int]
) -> Iterator[tuple[Labels, Scores]]:
    """Score one part of one model: its clean maps, and each perturbed map against the clean map of the same image.

    Args:
        part: all conditions of some images.
        partner: all conditions of another image for each of them, for the chance level; None leaves it out.
        measures: to take, with their similarities.
        input_size: (height, width) of the model in pixels.

    Yields:
        Measure, variant, similarity and condition, and the scores.
    """
    for measure in measures.chosen:
        if measure.of == "map":
            yield from _score_clean(measure, part)
        elif measure.of == "perturbation":
            for condition in conditions_of(measure, measures, input_size):
                kinds = itertools.product(measures.similarity, measure.variants)
                yield from compare_maps(
                    measure, part, part, partner, kinds=kinds, input_size=input_size, condition=condition
                )


def variants_of_pairs(measure: Measure, run: Run) -> Sequence[str]:
    """The variants of a measure of pairs; without labels there are no maps for the true class."""
    labelled = run.image_table["label"].null_count < len(run.image_table)
    return measure.variants if labelled else measure.variants[:1]


def compare_maps(
    measure: Measure,
    a: Part,
    b: Part,
    b_partner: Part | None,
    *,
    kinds: Iterable[tuple[str, str]],
    input_size: tuple[int, int],
    condition: Condition = CLEAN,
) -> Iterator[tuple[Labels, Scores]]:
    """Compare the clean maps of ``a`` with the maps of ``b`` under a condition.

    Args:
        measure: compares two maps.
        a: all conditions of some images, of one run.
        b: the same of another run for a measure of pairs (section 3.5), else the same run again.
        b_partner: as ``b``, of another image for each, for the chance level; None leaves it out.
        kinds: similarity and variant of each score to take.
        input_size: (height, width) of the model in pixels.
        condition: of the maps of ``b``.

    Yields:
        Measure, variant, similarity and condition, and the scores.
    """
    kept = _kept(a.predicted[a.of(CLEAN.name)], b.predicted[b.of(condition.name)])
    for similarity, variant in kinds:
        compare = _comparison(measure, condition, similarity, input_size)
        maps = _maps(a, variant if measure.of_pairs else VARIANTS[0], CLEAN)
        other_maps = _maps(b, variant, condition)
        value = compare(maps.double(), other_maps.double()).numpy()
        chance = np.full(len(value), np.nan)
        if b_partner is not None:
            chance = compare(maps.double(), _maps(b_partner, variant, condition).double()).numpy()
        dead = (is_dead(maps) | is_dead(other_maps)).numpy()
        yield _labels(measure, variant, similarity, condition), Scores(value, chance, dead, kept)


def _score_clean(measure: Measure, part: Part) -> Iterator[tuple[Labels, Scores]]:
    """Score the clean maps by each estimator of a measure of single maps."""
    function = measure.load()
    assert function is not None
    clean = _maps(part, VARIANTS[0], CLEAN)
    no_chance, no_decision = np.full(len(clean), np.nan), np.full(len(clean), -1, np.int8)
    for estimator in measure.variants:
        value = function(clean.double(), estimator).numpy()
        yield _labels(measure, estimator, None, CLEAN), Scores(value, no_chance, is_dead(clean).numpy(), no_decision)


def _labels(measure: Measure, variant: str, similarity: str | None, condition: Condition) -> Labels:
    return {"measure": measure.name, "variant": variant, "similarity": similarity, "condition": condition.name}


def _maps(part: Part, variant: str, condition: Condition) -> Tensor:
    """Maps (N, h, w) under one condition, for the predicted or for the fixed class."""
    return torch.from_numpy((part.maps if variant == VARIANTS[0] else part.fixed)[part.of(condition.name)])


def _kept(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether two predictions of each image agree: 1, 0, or -1 where one is missing."""
    return np.where((a < 0) | (b < 0), -1, a == b).astype(np.int8)


def _comparison(measure: Measure, condition: Condition, similarity: str, input_size: tuple[int, int]) -> Compare:
    """The function of a measure with all arguments but the maps, or the plain similarity."""
    function = measure.load()
    if function is not None:
        return lambda maps, other_maps: function(maps, other_maps, condition.kind, input_size, similarity=similarity)
    options = {"input_size": input_size} if similarity == "ssim_windowed" else {}
    return functools.partial(SIMILARITIES[similarity], **options)


Job = Callable[[MapReader], pa.Table]
"""Makes the table of one score file."""


def _jobs(run: Run, measures: MeasuresConfig) -> dict[str, Job]:
    """The function that makes the table of each score file that the run should have, by the name of the file."""
    shards = plan(run)
    content_keys = _content_keys(run, shards)
    settings = [RESULTS_VERSION, measures.model_dump(mode="json"), run.config.seed]
    jobs: dict[str, Job] = {}
    for shard in shards:
        key = digest([settings, content_keys[shard.model, shard.part]])
        jobs[f"{shard.model.name}-part-{shard.part:05d}-{key}.parquet"] = functools.partial(
            _score_shard, measures, shard
        )
    pair_measures = [measure for measure in measures.chosen if measure.of_pairs]
    for measure, detector in itertools.product(pair_measures, run.config.detectors):
        models = run.models_of(detector.name)
        kinds = list(itertools.product(measures.similarity, variants_of_pairs(measure, run)))
        for part in [shard.part for shard in shards if shard.model == models[0]]:
            key = digest([settings, [content_keys[model, part] for model in models]])
            score = functools.partial(_score_pairs, measure, kinds, models, part)
            jobs[f"{detector.name}__{measure.name}-part-{part:05d}-{key}.parquet"] = score
    return jobs


def _content_keys(run: Run, shards: Sequence[Shard]) -> dict[tuple[Model, int], str]:
    """What decides the rows of each part, by model and part: its key, and the images of the model that could not be read.

    Those of other parts count as well: they are nobody's partner for the chance level.
    """
    refused = run.unexplained()
    return {
        (shard.model, shard.part): digest([shard.key, sorted(refused[shard.model.name])])
        if shard.model.name in refused
        else shard.key
        for shard in shards
    }


def _score_shard(measures: MeasuresConfig, shard: Shard, reader: MapReader) -> pa.Table:
    part = reader.part(shard.model, shard.part)
    partner = reader.take(shard.model, reader.partners(shard.model)[part.images])
    names: Labels = {"detector": shard.model.detector, "run": shard.model.run, "other_run": None}
    scored = score_part(part, partner, measures, shard.model.input_size)
    return _rows([(part.images, names | labels, scores) for labels, scores in scored])


def _score_pairs(
    measure: Measure, kinds: Sequence[tuple[str, str]], models: Sequence[Model], number: int, reader: MapReader
) -> pa.Table:
    rows = []
    for a, b in itertools.combinations(models, 2):
        part = reader.part(a, number)
        other = reader.take(b, part.images)
        partner = reader.take(b, reader.partners(b)[part.images])
        names: Labels = {"detector": a.detector, "run": a.run, "other_run": b.run}
        scored = compare_maps(measure, part, other, partner, kinds=kinds, input_size=a.input_size)
        rows += [(part.images, names | labels, scores) for labels, scores in scored]
    return _rows(rows)


def _rows(parts: Sequence[tuple[np.ndarray, Labels, Scores]]) -> pa.Table:
    """One table of all rows. Words are dictionary-encoded by hand, because thousands of rows share a word."""
    if not parts:
        return SCORES.empty_table()
    group = np.repeat(np.arange(len(parts)), [len(images) for images, _, _ in parts])
    columns: dict[str, Any] = {}
    for name in ("detector", "run", "other_run", "measure", "variant", "similarity", "condition"):
        words = pa.array([labels[name] for _, labels, _ in parts], pa.string())
        known = words.unique().drop_null().sort()
        columns[name] = pa.DictionaryArray.from_arrays(pc.index_in(words, known).take(pa.array(group)), known)
    columns["image"] = np.concatenate([images for images, _, _ in parts]).astype(np.int32)
    scores = Scores(*map(np.concatenate, zip(*(scores for _, _, scores in parts), strict=True)))
    columns |= scores._asdict() | {"valid": ~np.isnan(scores.value)}
    columns["kept"] = pa.array(scores.kept == 1, mask=scores.kept < 0)
    return pa.table(columns).select(SCORES.names).cast(SCORES)
