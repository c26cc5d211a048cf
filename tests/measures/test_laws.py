"""Laws that hold for every measure, over one table; and every public name has its place in it."""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import explain2me.measures as measures
from explain2me.measures import NOISES, SIMILARITIES, TRANSFORMS, blur_both, entropy, resilience, stability
from explain2me.measures.focus import axis_operators
from explain2me.measures.noise import blur_operator
from explain2me.measures.resilience import sampling_axis
from explain2me.measures.scaling import resize_operator

GOOD, ZERO, FLAT, NAN, INF = range(5)
INPUT_SIZE = 56


@dataclass(frozen=True)
class Measure:
    """A score of each pair of maps; ``moved`` makes from a map the one that scores best with it."""

    function: str
    call: Callable
    lowest: float = -1.0
    moved: Callable | None = None
    flat_is_nan: bool = True
    one_map: bool = False


def pair_measures():
    for name, function in SIMILARITIES.items():
        call = functools.partial(function, input_size=INPUT_SIZE) if name == "ssim_windowed" else function
        lowest = 0.0 if name == "top_k_iou" else -1.0
        yield name, Measure(name, call, lowest, moved=lambda maps: maps)
    for name, transform in TRANSFORMS.items():

        def moved(maps, transform=transform):
            return transform.apply(maps[:, None])[:, 0]

        yield (
            f"resilience[{name}]",
            Measure(
                "resilience",
                lambda a, b, name=name: resilience(a, b, name, INPUT_SIZE),
                moved=None if transform.group == "shifts" else moved,
            ),
        )
    yield "stability", Measure("stability", lambda a, b: stability(torch.stack([a, b])), moved=lambda maps: maps)
    for name in ("spatial", "intensity"):
        call = functools.partial(lambda a, b, name: entropy(a, name), name=name)
        yield f"entropy[{name}]", Measure("entropy", call, 0.0, flat_is_nan=False, one_map=True)


MEASURES = dict(pair_measures())
OTHERS = {
    "perturbations": {
        "salt_and_pepper",
        "gaussian_noise",
        "uniform_blend",
        "turbulence",
        "blur_by_salience",
        "blur_both",
    },
    "about maps": {"is_dead", "is_flat"},
    "tables": {"NOISES", "SIMILARITIES", "TRANSFORMS", "Transform"},
    "about runs and sizes": {"pairs", "stability_matrix", "shift_distance"},
}

KEPT = (resize_operator, sampling_axis, axis_operators, blur_operator)

every_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)


def random_maps(n, h=7, w=7, *, seed=0, dtype=torch.float64):
    return torch.rand(n, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def special_map(kind):
    map_ = random_maps(1, seed=9)
    if kind == ZERO:
        return map_ * 0
    if kind == FLAT:
        return map_ * 0 + 2
    if kind in (NAN, INF):
        map_[0, 2, 3] = torch.nan if kind == NAN else torch.inf
    return map_


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True)


def test_every_public_name_is_classified():
    classified = {measure.function for measure in MEASURES.values()}.union(*OTHERS.values())
    assert classified == set(measures.__all__)
    assert sum(map(len, OTHERS.values())) + len({m.function for m in MEASURES.values()}) == len(classified)


def test_public_names_are_sorted_and_documented():
    assert measures.__all__ == sorted(measures.__all__)
    for name in measures.__all__:
        if callable(value := getattr(measures, name)):
            assert ">>>" in inspect.getdoc(value), f"{name} has no example"
    assert set(SIMILARITIES) == {f.__name__ for f in SIMILARITIES.values()}


@every_measure
def test_batches_may_be_split(measure):
    a, b = random_maps(7, seed=1), random_maps(7, seed=2)
    a[3], b[5] = 0, torch.nan
    whole = measure.call(a, b)
    for size in (1, 3):
        close(torch.cat([measure.call(*part) for part in zip(a.split(size), b.split(size), strict=True)]), whole)


@every_measure
def test_order_does_not_matter(measure):
    a, b = random_maps(20, seed=1), random_maps(20, seed=2)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    close(measure.call(a[order], b[order]), measure.call(a, b)[order])


@every_measure
def test_neighbours_do_not_matter(measure):
    a, b = random_maps(3, seed=1), random_maps(3, seed=2)
    before = measure.call(a, b)
    a[1], b[1] = 1e12 * a[1], torch.nan
    a[2], b[2] = 0, 1e-9 * b[2]
    close(measure.call(a, b)[:1], before[:1])


@pytest.mark.parametrize("name", [name for name, measure in MEASURES.items() if measure.moved is not None])
def test_identity_is_best(name):
    """Without the shifts, which are a part of a cell here, and measures of one map."""
    a, measure = random_maps(10, seed=1), MEASURES[name]
    close(measure.call(a, measure.moved(a)), torch.ones(10, dtype=torch.float64))
    assert (measure.call(a, random_maps(10, seed=2)) < 1).all()


@every_measure
@pytest.mark.parametrize("make", [lambda maps: maps, lambda maps: maps**20, lambda maps: (maps > 0.9).double() * maps])
def test_range(measure, make):
    a, b = make(random_maps(200, seed=1)), make(random_maps(200, seed=2))
    value = measure.call(a, b)
    value = value[~value.isnan()]
    assert len(value) > 150
    assert value.min() >= measure.lowest
    assert value.max() <= 1


@every_measure
@pytest.mark.parametrize("second", range(5))
@pytest.mark.parametrize("first", range(5))
def test_nan_exactly_where_it_is_undefined(measure, first, second):
    value = measure.call(special_map(first), special_map(second)).item()
    undefined = {ZERO, NAN, INF, FLAT} if measure.flat_is_nan else {ZERO, NAN, INF}
    assert math.isnan(value) == (first in undefined or (not measure.one_map and second in undefined))


@every_measure
def test_scale_does_not_matter(measure):
    a, b = random_maps(5, seed=1), random_maps(5, seed=2)
    close(measure.call(1024 * a, b / 8), measure.call(a, b))


@every_measure
@pytest.mark.parametrize(
    ("dtype", "result", "tolerance"),
    [
        (torch.float64, torch.float64, 0),
        (torch.float32, torch.float32, 1e-6),
        (torch.float16, torch.float32, 0.3),
        (torch.bfloat16, torch.float32, 0.6),
    ],
)
def test_precision(measure, dtype, result, tolerance):
    """Computed in float64 whatever comes; half precision gives float32, and divides nothing by zero."""
    a, b = random_maps(5, seed=1), random_maps(5, seed=2)
    value = measure.call(a.to(dtype), b.to(dtype))
    assert value.dtype == result
    close(value.double(), measure.call(a.to(dtype).double(), b.to(dtype).double()), atol=1e-7)
    close(value.double(), measure.call(a, b), atol=tolerance)
    tiny = measure.call(a.to(dtype) * 1e-6, b.to(dtype) * 1e-6)
    assert tiny.isfinite().all()


@every_measure
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree(measure):
    a, b = random_maps(5, seed=1), random_maps(5, seed=2)
    there = measure.call(a.cuda(), b.cuda())
    assert there.is_cuda
    close(there.cpu(), measure.call(a, b), atol=1e-10)


@every_measure
def test_no_maps(measure):
    assert measure.call(random_maps(0), random_maps(0)).shape == (0,)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (1, 5), (14, 14)], ids=str)
@pytest.mark.parametrize("name", [name for name in MEASURES if "rotate" not in name])
def test_other_shapes(name, shape):
    a, b = random_maps(3, *shape, seed=1), random_maps(3, *shape, seed=2)
    assert MEASURES[name].call(a, b).isfinite().all()


@every_measure
def test_maps_stay_as_they_were(measure):
    a, b = random_maps(3, seed=1), random_maps(3, seed=2)
    before = a.clone(), b.clone()
    measure.call(a, b).zero_()
    assert a.equal(before[0])
    assert b.equal(before[1])


@every_measure
def test_memory_layout_and_modes_do_not_matter(measure):
    a, b = random_maps(3, seed=1), random_maps(3, seed=2)
    value = measure.call(a, b)
    close(measure.call(a.mT.contiguous().mT, b[:, :, None].expand(3, 7, 2, 7)[:, :, 1]), value)
    with torch.inference_mode():
        close(measure.call(a, b).clone(), value)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(measure.call(a, b), value)


@every_measure
def test_what_is_kept_from_an_odd_first_call_serves_later_ones(measure):
    """The operators are made once: also inside inference mode, or where new tensors go to another device by default."""
    a, b = random_maps(3, seed=1), random_maps(3, seed=2)
    value = measure.call(a, b)
    for mode in (torch.inference_mode, functools.partial(torch.device, "meta")):
        for kept in KEPT:
            kept.cache_clear()
        with mode():
            measure.call(a, b)
        close(measure.call(a.clone().requires_grad_(), b).detach(), value)


TURNS = {
    "flip_LR": lambda maps: maps.flip(2),
    "flip_UD": lambda maps: maps.flip(1),
    "rotate": lambda maps: maps.rot90(1, (1, 2)),
}
MIRRORED = {
    "flip_LR": {"L": "R", "R": "L", "rotate_90CC": "rotate_90CW", "rotate_90CW": "rotate_90CC"},
    "flip_UD": {"U": "D", "D": "U", "rotate_90CC": "rotate_90CW", "rotate_90CW": "rotate_90CC"},
    "rotate": {"U": "L", "L": "D", "D": "R", "R": "U", "flip_LR": "flip_UD", "flip_UD": "flip_LR"},
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("name", [name for name in MEASURES if "resilience" not in name])
def test_turning_everything_changes_nothing(name, turn):
    a, b = random_maps(5, seed=1), random_maps(5, seed=2)
    tolerance = 1e-4 if name == "ssim_windowed" else 1e-12  # its cut to 8 bits is at the mercy of rounding
    close(MEASURES[name].call(TURNS[turn](a), TURNS[turn](b)), MEASURES[name].call(a, b), atol=tolerance)


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_turning_everything_leaves_resilience_alone(name, turn):
    """Turned images, turned maps: the transform is then the one that looks the same in the turned world."""
    a, b = random_maps(5, seed=1), random_maps(5, seed=2)
    swap = MIRRORED[turn]
    letters = {"".join(sorted(swap.get(c, c) for c in name.removeprefix("shift_")))}
    turned = next(
        (n for n in TRANSFORMS if "shift" in name and "shift" in n and {"".join(sorted(n[6:]))} == letters),
        swap.get(name, name),
    )
    close(
        resilience(TURNS[turn](a), TURNS[turn](b), turned, INPUT_SIZE),
        resilience(a, b, name, INPUT_SIZE),
    )


@pytest.mark.parametrize("name", [*NOISES, "blur"])
def test_perturbations_may_be_split_and_keep_their_form(name):
    images = torch.randint(0, 256, (5, 3, 20, 30), generator=torch.Generator().manual_seed(0)).byte()
    maps, ids = random_maps(5), [f"face {i}" for i in range(5)]

    def perturb(part):
        if name == "blur":
            return torch.stack(blur_both(images[part], maps[part]), 1)
        return NOISES[name](images[part], 0.5, seed=1, ids=ids[part])

    whole = perturb(slice(None))
    assert whole.dtype == torch.uint8
    assert whole.shape[0] == 5
    assert whole.shape[-2:] == (20, 30)
    assert torch.cat([perturb(slice(0, 2)), perturb(slice(2, 5))]).equal(whole)
    for mode in (torch.inference_mode, functools.partial(torch.device, "meta")):
        for kept in KEPT:
            kept.cache_clear()
        with mode():
            assert perturb(slice(None)).equal(whole)
        assert perturb(slice(None)).equal(whole)
