"""Section 3.3: transforms against OpenCV, and the fast score of shifts against sampling every pixel."""

import itertools
import math
import sys

import cv2
import numpy as np
import pytest
import torch

from explain2me.measures import SIMILARITIES, TRANSFORMS, resilience, shift_distance, ssim

MODULE = sys.modules["explain2me.measures.resilience"]  # the function of that name hides it
SHIFTS = [name for name, transform in TRANSFORMS.items() if transform.group == "shifts"]
TURNS = [name for name in TRANSFORMS if name not in SHIFTS]
DIRECTIONS = {"D": (1, 0), "U": (-1, 0), "R": (0, 1), "L": (0, -1)}


def random_maps(n, h, w, *, seed=0, sparse=False):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(n, h, w, generator=generator, dtype=torch.float64)
    return maps * (torch.rand(n, h, w, generator=generator) < 0.2) if sparse else maps


def random_images(n, c, height, width, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, c, height, width), generator=generator).to(dtype)


def direction(name):
    """(down, right) from the letters of the name."""
    return tuple(sum(DIRECTIONS[letter][axis] for letter in name.removeprefix("shift_")) for axis in (0, 1))


def with_opencv(image, name):
    """The transform of an (H, W, C) array."""
    height, width = image.shape[:2]
    if name in SHIFTS:
        down, right = direction(name)
        matrix = np.array([[1, 0, right * round(width / 14)], [0, 1, down * round(height / 14)]], dtype=np.float64)
        return cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    if name.startswith("flip"):
        return cv2.flip(image, 1 if name == "flip_LR" else 0)
    return cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE if name == "rotate_90CC" else cv2.ROTATE_90_CLOCKWISE)


def test_names_groups_and_order():
    shifts = [f"shift_{letters}" for letters in ("DR", "R", "UR", "D", "U", "DL", "L", "UL")]
    assert list(TRANSFORMS) == [*shifts, "flip_LR", "flip_UD", "rotate_90CC", "rotate_90CW"]
    assert {name: transform.name for name, transform in TRANSFORMS.items()} == {name: name for name in TRANSFORMS}
    groups = [transform.group for transform in TRANSFORMS.values()]
    assert groups == ["shifts"] * 8 + ["flips"] * 2 + ["rotations"] * 2


def test_shift_distance():
    assert [shift_distance(side) for side in (224, 299, 256, 112, 32, 14, 6)] == [16, 21, 18, 8, 2, 1, 0]


def refused(message):
    """The error of our own check, or of jaxtyping's check of the signature where that is on."""
    return pytest.raises((ValueError, TypeError), match=f"{message}|Type-check error")


class TestApply:
    @pytest.mark.parametrize("name", TRANSFORMS)
    def test_matches_opencv(self, name):
        for height, width in [(56, 56)] if "rotate" in name else [(56, 56), (224, 224), (28, 70), (70, 28)]:
            images = random_images(2, 3, height, width)
            for ours, image in zip(TRANSFORMS[name].apply(images), images, strict=True):
                want = with_opencv(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), name)
                assert np.array_equal(ours.permute(1, 2, 0).numpy(), want)

    @pytest.mark.parametrize("name", TRANSFORMS)
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.int64, torch.bool])
    def test_any_type(self, name, dtype):
        images = random_images(2, 1, 28, 28, dtype)
        transformed = TRANSFORMS[name].apply(images)
        assert transformed.dtype == dtype
        assert transformed.shape == images.shape
        assert transformed.double().equal(TRANSFORMS[name].apply(images.double()))

    @pytest.mark.parametrize("name", TRANSFORMS)
    def test_result_is_no_view_of_the_input(self, name):
        images = random_images(1, 3, 4, 4)  # too small to shift
        before = images.clone()
        TRANSFORMS[name].apply(images).zero_()
        assert images.equal(before)

    def test_content_moves_in_the_named_direction(self):
        image = torch.zeros(1, 1, 28, 28)
        image[0, 0, 10, 20] = 1
        for name in SHIFTS:
            down, right = direction(name)
            assert TRANSFORMS[name].apply(image).nonzero().tolist() == [[0, 0, 10 + 2 * down, 20 + 2 * right]]

    @pytest.mark.parametrize("name", ["rotate_90CC", "rotate_90CW"])
    def test_rotation_needs_a_square(self, name):
        with refused(f"{name} needs a square image and map, got height 28 and width 56"):
            TRANSFORMS[name].apply(random_images(1, 3, 28, 56))
        with refused("height 7 and width 9"):
            TRANSFORMS[name].undo(random_maps(1, 7, 9))
        with refused("height 224 and width 160"):
            resilience(random_maps(1, 7, 7), random_maps(1, 7, 7), name, (224, 160))

    def test_shape(self):
        with refused(r"images must have shape \(N, C, H, W\), got \(3, 8, 8\)"):
            TRANSFORMS["flip_LR"].apply(torch.zeros(3, 8, 8))


class TestUndo:
    @pytest.mark.parametrize("name", TURNS)
    @pytest.mark.parametrize("side", [1, 7, 10, 224])
    def test_turns_are_undone_exactly(self, name, side):
        maps = random_maps(3, side, side)
        assert TRANSFORMS[name].undo(TRANSFORMS[name].apply(maps[:, None])[:, 0]).equal(maps)

    @pytest.mark.parametrize("name", SHIFTS)
    @pytest.mark.parametrize("shape", [(14, 14), (28, 28), (224, 112), (20, 17)], ids=str)
    def test_large_maps_move_back_by_whole_cells(self, name, shape):
        maps = random_maps(2, *shape)
        moved = TRANSFORMS[name].apply(maps[:, None])[:, 0]
        rows, columns = (
            slice(max(0, -d * shift_distance(n)), n - max(0, d * shift_distance(n)))
            for d, n in zip(direction(name), shape, strict=True)
        )
        back = TRANSFORMS[name].undo(moved)
        assert back[:, rows, columns].equal(maps[:, rows, columns])

    @pytest.mark.parametrize("name", SHIFTS)
    @pytest.mark.parametrize("shape", [(7, 7), (8, 10), (13, 3)], ids=str)
    def test_small_maps_move_back_by_a_part_of_a_cell(self, name, shape):
        maps = random_maps(2, *shape)
        down, right = direction(name)
        matrix = np.array([[1, 0, -right * shape[1] / 14], [0, 1, -down * shape[0] / 14]])
        for ours, map_ in zip(TRANSFORMS[name].undo(maps), maps.numpy(), strict=True):
            want = cv2.warpAffine(map_, matrix, shape[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            np.testing.assert_allclose(ours, want, atol=0.02)  # OpenCV moves by whole 32nds of a cell

    def test_value_worked_by_hand(self):
        maps = torch.zeros(1, 7, 7)
        maps[0, 3, 3] = 4
        back = TRANSFORMS["shift_DR"].undo(maps)  # half a cell up and left: a quarter each
        assert back.nonzero().tolist() == [[0, 2, 2], [0, 2, 3], [0, 3, 2], [0, 3, 3]]
        assert back[back > 0].tolist() == [1, 1, 1, 1]

    @pytest.mark.parametrize("name", TRANSFORMS)
    def test_a_constant_stays_constant(self, name):
        assert TRANSFORMS[name].undo(torch.full((1, 7, 7), 0.3)).unique().numel() == 1

    def test_wrong_input(self):
        with refused("maps must be floating point"):
            TRANSFORMS["shift_R"].undo(torch.zeros(1, 7, 7, dtype=torch.int64))


def slow_resilience(clean, transformed, name, size, similarity=ssim):
    """Section 3.3 as written: sample with OpenCV at input size, move back by whole pixels, compare the overlap."""
    height, width = size
    down, right = (d * round(side / 14) for d, side in zip(direction(name), size, strict=True))
    scores = []
    for a, b in zip(clean.numpy(), transformed.numpy(), strict=True):
        x, y = (cv2_linear(m, height, width) for m in (a, b))
        rows = [r for r in range(height) if 0 <= r + down < height]
        columns = [c for c in range(width) if 0 <= c + right < width]
        x, y = x[np.ix_(rows, columns)], y[np.ix_([r + down for r in rows], [c + right for c in columns])]
        scores.append(similarity(torch.tensor(x)[None], torch.tensor(y)[None]).item())
    return torch.tensor(scores, dtype=torch.float64)


def cv2_linear(map_, height, width):
    """Bilinear sampling at pixel centres in float64: one axis at a time, from the definition."""
    for axis, side in ((0, height), (1, width)):
        source = np.clip((np.arange(side) + 0.5) * map_.shape[axis] / side - 0.5, 0, map_.shape[axis] - 1)
        map_ = np.apply_along_axis(lambda line, at=source: np.interp(at, np.arange(len(line)), line), axis, map_)
    return map_


class TestResilience:
    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize("shape", [(7, 7), (8, 8), (10, 10), (14, 14), (7, 9), (1, 5), (28, 28)], ids=str)
    @pytest.mark.parametrize("size", [(224, 224), (299, 299), (224, 160), (37, 100), (20, 13)], ids=str)
    def test_shifts_match_sampling_every_pixel(self, shape, size, sparse):
        """The score from moments and turning points is exact, for inputs that are no multiple of the map too."""
        clean, transformed = (
            random_maps(3, *shape, seed=1, sparse=sparse),
            random_maps(3, *shape, seed=2, sparse=sparse),
        )
        for name in SHIFTS if size == (224, 160) else ("shift_DL", "shift_U", "shift_R"):
            want = slow_resilience(clean, transformed, name, size)
            torch.testing.assert_close(
                resilience(clean, transformed, name, size), want, rtol=0, atol=1e-9, equal_nan=True
            )

    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize("shape", [(7, 7), (14, 14), (1, 5), (28, 28)], ids=str)
    @pytest.mark.parametrize("size", [(224, 224), (37, 100)], ids=str)
    def test_correlation_on_shifts_matches_sampling_every_pixel(self, shape, size, sparse):
        clean, transformed = (random_maps(3, *shape, seed=seed, sparse=sparse) for seed in (1, 2))
        for name in ("shift_DL", "shift_U", "shift_R"):
            want = slow_resilience(clean, transformed, name, size, SIMILARITIES["pearson"])
            value = resilience(clean, transformed, name, size, similarity="pearson")
            torch.testing.assert_close(value, want, rtol=0, atol=1e-9, equal_nan=True)

    @pytest.mark.parametrize("similarity", ["pearson", "spearman", "top_k_iou"])
    def test_companions_on_shifts(self, similarity):
        clean, transformed = random_maps(3, 7, 5, seed=1), random_maps(3, 7, 5, seed=2)
        want = slow_resilience(clean, transformed, "shift_UR", (56, 42), SIMILARITIES[similarity])
        value = resilience(clean, transformed, "shift_UR", (56, 42), similarity=similarity)
        torch.testing.assert_close(value, want, rtol=0, atol=1e-9)

    def test_windowed_on_shifts_compares_the_overlap_at_its_own_size(self):
        clean, transformed = random_maps(3, 7, 7, seed=1), random_maps(3, 7, 7, seed=2)

        def windowed(a, b):
            return SIMILARITIES["ssim_windowed"](a, b, input_size=a.shape[1:])

        want = slow_resilience(clean, transformed, "shift_D", (112, 112), windowed)
        value = resilience(clean, transformed, "shift_D", 112, similarity="ssim_windowed")
        torch.testing.assert_close(value, want, rtol=0, atol=1e-3)

    @pytest.mark.parametrize("name", TURNS)
    @pytest.mark.parametrize("similarity", SIMILARITIES)
    def test_turns_are_compared_at_native_resolution(self, name, similarity):
        clean, transformed = random_maps(3, 7, 7, seed=1), random_maps(3, 7, 7, seed=2)
        options = {"input_size": 112} if similarity == "ssim_windowed" else {}
        want = SIMILARITIES[similarity](clean, TRANSFORMS[name].undo(transformed), **options)
        assert resilience(clean, transformed, name, 112, similarity=similarity).equal(want)

    @pytest.mark.parametrize("name", SHIFTS)
    @pytest.mark.parametrize("similarity", SIMILARITIES)
    def test_a_map_that_follows_the_object_scores_1(self, name, similarity):
        """With 14 cells a side a shift is one cell; the outer two are equal, so that the edge brings in nothing new."""
        clean = random_maps(2, 14, 14)
        clean = clean[:, [0, 0, *range(2, 12), 13, 13]][:, :, [0, 0, *range(2, 12), 13, 13]]
        followed = TRANSFORMS[name].apply(clean[:, None])[:, 0]
        value = resilience(clean, followed, name, 224, similarity=similarity)
        torch.testing.assert_close(value, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-9)
        opposite = {"U": "D", "D": "U", "L": "R", "R": "L"}
        wrong = "shift_" + "".join(opposite[letter] for letter in name.removeprefix("shift_"))
        assert (resilience(clean, followed, wrong, 224, similarity=similarity) < 0.9).all()

    def test_the_border_that_came_in_is_not_scored(self):
        """Salience in the replicated border must not count: a 28 x 28 map, shifted down by two cells."""
        clean = random_maps(1, 28, 28)
        shifted = TRANSFORMS["shift_D"].apply(clean[:, None])[:, 0]
        spoiled = shifted.clone()
        spoiled[:, 0] = 100
        value, other = (resilience(clean, m, "shift_D", 224) for m in (shifted, spoiled))
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12)
        assert not ssim(clean, shifted).isclose(ssim(clean, spoiled), atol=0.01)

    @pytest.mark.parametrize("similarity", SIMILARITIES)
    @pytest.mark.parametrize("name", TRANSFORMS)
    def test_undefined_maps(self, name, similarity):
        good, dead, flat, broken = random_maps(1, 7, 7), torch.zeros(1, 7, 7), torch.ones(1, 7, 7), torch.ones(1, 7, 7)
        broken[0, 3, 3] = torch.nan
        maps = {"good": good, "dead": dead.double(), "flat": flat.double(), "broken": broken.double()}
        for (first, a), (second, b) in itertools.product(maps.items(), repeat=2):
            value = resilience(a, b, name, 56, similarity=similarity).item()
            assert math.isnan(value) == (first != "good" or second != "good"), (first, second)

    @pytest.mark.parametrize("similarity", SIMILARITIES)
    @pytest.mark.parametrize("level", [0.0, 3.0])
    def test_undefined_where_the_overlap_is_constant(self, similarity, level):
        """All that differs lies in the part of the clean map that the shift pushed out."""
        clean, transformed = torch.full((1, 28, 28), level, dtype=torch.float64), random_maps(1, 28, 28)
        clean[0, -1, 5] = 9
        assert resilience(clean, transformed, "shift_D", 224, similarity=similarity).isnan().all()
        assert not resilience(clean, transformed, "shift_U", 224, similarity=similarity).isnan().any()

    @pytest.mark.parametrize("similarity", ["ssim", "pearson"])
    def test_a_faint_overlap_beside_a_strong_border_is_exact(self, similarity):
        clean, transformed = 1e-7 * random_maps(2, 28, 28, seed=1), random_maps(2, 28, 28, seed=2)
        clean[:, -1] = 1
        want = slow_resilience(clean, transformed, "shift_D", (224, 224), SIMILARITIES[similarity])
        value = resilience(clean, transformed, "shift_D", 224, similarity=similarity)
        torch.testing.assert_close(value, want, rtol=0, atol=1e-6)

    def test_wrong_input(self):
        maps = random_maps(2, 7, 7)
        with pytest.raises(
            ValueError, match="unknown transform 'rotate_90'; did you mean 'rotate_90CW' or 'rotate_90CC'"
        ):
            resilience(maps, maps, "rotate_90", 224)
        with refused(r"unknown similarity 'lpips'; known: .*pearson"):
            resilience(maps, maps, "flip_LR", 224, similarity="lpips")
        with refused("maps and transformed_maps must have the same shape"):
            resilience(maps, maps[:1], "flip_LR", 224)
        with refused("at least 1 pixel"):
            resilience(maps, maps, "shift_R", 0)
        with refused("input_size must be at least the window"):
            resilience(maps, maps, "shift_R", 6, similarity="ssim_windowed")


@pytest.mark.parametrize("cells", [1, 2, 7, 14, 28, 50])
@pytest.mark.parametrize("pixels", [13, 37, 224])
def test_extrema_lie_at_the_turning_points(cells, pixels):
    lines = np.random.default_rng(0).random((20, cells))
    for span in (slice(0, pixels), slice(pixels // 14, pixels), slice(0, pixels - pixels // 7)):
        sampled = np.array([cv2_linear(line[:, None], pixels, 1)[:, 0] for line in lines])
        points = MODULE._turning_points(pixels, cells, span).numpy()
        assert span.start <= points.min()
        assert points.max() < span.stop
        for best in (np.min, np.max):
            np.testing.assert_allclose(best(sampled[:, points], 1), best(sampled[:, span], 1), atol=1e-12)
