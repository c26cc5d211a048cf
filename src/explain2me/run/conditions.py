"""The conditions of a run: clean, and each perturbation at each level. Also perturbs batches of images."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Float, UInt8
from torch import Tensor

from explain2me.config.fields import repeated
from explain2me.config.schema import MeasuresConfig
from explain2me.errors import ConfigError
from explain2me.measures.focus import Blurred, blur_both
from explain2me.measures.noise import NOISES
from explain2me.measures.resilience import TRANSFORMS, shift_distance
from explain2me.statistics.scores import CLEAN as CLEAN_NAME
from explain2me.statistics.scores import Measure


@dataclass(frozen=True)
class Condition:
    """``clean``, or one perturbation at one level.

    Attributes:
        name: as in part files, e.g. ``salt_pepper@0.05``, ``shift_UR@16``.
        measure: the measure that compares its maps with the clean maps; the first one where several do.
        perturbation: a key of PERTURBATIONS; "" when clean.
        kind: of a corruption, a key of NOISES; of a transform, a key of TRANSFORMS; of a blur, the part of the image that
            is blurred (``salient``, ``nonsalient``).
        level: of a corruption; None otherwise.
        group: of a transform (``shifts``, ``flips``, ``rotations``); "" otherwise.
    """

    name: str
    measure: str
    perturbation: str = ""
    kind: str = ""
    level: float | None = None
    group: str = ""


CLEAN = Condition(CLEAN_NAME, CLEAN_NAME)


class CleanBatch(NamedTuple):
    """The arguments of :func:`perturb`."""

    images: UInt8[Tensor, "N 3 H W"]
    maps: Float[Tensor, "N h w"]
    seed: int
    ids: Sequence[str]


class Perturbation(NamedTuple):
    """One family of perturbations.

    Attributes:
        conditions: lists the conditions of a measure: (measure, its field of the config, (height, width)).
        apply: yields each of some conditions of the family with the perturbed batch.
        needs_live_map: whether an image is left out where its clean map is dead or flat.
    """

    conditions: Callable[[Measure, Any, tuple[int, int]], list[Condition]]
    apply: Callable[[CleanBatch, Sequence[Condition]], Iterator[tuple[Condition, Tensor]]]
    needs_live_map: bool = False


def conditions_for(measures: MeasuresConfig, input_size: tuple[int, int]) -> tuple[Condition, ...]:
    """Every condition of a run at one input size (height, width), each once, the clean one first.

    Raises:
        ConfigError: rotations by 90 degrees of an input that is not square; the same corruption and level twice.
    """
    conditions = {CLEAN.name: CLEAN}
    for measure in measures.chosen:
        for condition in conditions_of(measure, measures, input_size):
            conditions.setdefault(condition.name, condition)
    return tuple(conditions.values())


def conditions_of(measure: Measure, measures: MeasuresConfig, input_size: tuple[int, int]) -> tuple[Condition, ...]:
    """The conditions whose maps one measure scores; errors as in :func:`conditions_for`."""
    if not measure.perturbation:
        return (CLEAN,)
    settings = measures.settings_of(measure)
    if not settings:
        return ()
    return tuple(PERTURBATIONS[measure.perturbation].conditions(measure, settings, input_size))


def perturb(
    images: Tensor, conditions: Sequence[Condition], *, clean_maps: Tensor, seed: int, ids: Sequence[str]
) -> Iterator[tuple[Condition, Tensor]]:
    """Yield each condition but the clean one with the perturbed batch.

    Args:
        images: uint8 (N, 3, H, W), clean.
        conditions: of :func:`conditions_for`.
        clean_maps: (N, h, w), drives the blur.
        seed: of the run.
        ids: one for each image; the seed, the id and the condition decide the corruption.
    """
    batch = CleanBatch(images, clean_maps, seed, ids)
    for family, members in itertools.groupby(conditions, key=lambda condition: condition.perturbation):
        if family:
            yield from PERTURBATIONS[family].apply(batch, list(members))


def _corruptions(measure: Measure, settings: Any, input_size: tuple[int, int]) -> list[Condition]:
    conditions = [
        Condition(f"{kind}@{level:.12g}", measure.name, measure.perturbation, kind, level=float(level))
        for kind, level in ((noise.kind, level) for noise in settings for level in noise.levels)
    ]
    if twice := repeated([condition.name for condition in conditions]):
        raise ConfigError(f"measures.{measure.name}: expected different conditions, got {twice[0]!r} twice; remove one")
    return conditions


def _corrupt(batch: CleanBatch, conditions: Sequence[Condition]) -> Iterator[tuple[Condition, Tensor]]:
    for condition in conditions:
        yield condition, NOISES[condition.kind](batch.images, condition.level, seed=batch.seed, ids=batch.ids)


def _transforms(measure: Measure, settings: Any, input_size: tuple[int, int]) -> list[Condition]:
    height, width = input_size
    if height != width:
        raise ConfigError(
            f"measures.{measure.name} turns images by 90 degrees and needs a square input, got {height}x{width}; "
            f"set input_size of the detector to one number, or measures.{measure.name}=false"
        )
    distance = {"shifts": f"@{shift_distance(height)}"}
    return [
        Condition(name + distance.get(group, ""), measure.name, measure.perturbation, name, group=group)
        for name, group in ((name, transform.group) for name, transform in TRANSFORMS.items())
    ]


def _transform(batch: CleanBatch, conditions: Sequence[Condition]) -> Iterator[tuple[Condition, Tensor]]:
    for condition in conditions:
        yield condition, TRANSFORMS[condition.kind].apply(batch.images)


def _blurs(measure: Measure, settings: Any, input_size: tuple[int, int]) -> list[Condition]:
    return [Condition(f"{measure.name}_{part}", measure.name, measure.perturbation, part) for part in Blurred._fields]


def _blur(batch: CleanBatch, conditions: Sequence[Condition]) -> Iterator[tuple[Condition, Tensor]]:
    both = blur_both(batch.images, batch.maps)
    for condition in conditions:
        yield condition, getattr(both, condition.kind)


PERTURBATIONS = {
    "corruption": Perturbation(_corruptions, _corrupt),
    "transform": Perturbation(_transforms, _transform),
    "blur": Perturbation(_blurs, _blur, needs_live_map=True),
}
"""Every family of perturbations by its name. Rows of ``statistics/scores.py`` name a family, no family names a measure."""
