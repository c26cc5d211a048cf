"""Section 3.4: the blur against its formula, pixel by pixel, and against the released scripts' quantised form."""

import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

from explain2me.measures import blur_both, blur_by_salience
from explain2me.measures.focus import NUM_LEVELS, axis_operators, blur_levels, cosine_scales

FACES = Path(__file__).resolve().parents[2] / "../shared/data/faces"
needs_faces = pytest.mark.skipif(
    not FACES.is_dir(), reason="face photographs not found beside the repository (../shared)"
)
REMOVALS = ("salient", "nonsalient")


def make_images(n, height, width, *, seed=0):
    """Smooth shapes with fine texture."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 6, 6, generator=generator)
    coarse = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    return (255 * (coarse + 0.15 * torch.randn(coarse.shape, generator=generator))).clamp(0, 255).byte()


def faces(n):
    with (FACES / "manifest.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    paths = [FACES / rows[i * len(rows) // n]["path"] for i in range(n)]
    return torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in paths])


def smooth_maps(n, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 1, 4, 4, generator=generator, dtype=torch.float64)
    return torch.nn.functional.interpolate(coarse, size=(7, 7), mode="bicubic")[:, 0].clamp_min(0)


def sparse_maps(n, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(n, 7, 7, generator=generator, dtype=torch.float64)
    maps *= torch.rand(n, 7, 7, generator=generator) < 0.1
    maps[:, 3, 3] += 0.5
    return maps


def clearness(map_, removal, height, width):
    """s of the formula in float64, with OpenCV and SciPy."""
    t = (map_ - map_.min()) / (map_.max() - map_.min())
    t = np.clip(cv2.resize(t, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    smoothed = scipy.ndimage.gaussian_filter(1 - t if removal == "salient" else t, 5 * (height + width) / 448)
    return smoothed / smoothed.max()


def exact_at(image, sigma, rows, columns):
    """Each chosen pixel of (3, H, W) by a Gaussian of its own sigma, cut off at 4 sigma, border reflected."""
    _, height, width = image.shape
    values = []
    for y, x in zip(rows, columns, strict=True):
        radius = int(4 * sigma[y, x] + 0.5)
        offsets = np.arange(-radius, radius + 1)
        weights = np.exp(-0.5 * (offsets / max(sigma[y, x], 1e-30)) ** 2)
        weights /= weights.sum()
        ys, xs = (
            np.pad(np.arange(n), radius, mode="symmetric")[i : i + len(offsets)] for n, i in ((height, y), (width, x))
        )
        values.append(np.einsum("chw,h,w->c", image[:, ys[:, None], xs], weights, weights))
    return np.stack(values, 1)


def released(image, s, dtype):
    """One filter for each step of 0.01 of s, as in the released scripts; with uint8 each filter truncates twice."""
    steps = np.round(s, 2)
    result = image.astype(dtype)
    for step in np.unique(steps):
        sigma = 10 * (1 - step) ** 4
        if sigma > 0:
            blurred = np.stack([scipy.ndimage.gaussian_filter(channel.astype(dtype), sigma) for channel in image])
            result[:, steps == step] = blurred[:, steps == step]
    return result


def deviation_from_formula(images, maps, removal, num_pixels=1500):
    height, width = images.shape[2:]
    rng = np.random.default_rng(0)
    errors = []
    for image, map_, blurred in zip(images, maps, blur_by_salience(images, maps, removal), strict=True):
        rows, columns = rng.integers(height, size=num_pixels), rng.integers(width, size=num_pixels)
        sigma = 10 * (height + width) / 448 * (1 - clearness(map_.numpy(), removal, height, width)) ** 4
        want = np.round(exact_at(image.double().numpy(), sigma, rows, columns))
        errors.append(np.abs(blurred.double().numpy()[:, rows, columns] - want))
    return np.stack(errors).mean((1, 2))


def refused(message):
    """The error of our own check, or of jaxtyping's check of the signature where that is on."""
    return pytest.raises((ValueError, TypeError), match=f"{message}|Type-check error")


@needs_faces
@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("make_maps", [smooth_maps, sparse_maps])
def test_faces_match_the_formula(make_maps, removal):
    errors = deviation_from_formula(faces(4), make_maps(4), removal)
    assert errors.max() <= 0.15  # MEASURES.md allows 0.3


@needs_faces
@pytest.mark.parametrize(("dtype", "mean", "largest"), [(np.uint8, 0.9, 3), (np.float64, 0.3, 2)])
def test_faces_match_the_released_scripts(dtype, mean, largest):
    """Their truncation to 8 bits, 1 grey level wherever they blur, causes most of the difference."""
    images, maps = faces(4), torch.cat([smooth_maps(2), sparse_maps(2)])
    errors = [
        np.abs(blurred.double().numpy() - released(image.numpy(), clearness(map_.numpy(), removal, 224, 224), dtype))
        for removal, results in blur_both(images, maps)._asdict().items()
        for image, map_, blurred in zip(images, maps, results, strict=True)
    ]
    assert np.mean(errors) <= mean
    assert np.quantile(errors, 0.999) <= largest


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("size", [(224, 224), (64, 64), (299, 299), (96, 160), (160, 96), (7, 5)], ids=str)
def test_any_size_matches_the_formula(size, removal):
    """Height and width are not swapped, and the sigmas follow the mean side."""
    images, maps = make_images(2, *size), torch.cat([smooth_maps(1), sparse_maps(1)])[:, :, :5]
    assert deviation_from_formula(images, maps, removal, 300).max() <= 0.3


def test_salient_and_nonsalient_places():
    """A map that marks the left: salient removal greys the left and keeps the right, and the other way round."""
    stripes = (torch.arange(224) % 4 < 2).byte() * 200
    image = stripes.expand(1, 3, 224, 224).contiguous()
    salient, nonsalient = blur_both(image, torch.tensor([[[1.0, 1.0, 0.5, 0.0, 0.0]]]))
    for blurred, grey, kept in (
        (salient, slice(0, 40), slice(-20, None)),
        (nonsalient, slice(-40, None), slice(0, 20)),
    ):
        assert blurred[..., grey].float().std() < 5
        assert blurred[..., kept].equal(image[..., kept])


def test_both_are_the_same_as_one_at_a_time():
    images, maps = make_images(3, 64, 80), smooth_maps(3)
    for removal, blurred in blur_both(images, maps)._asdict().items():
        assert blurred.equal(blur_by_salience(images, maps, removal))
        assert blurred.dtype == torch.uint8


def test_batch_and_order_do_not_matter():
    images, maps = make_images(5, 64, 64), smooth_maps(5)
    whole = blur_both(images, maps)
    order = torch.tensor([3, 1, 4, 0, 2])
    for blurred, again in zip(whole, blur_both(images[order], maps[order]), strict=True):
        assert again.equal(blurred[order])
    for blurred, part in zip(whole, blur_both(images[1:3], maps[1:3]), strict=True):
        assert part.equal(blurred[1:3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree():
    images, maps = make_images(20, 64, 64), smooth_maps(20)
    for here, there in zip(blur_both(images, maps), blur_both(images.cuda(), maps.cuda()), strict=True):
        difference = (here.int() - there.cpu().int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).double().mean() < 1e-3


@pytest.mark.parametrize("removal", REMOVALS)
def test_images_without_a_usable_map_come_back_unchanged(removal):
    images, maps = make_images(5, 32, 32), smooth_maps(5)
    maps[0], maps[1], maps[2, 0, 0], maps[3] = 0, 2, torch.nan, torch.inf
    blurred = blur_by_salience(images, maps, removal)
    assert blurred[:4].equal(images[:4])
    assert not blurred[4].equal(images[4])
    assert blurred[4:].equal(blur_by_salience(images[4:], maps[4:], removal))


@pytest.mark.parametrize("removal", REMOVALS)
def test_a_constant_image_stays(removal):
    image = torch.full((1, 3, 50, 60), 201, dtype=torch.uint8)
    assert blur_by_salience(image, smooth_maps(1), removal).equal(image)


def test_scale_of_the_map_does_not_matter():
    images, maps = make_images(2, 64, 64), smooth_maps(2)
    assert blur_by_salience(images, 1000 * maps).equal(blur_by_salience(images, maps))


def test_precision_of_the_map_hardly_matters():
    images, maps = make_images(2, 64, 64), smooth_maps(2)
    for dtype, tolerance in ((torch.float32, 0.001), (torch.bfloat16, 0.5)):
        difference = blur_by_salience(images, maps.to(dtype)).float() - blur_by_salience(images, maps).float()
        assert difference.abs().mean() < tolerance


def test_flips_of_everything():
    images, maps = make_images(2, 64, 64), smooth_maps(2)
    for axis in (-1, -2):
        difference = (
            blur_by_salience(images.flip(axis), maps.flip(axis)).int() - blur_by_salience(images, maps).flip(axis).int()
        )
        assert difference.abs().max() <= 1  # sums in another order
        assert difference.abs().double().mean() < 1e-3


def test_a_map_finer_than_the_image():
    """A peak that the resampling misses leaves nothing salient: all is blurred, and nothing is NaN."""
    images, maps = make_images(1, 32, 32), torch.zeros(1, 224, 224)
    maps[0, 0, 0] = 1
    assert blur_by_salience(images, maps, "salient").equal(images)
    strongest = scipy.ndimage.gaussian_filter(images[0, 0].double().numpy(), 10 * 32 / 224)
    np.testing.assert_allclose(blur_by_salience(images, maps, "nonsalient")[0, 0], strongest, atol=0.6)


def test_memory_layout_and_autocast_do_not_matter():
    images, maps = make_images(2, 64, 64), smooth_maps(2).float()
    want = blur_by_salience(images, maps)
    assert blur_by_salience(images.contiguous(memory_format=torch.channels_last), maps).equal(want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert blur_by_salience(images, maps).equal(want)


def test_maps_with_gradients_and_inference_mode():
    images, maps = make_images(1, 40, 40), smooth_maps(1)
    with torch.inference_mode():
        want = blur_by_salience(images, maps)
    assert blur_by_salience(images, maps.requires_grad_()).equal(want)


def test_no_images():
    assert [b.shape for b in blur_both(make_images(3, 32, 32)[:0], smooth_maps(3)[:0])] == [(0, 3, 32, 32)] * 2


class TestOperators:
    @pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0, 5.0, 10.0, 30.0])
    @pytest.mark.parametrize("side", [1, 16, 224])
    def test_cosines_hold_the_blur_of_scipy(self, side, sigma):
        cosines = axis_operators(side, blur_levels(side, side), float(side), torch.device("cpu")).cosines.double()
        ours = cosines.T @ (cosine_scales(side, sigma)[:, None] * cosines)
        want = scipy.ndimage.gaussian_filter1d(np.eye(side), sigma, axis=0, mode="reflect", truncate=4)
        np.testing.assert_allclose(ours, want, atol=1e-6)

    def test_levels_left_short_hold_it_too(self):
        sigmas = blur_levels(224, 224)
        axis = axis_operators(224, sigmas, 224.0, torch.device("cpu"))
        for sigma, level in zip(sigmas[1:], axis.levels, strict=True):
            want = scipy.ndimage.gaussian_filter1d(np.eye(224), sigma, axis=0, mode="reflect", truncate=4)
            np.testing.assert_allclose(level @ axis.cosines[: level.shape[1]], want, atol=2e-3)

    @pytest.mark.parametrize("size", [(224, 224), (2, 3), (1024, 512)])
    def test_sigmas(self, size):
        sigmas = blur_levels(*size)
        assert len(sigmas) == NUM_LEVELS
        assert sigmas[0] == 0
        assert sigmas[-1] == pytest.approx(10 * sum(size) / 448)
        assert list(sigmas) == sorted(set(sigmas))


class TestWrongInput:
    def test_removal(self):
        with refused("unknown part to remove 'non-salient'; did you mean 'nonsalient'"):
            blur_by_salience(make_images(1, 32, 32), smooth_maps(1), "non-salient")

    def test_images_and_maps(self):
        with refused("images must be uint8"):
            blur_both(make_images(1, 32, 32).float(), smooth_maps(1))
        with refused("maps must be floating point"):
            blur_both(make_images(1, 32, 32), smooth_maps(1)[0])
        with refused("one map for each image, got 2 images and 1 maps"):
            blur_both(make_images(2, 32, 32), smooth_maps(1))
