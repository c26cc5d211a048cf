"""Section 3.2: the noises do what their level says, and depend on nothing but seed, id, kind and level."""

import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from explain2me.measures import NOISES, gaussian_noise, salt_and_pepper, turbulence, uniform_blend
from explain2me.measures.noise import blur, blur_operator, displace, key_of, random_bits, replacements, tilt_field

LEVELS = {"salt_pepper": 0.3, "gaussian": 0.1, "uniform_blend": 0.4, "turbulence": 3.0}


def random_images(n, height=24, width=32, *, seed=0):
    return torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(seed)).byte()


def grey(value, side=256):
    return torch.full((1, 3, side, side), value, dtype=torch.uint8)


@pytest.fixture(params=NOISES)
def noise(request):
    """One kind of noise at a medium level."""
    return lambda images, level=LEVELS[request.param], **options: NOISES[request.param](images, level, **options)


def test_every_kind_is_here():
    assert set(NOISES) == set(LEVELS)


class TestKeys:
    """What the noise depends on."""

    def test_batch_and_order_do_not_matter(self, noise):
        images, ids = random_images(7), [f"face {i}" for i in range(7)]
        whole = noise(images, seed=1, ids=ids)
        order = torch.tensor([3, 0, 6, 5, 1, 2, 4])
        assert noise(images[order], seed=1, ids=[ids[i] for i in order]).equal(whole[order])
        parts = [noise(images[i : i + 3], seed=1, ids=ids[i : i + 3]) for i in range(0, 7, 3)]
        assert torch.cat(parts).equal(whole)

    def test_threads_do_not_matter(self, noise):
        images, before = random_images(3, 64, 64), torch.get_num_threads()
        try:
            results = []
            for num in (1, 2):
                torch.set_num_threads(num)
                results.append(noise(images, seed=1, ids=range(3)))
        finally:
            torch.set_num_threads(before)
        assert results[0].equal(results[1])

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_device_does_not_matter(self, noise):
        images = random_images(3, 64, 64)
        there = noise(images.cuda(), seed=1, ids=range(3))
        assert there.is_cuda
        assert there.cpu().equal(noise(images, seed=1, ids=range(3)))

    def test_forms_of_one_id(self, noise):
        images = random_images(2)
        one = noise(images, seed=1, ids=[3, 4])
        for ids in (torch.tensor([3, 4]), torch.tensor([3, 4], dtype=torch.int32), range(3, 5)):
            assert noise(images, seed=1, ids=ids).equal(one)

    def test_seed_id_and_level_each_matter(self, noise):
        images = random_images(1, 32, 32)
        one = noise(images, seed=1, ids=["a"])
        for options in ({"seed": 2, "ids": ["a"]}, {"seed": 1, "ids": ["b"]}, {"seed": 1, "ids": ["é"]}):
            assert not noise(images, **options).equal(one)
        assert not noise(images, seed=1, ids=[3]).equal(noise(images, seed=1, ids=["3"]))
        assert noise(images, seed=1, ids=np.array(["a"])).equal(one)

    def test_global_random_state_is_left_alone(self, noise):
        before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
        noise(random_images(1), seed=1, ids=[0])
        assert before[0].equal(torch.get_rng_state())
        assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002

    def test_caller_keeps_the_images(self, noise):
        images = random_images(2)
        before = images.clone()
        noise(images, seed=1, ids=[0, 1])
        result = noise(images, 0.0, seed=1, ids=[0, 1])
        result.zero_()
        assert images.equal(before)

    def test_memory_layout_does_not_matter(self, noise):
        images = random_images(2)
        last = images.contiguous(memory_format=torch.channels_last)
        assert noise(last, seed=1, ids=[0, 1]).equal(noise(images, seed=1, ids=[0, 1]))

    def test_levels_are_independent(self):
        """Noise at 0.2 is not noise at 0.1 with more of it: of 10 % and 20 %, 2 % coincide."""
        changed = [salt_and_pepper(grey(100), a, seed=1, ids=["a"]) != 100 for a in (0.1, 0.2)]
        assert (changed[0] & changed[1]).double().mean().item() == pytest.approx(0.02, abs=0.002)

    def test_kinds_are_independent(self):
        normal = gaussian_noise(grey(128), 0.1, seed=1, ids=["a"]).double().flatten()
        uniform = uniform_blend(grey(128), 0.1, seed=1, ids=["a"]).double().flatten()
        assert abs(np.corrcoef(normal, uniform)[0, 1]) < 0.01

    def test_the_stream_is_fixed(self):
        """Guards stored runs: these numbers must never change, on any platform or version."""
        assert random_bits(7, 3, "<u4").tolist() == FIRST_BITS
        image = torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2) * 20
        for kind, want in FIRST_PIXELS.items():
            assert NOISES[kind](image, LEVELS[kind], seed=7, ids=["face 1"]).flatten().tolist() == want, kind

    def test_zero_changes_nothing(self, noise):
        images = random_images(3)
        assert noise(images, 0.0, seed=1, ids=range(3)).equal(images)

    def test_no_images(self, noise):
        assert noise(random_images(0), seed=1, ids=[]).shape == (0, 3, 24, 32)

    def test_one_pixel(self, noise):
        assert noise(random_images(1, 1, 1), seed=1, ids=[0]).shape == (1, 3, 1, 1)


FIRST_BITS = [703200164, 3745526968, 4175839367]
FIRST_PIXELS = {
    "salt_pepper": [0, 20, 40, 60, 80, 100, 255, 140, 160, 180, 200, 220],
    "gaussian": [25, 6, 87, 112, 65, 52, 125, 137, 157, 146, 175, 244],
    "uniform_blend": [70, 51, 95, 43, 74, 159, 126, 171, 138, 160, 174, 220],
    "turbulence": [0, 23, 41, 59, 80, 103, 121, 139, 160, 183, 201, 219],
}


def refused(message):
    """The error of our own check, or of jaxtyping's check of the signature where that is on."""
    return pytest.raises((ValueError, TypeError), match=f"{message}|Type-check error")


class TestWrongInput:
    def test_images(self, noise):
        with refused(r"images must be uint8 of shape \(N, 3, H, W\), got torch.float32"):
            noise(torch.rand(1, 3, 8, 8), seed=1, ids=[0])

    @pytest.mark.parametrize("ids", [["a"], ["a", "b", "c"], "ab", torch.arange(3)], ids=str)
    def test_number_of_ids(self, noise, ids):
        with refused("one string or integer for each of 2 images"):
            noise(random_images(2), seed=1, ids=ids)

    @pytest.mark.parametrize("ids", [torch.rand(2), torch.zeros(2, 1, dtype=torch.int64)], ids=["float", "2-d"])
    def test_tensor_of_ids(self, noise, ids):
        with refused(r"ids must be integers of shape \(N,\)"):
            noise(random_images(2), seed=1, ids=ids)

    def test_ids_and_seeds_that_are_not_whole(self, noise):
        with refused("integer"):
            noise(random_images(1), seed=1, ids=[0.5])
        with refused("integer"):
            noise(random_images(1), seed=0.5, ids=[0])

    @pytest.mark.parametrize("amount", [-0.01, 1.01, math.nan, math.inf])
    @pytest.mark.parametrize("function", [salt_and_pepper, uniform_blend])
    def test_amount(self, function, amount):
        with refused(r"amount must be in \[0, 1\], got"):
            function(random_images(1), amount, seed=1, ids=[0])

    @pytest.mark.parametrize("level", [-0.01, math.nan, math.inf])
    @pytest.mark.parametrize("function", [gaussian_noise, turbulence])
    def test_level(self, function, level):
        with refused("must be finite and at least 0, got"):
            function(random_images(1), level, seed=1, ids=[0])


class TestSaltAndPepper:
    @pytest.mark.parametrize("amount", [0.01, 0.05, 0.5, 0.75, 1.0])
    def test_share_of_each(self, amount):
        """Each channel value is replaced independently; salt is as likely as pepper."""
        noisy = salt_and_pepper(grey(100), amount, seed=1, ids=["a"])
        n = noisy.numel()
        for value, share in ((0, amount / 2), (255, amount / 2), (100, 1 - amount)):
            count = int((noisy == value).sum())
            assert abs(count - n * share) <= 4 * math.sqrt(n * share * (1 - share)) + 1e-9
        red, green = (noisy[0, i].flatten() != 100 for i in (0, 1))
        assert abs((red & green).double().mean().item() - amount**2) < 0.01

    @pytest.mark.parametrize(
        ("amount", "pepper", "salt"),
        [
            (0.0, [], []),
            (2**-32 - 2**-40, [], []),
            (2**-31, [0], [1]),
            (0.5, range(2), range(2, 4)),
            (1.0, range(3), range(3, 6)),
        ],
    )
    def test_resolution(self, amount, pepper, salt):
        """A probability of 2^-31 is not 0: of 2^32 equally likely words, one is pepper and one is salt."""
        words = {0.5: [0, 2**30 - 1, 2**30, 2**31 - 1, 2**31], 1.0: [0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1]}
        bits = np.array(words.get(amount, range(5)), dtype=np.uint32)
        keep, white = replacements(bits, amount)
        assert np.flatnonzero(white).tolist() == list(salt)
        assert np.flatnonzero((keep == 0) & (white == 0)).tolist() == list(pepper)
        assert set(keep) | set(white) <= {0, 255}

    def test_no_pattern_across_pixels(self):
        changed = (salt_and_pepper(grey(100), 0.5, seed=1, ids=["a"]) != 100).double()[0, 0]
        for shifted in (changed.roll(1, 0), changed.roll(1, 1), changed.T):
            assert abs(np.corrcoef(changed.flatten(), shifted.flatten())[0, 1]) < 0.02


class TestGaussian:
    def test_distribution(self):
        noise = gaussian_noise(grey(128), 0.05, seed=1, ids=["a"]).double().flatten() - 128
        edges = np.arange(-40.5, 41)
        shares = np.diff(scipy.stats.norm.cdf(edges / (0.05 * 255)))
        counts = np.histogram(noise, edges)[0]
        assert scipy.stats.chisquare(counts, shares / shares.sum() * counts.sum()).pvalue > 1e-3

    def test_cut_and_not_wrapped(self):
        assert gaussian_noise(grey(250), 0.5, seed=1, ids=["a"]).unique().tolist()[-1] == 255
        dark = gaussian_noise(grey(0), 0.5, seed=1, ids=["a"])
        assert (dark == 0).double().mean().item() == pytest.approx(0.5, abs=0.01)

    def test_very_strong_noise_is_black_or_white(self):
        extreme = gaussian_noise(grey(128), 1e6, seed=1, ids=["a"])
        assert ((extreme == 0) | (extreme == 255)).double().mean().item() > 0.999


class TestUniformBlend:
    @settings(max_examples=25, deadline=None)
    @given(st.floats(0, 1), st.integers(0, 255))
    def test_is_the_formula(self, amount, value):
        mixed = uniform_blend(grey(value, 8), amount, seed=3, ids=["a"]).double().flatten().numpy()
        noise = random_bits(key_of(3, "a", "uniform_blend", amount), mixed.size, "<u1")
        assert np.abs(mixed - ((1 - amount) * value + amount * noise)).max() <= 0.5 + 1e-4

    def test_pure_noise_is_uniform_and_forgets_the_image(self):
        pure = uniform_blend(grey(7), 1.0, seed=1, ids=["a"])
        assert pure.equal(uniform_blend(grey(200), 1.0, seed=1, ids=["a"]))
        assert scipy.stats.chisquare(np.bincount(pure.flatten(), minlength=256)).pvalue > 1e-3

    def test_half(self):
        """(v + u) / 2, rounded half up: from v = 100, u = 0, 1, 2, ... give 50, 51, 51, ..., 178."""
        mixed = uniform_blend(grey(100), 0.5, seed=1, ids=["a"])
        counts = np.bincount(mixed.flatten(), minlength=256)
        assert np.flatnonzero(counts).tolist() == list(range(50, 179))
        assert counts[50] < 0.7 * counts[51:178].mean()
        assert counts[178] < 0.7 * counts[51:178].mean()


class TestTurbulence:
    def test_tilt_has_the_given_size_and_is_smooth(self):
        steps = torch.stack([tilt_field(key, 224, 224, 16.0, 3.0) for key in range(8)]) / 32
        inside = steps[:, :, 40:-40, 40:-40]
        assert inside.std().item() == pytest.approx(3, rel=0.15)
        assert (steps.diff(dim=2).abs().max()) < 1
        down, right = inside[:, 0].flatten(), inside[:, 1].flatten()
        assert abs(np.corrcoef(down, right)[0, 1]) < 0.3

    def test_displacement_matches_scipy(self):
        image = random_images(1, 20, 30)[0]
        steps = torch.randint(-90, 90, (2, 20, 30), generator=torch.Generator().manual_seed(0))
        rows, columns = np.mgrid[:20, :30] + steps.numpy() / 32
        want = [
            scipy.ndimage.map_coordinates(c, (rows, columns), order=1, mode="nearest") for c in image.double().numpy()
        ]
        torch.testing.assert_close(displace(image, steps).double() / 1024, torch.tensor(np.stack(want)))

    @pytest.mark.parametrize("sigma", [0.05, 0.4, 1.5, 9.0])
    def test_blur_matches_scipy(self, sigma):
        operator = blur_operator(20, sigma, torch.device("cpu")) / 2**16
        want = scipy.ndimage.gaussian_filter1d(np.eye(20), sigma, axis=0, mode="reflect", truncate=4)
        torch.testing.assert_close(operator, torch.tensor(want), rtol=0, atol=1e-4)
        assert operator.sum(1).tolist() == [1] * 20

    def test_blur_rounds(self):
        assert blur(torch.full((1, 2, 2), 1024 * 7 + 600), 0.0).unique().tolist() == [8]

    def test_grows_with_strength(self):
        image = (
            torch.from_numpy(np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((8, 8))) * 255).byte().expand(1, 3, 64, 64)
        )
        change = [(turbulence(image, s, seed=1, ids=["a"]).double() - image).abs().mean() for s in (0.0, 1.0, 3.0, 9.0)]
        assert change == sorted(change)
        assert change[0] == 0 < change[1]

    def test_colours_move_together(self):
        image = random_images(1, 40, 40)
        image[:, 1] = image[:, 2] = image[:, 0]
        warped = turbulence(image, 4.0, seed=1, ids=["a"])
        assert warped[:, 0].equal(warped[:, 1])

    def test_height_and_width_are_not_swapped(self):
        """A ramp down a tall image changes along the tall side only."""
        ramp = torch.arange(200, dtype=torch.uint8).view(1, 1, 200, 1).expand(1, 3, 200, 20)
        warped = turbulence(ramp, 2.0, seed=1, ids=["a"]).double()
        assert warped.shape == (1, 3, 200, 20)
        assert np.corrcoef(warped[0, 0, :, 10], np.arange(200))[0, 1] > 0.99
