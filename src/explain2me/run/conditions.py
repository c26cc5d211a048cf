"""The perturbations that the chosen measures need, and how each is applied to a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from explain2me.config.schema import MeasuresConfig
from explain2me.errors import ConfigError
from explain2me.measures.focus import blur_both
from explain2me.measures.noise import NOISES
from explain2me.measures.resilience import TRANSFORMS, shift_distance


@dataclass(frozen=True)
class Condition:
    """``clean``, or one perturbation at one level.

    Attributes:
        name: as in part files, e.g. ``salt_pepper@0.05``, ``shift_UR@16``, ``focus_salient``.
        measure: the measure that compares it with the clean map.
        kind: a key of NOISES or TRANSFORMS, or what the blur removes (``salient``, ``nonsalient``).
        level: of a noise; None otherwise.
        group: of a transform (``shifts``, ``flips``, ``rotations``); "" otherwise.
    """

    name: str
    measure: Literal["clean", "noise", "resilience", "focus"]
    kind: str = ""
    level: float | None = None
    group: str = ""


CLEAN = Condition("clean", "clean")


FOCUS = (Condition("focus_salient", "focus", "salient"), Condition("focus_nonsalient", "focus", "nonsalient"))


def conditions_for(measures: MeasuresConfig, input_size: tuple[int, int]) -> tuple[Condition, ...]:
    """Every condition of a run at one input size (height, width), the clean one first.

    Raises:
        ConfigError: rotations by 90 degrees of an input that is not square; the same noise and level twice.
    """
    height, width = input_size
    conditions = [CLEAN]
    for noise in measures.noise:
        conditions += [
            Condition(f"{noise.kind}@{level:.12g}", "noise", noise.kind, float(level)) for level in noise.levels
        ]
    names = [condition.name for condition in conditions]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"measures.noise: expected different conditions, got {twice[0]!r} twice; remove one")
    if measures.resilience:
        if height != width:
            raise ConfigError(
                f"measures.resilience turns images by 90 degrees and needs a square input, got {height}x{width}; "
                f"set input_size of the detector to one number, or measures.resilience=false"
            )
        conditions += [_transform_condition(name, input_size) for name in TRANSFORMS]
    if measures.focus:
        conditions += FOCUS
    return tuple(conditions)


def perturb(
    images: Tensor, conditions: Sequence[Condition], *, clean_maps: Tensor, seed: int, ids: Sequence[str]
) -> Iterator[tuple[Condition, Tensor]]:
    """Yield each condition but the clean one with the perturbed batch.

    Args:
        images: uint8 (N, 3, H, W), clean.
        conditions: as from :func:`conditions_for`.
        clean_maps: (N, h, w), drives the blur.
        seed: of the run.
        ids: one a batch image; with the seed and the condition they decide the noise.
    """
    wanted = {condition.kind: condition for condition in conditions if condition.measure == "focus"}
    for condition in conditions:
        if condition.measure == "noise":
            yield condition, NOISES[condition.kind](images, condition.level, seed=seed, ids=ids)
        elif condition.measure == "resilience":
            yield condition, TRANSFORMS[condition.kind].apply(images)
    if wanted:
        both = blur_both(images, clean_maps)
        for kind, blurred in zip(("salient", "nonsalient"), both, strict=True):
            yield wanted[kind], blurred


def _transform_condition(name: str, input_size: tuple[int, int]) -> Condition:
    group = TRANSFORMS[name].group
    if group != "shifts":
        return Condition(name, "resilience", name, group=group)
    return Condition(f"{name}@{shift_distance(input_size[0])}", "resilience", name, group=group)
