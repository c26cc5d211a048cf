"""Maps from disk, against values worked by hand and SciPy; and everything that can be wrong with them."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from explain2me.errors import ManifestError
from explain2me.salience.heatmaps import fixation_density, load_map, mean_map, read_fixations, resize_map

VALUES = np.array([[0, 10, 20], [30, 40, 250]], dtype=np.uint8)


def png(values, mode=None):
    image = Image.fromarray(values)
    stream = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
def test_png_of_8_bits(tmp_path, mode):
    path = tmp_path / "a.png"
    path.write_bytes(png(VALUES, mode))
    assert np.array_equal(load_map(path), VALUES.astype(np.float32))


def test_png_of_16_bits_keeps_its_depth(tmp_path):
    values = np.array([[0, 1, 2], [40000, 65535, 7]], dtype=np.uint16)
    path = tmp_path / "a.png"
    path.write_bytes(png(values))
    assert np.array_equal(load_map(path), values.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "uint8", "bool"])
def test_npy(tmp_path, dtype):
    values = np.array([[0, 1], [1, 0]]).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    stored = load_map(tmp_path / "a.npy")
    assert stored.dtype == np.float32
    assert np.array_equal(stored, values.astype(np.float32))


def density_by_convolution(points, size, fine=15):
    """Drawn with SciPy, each pixel cut into ``fine`` x ``fine`` and added up again."""
    drawn = np.zeros((size[0] * fine, size[1] * fine))
    for column, row, weight in points:
        drawn[row * fine + fine // 2, column * fine + fine // 2] += weight
    smooth = gaussian_filter(drawn, 0.04 * drawn.shape[1], mode="constant", truncate=8)
    pooled = smooth.reshape(size[0], fine, size[1], fine).sum((1, 3))
    return pooled / pooled.sum()


def test_fixations_are_density_of_their_durations(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("x,y,duration,who\n10.2,5.9,300,S1\n30,20,100,S2\n-4,5,900,S3\n")
    density = load_map(path, image_size=(32, 48))
    np.testing.assert_allclose(density, density_by_convolution([(10, 5, 300), (30, 20, 100)], (32, 48)), atol=5e-6)
    assert density.sum() == pytest.approx(1, abs=1e-5)
    assert np.unravel_index(density.argmax(), density.shape) == (5, 10)


def test_fixations_without_durations_count_alike():
    fixations = read_fixations(b"y,x\n1,2\n3,4\n")
    assert fixations.tolist() == [[2, 1, 1], [4, 3, 1]]


def test_mean_of_a_folder_weighs_every_map_alike(tmp_path):
    first, second = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.float32)
    first[0, 0], second[3, 3] = 255, 0.001
    (tmp_path / "a.png").write_bytes(png(first))
    np.save(tmp_path / "b.npy", second)
    (tmp_path / "readme.txt").write_text("no map")
    average, count = mean_map(tmp_path, (4, 4))
    assert count == 2
    assert average[0, 0] == pytest.approx(0.5)
    assert average[3, 3] == pytest.approx(0.5)


def test_resize_does_not_swap_height_and_width():
    values = np.zeros((4, 8), np.float32)
    values[0] = 1
    resized = resize_map(values, (2, 16))
    assert resized.shape == (2, 16)
    assert resized[0].min() > resized[1].max()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.png", None, "no such file"),
        ("a.png", b"", "empty"),
        ("a.png", b"text", "expected a PNG image"),
        ("a.png", png(VALUES)[:40], "expected a PNG image"),
        ("a.jpg", b"text", "expected a file that ends in .png, .npy, .csv"),
        ("a.png", png(np.zeros((3, 3), np.uint8)), "some above"),
        ("a.npy", b"text", "expected an array of numpy.save"),
        ("a.csv", b"a,b\n1,2\n", "expected the columns x, y"),
        ("a.csv", b"x,y\n1,left\n", "must be numbers"),
        ("a.csv", b"x,y,duration\n1,1,-5\n", "at least 0"),
        ("a.csv", b"x,y\n900,900\n", "a.csv': none of 1 fixations lies inside"),
        (
            "a.csv",
            b"x,y\n3,3\n900,900\n4,900\n",
            "a.csv': 2 of 3 fixations lie outside the image of .* remove fixations beside it",
        ),
        ("a.csv", b"x,y\n0.2,0.3\n", "a.csv': expected x and y in pixels, got values from 0 to 1 only"),
        ("a.csv", b"x,y\n\xff,1\n", "UTF-8"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_wrong_files(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ManifestError, match=message) as raised:
        load_map(tmp_path / name, image_size=(10, 10))
    assert name in str(raised.value)  # of thousands


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((2, 2), np.nan), "finite values"),
        (np.array([[-1.0, 2.0]]), "at least 0"),
        (np.ones(3), r"shape \(h, w\)"),
        (np.ones((0, 3)), r"shape \(h, w\)"),
        (np.array([["a"]]), r"numbers of shape"),
    ],
    ids=["nan", "negative", "1-D", "empty", "text"],
)
def test_wrong_arrays(tmp_path, values, message):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ManifestError, match=message):
        load_map(tmp_path / "a.npy")


def test_pickled_array_is_refused_and_not_run(tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return (canary.write_text, ("ran",))

    np.save(tmp_path / "a.npy", np.array([[Evil()]], dtype=object), allow_pickle=True)
    with pytest.raises(ManifestError, match=r"expected an array of numpy\.save"):
        load_map(tmp_path / "a.npy")
    assert not canary.exists()


def test_fixations_need_the_size_of_their_image(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,1\n")
    with pytest.raises(ManifestError, match="expected image_size, which a table of fixations needs"):
        load_map(tmp_path / "a.csv")


def test_mean_of_nothing(tmp_path):
    with pytest.raises(ManifestError, match="got none"):
        mean_map(tmp_path, (4, 4))
    with pytest.raises(ManifestError, match="expected a folder"):
        mean_map(tmp_path / "absent", (4, 4))


def test_density_reference_is_not_trivial():
    density = fixation_density(np.array([[1.0, 1.0, 1.0]]), (20, 40))
    assert density[1, 1] == density.max()
    assert density[19, 39] < 1e-6 * density.max()


def test_shares_are_not_taken_for_pixels():
    with pytest.raises(
        ManifestError, match="seem to be fractions of the image; multiply them by its width and height, 40 x 20"
    ):
        fixation_density(np.array([[0.5, 0.25, 1.0], [1.0, 0.0, 1.0]]), (20, 40))
    assert fixation_density(np.array([[0.5, 0.25, 1.0], [3.0, 0.0, 1.0]]), (20, 40)).sum() == pytest.approx(1)


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (7, 7)], ids=str)
def test_a_density_is_drawn_at_the_size_that_is_needed(tmp_path, size):
    """As it would be if it were drawn at the size of the image and its pixels added up."""
    fixations = np.array([[3.0, 5.0, 2.0], [299.9, 190.0, 1.0], [150.0, 100.0, 3.0], [151.0, 100.0, 0.0]])
    wide = (size[0] * 25, size[1] * 50)  # a whole number of pixels for each part
    scaled = fixations * (wide[1] / 300, wide[0] / 200, 1)
    small = fixation_density(scaled, wide, size=size)
    large = fixation_density(scaled, wide).astype(np.float64)
    pooled = large.reshape(size[0], 25, size[1], 50).sum((1, 3))
    np.testing.assert_allclose(small, pooled / pooled.sum(), atol=1e-6)
    fixations[:, :2] = np.floor(fixations[:, :2])
    small = fixation_density(fixations, (200, 300), size=size)
    table = tmp_path / "a.csv"
    table.write_text("x,y,duration\n" + "\n".join(",".join(map(str, row)) for row in fixations))
    np.testing.assert_array_equal(load_map(table, image_size=(200, 300), size=size), small)


def test_maps_are_read_at_the_size_that_is_needed(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((20, 30)))
    np.testing.assert_array_equal(
        load_map(tmp_path / "a.npy", size=(7, 7)), resize_map(load_map(tmp_path / "a.npy"), (7, 7))
    )


def test_a_narrow_image_has_a_density_too():
    density = fixation_density(np.array([[3.0, 1700.0, 1.0]]), (4000, 10), size=(32, 32))
    assert np.isfinite(density).all()
    assert density.argmax() // 32 == 13
