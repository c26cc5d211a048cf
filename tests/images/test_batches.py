"""Resized images in batches: in order, ahead of their reader, and no thread left behind."""

import gc
import hashlib
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, make_folder, picture
from PIL import Image

from explain2me.images.batches import batches
from explain2me.images.decode import decode_image, load_image
from explain2me.images.examine import index_images
from explain2me.images.listing import list_images


def image_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("explain2me-images")]


def test_error_of_the_callback_ends_the_threads(tmp_path):
    make_folder(tmp_path, [f"{number}.png" for number in range(100)])

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_images(list_images(tmp_path), tmp_path, on_done=stop)
    assert not image_threads()


def test_size_is_height_then_width(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(48, 32)))
    image = load_image(tmp_path / "a.png", (20, 60))
    assert image.dtype == torch.uint8
    assert image.shape == (3, 20, 60)
    assert image.is_contiguous()
    assert load_image(tmp_path / "a.png", (48, 32)).shape == (3, 48, 32)


def test_image_of_the_right_size_is_untouched(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(48, 32)))
    image = load_image(tmp_path / "a.png", (32, 48), interpolation="lanczos")
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(picture(48, 32)))


@pytest.mark.parametrize("interpolation", ["area", "bilinear", "bicubic", "lanczos"])
def test_shrinking_is_antialiased(tmp_path, interpolation):
    """One-pixel stripes become even grey; sampling without a filter would show black or white."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(stripes)))
    middle = load_image(tmp_path / "a.png", (32, 32), interpolation=interpolation)[:, 4:-4, 4:-4].float()
    assert (middle - 127.5).abs().max() < 3


def test_bilinear_agrees_with_torch(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(150, 90)))
    pixels = torch.from_numpy(decode_image(encoded(picture(150, 90)))).permute(2, 0, 1)[None].double()
    want = torch.nn.functional.interpolate(pixels, (40, 60), mode="bilinear", antialias=True)[0]
    assert (load_image(tmp_path / "a.png", (40, 60)).double() - want).abs().max() < 1.01


def test_wrong_arguments(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected interpolation as one of .*, got 'bilinaer'; did you mean 'bilinear'"
    ):
        load_image(tmp_path / "a", (3, 3), interpolation="bilinaer")
    with pytest.raises(ValueError, match=r"expected size as \(height, width\) of at least 1 pixel each, got \(0, 3\)"):
        load_image(tmp_path / "a", (0, 3))
    with pytest.raises(ValueError, match="batch_size and prefetch of at least 1, got 0 and 2"):
        batches([], size=(3, 3), batch_size=0)
    with pytest.raises(ValueError, match="expected one sha256 per path, got 1 for 0 paths"):
        batches([], size=(3, 3), batch_size=1, expected_sha256=["x"])


def make_images(folder: Path, num_images: int) -> list[Path]:
    """The first ones are the largest, so that threads finish out of order."""
    paths = [folder / f"{number}.png" for number in range(num_images)]
    for number, path in enumerate(paths):
        side = 400 if number % 4 == 0 else 16
        path.write_bytes(encoded(picture(side, side, seed=number)))
    return paths


@pytest.mark.parametrize(("num_threads", "prefetch"), [(1, 1), (4, 1), (4, 3)])
def test_batches_keep_the_order(tmp_path, num_threads, prefetch):
    paths = make_images(tmp_path, 11)
    found = list(batches(paths, size=(12, 20), batch_size=4, num_threads=num_threads, prefetch=prefetch))
    assert [batch.positions for batch in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    want = torch.stack([load_image(path, (12, 20)) for path in paths])
    assert torch.equal(torch.cat([batch.images for batch in found]), want)
    assert not any(batch.failures for batch in found)
    assert not image_threads()


def test_failures_are_reported_and_move_no_border(tmp_path):
    paths = make_images(tmp_path, 9)
    for number in (1, 3, 4, 5):
        paths[number].write_bytes(b"text")
    first, second, third = batches(paths, size=(12, 20), batch_size=3)
    assert (first.positions, second.positions, third.positions) == ([0, 2], [], [6, 7, 8])
    assert [failure.position for failure in second.failures] == [3, 4, 5]
    assert first.failures[0].position == 1
    assert first.failures[0].error.kind == "not_an_image"
    assert first.failures[0].error.message.startswith("'1.png': ")
    assert second.images.shape == (0, 3, 12, 20)
    assert second.images.dtype == torch.uint8
    assert torch.equal(first.images[1], load_image(paths[2], (12, 20)))


def test_file_swapped_after_the_index_is_noticed(tmp_path):
    paths = make_images(tmp_path, 3)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    paths[1].write_bytes(encoded(picture(16, 16, seed=99)))
    (batch,) = batches(paths, size=(12, 20), batch_size=3, expected_sha256=hashes)
    assert batch.positions == [0, 2]
    assert batch.failures[0].error.kind == "hash_mismatch"


def test_no_paths_no_batches():
    assert list(batches([], size=(12, 20), batch_size=3)) == []


class CountedPaths(list[Path]):
    """Remembers how many of its items were asked for."""

    asked = 0

    def __getitem__(self, position):
        self.asked += 1
        return super().__getitem__(position)


def test_decoding_ahead_is_bounded(tmp_path):
    paths = CountedPaths([make_images(tmp_path, 2)[1]] * 200)
    reader = batches(paths, size=(12, 20), batch_size=5, prefetch=2, num_threads=4)
    for number in range(1, 6):
        next(reader)
        time.sleep(0.1)  # long enough for the threads to run ahead of their bound
        assert paths.asked <= number * 5 + 2 * 5
    reader.close()
    assert not image_threads()
    assert paths.asked < 40


@pytest.mark.parametrize("how", ["close", "drop", "exception"])
def test_threads_end_with_the_generator(tmp_path, how):
    reader = batches(make_images(tmp_path, 1) * 100, size=(12, 20), batch_size=2)
    next(reader)
    assert image_threads()
    if how == "close":
        reader.close()
    elif how == "drop":
        del reader
    else:
        with pytest.raises(ZeroDivisionError):
            consume(reader)
        del reader
    gc.collect()
    assert not image_threads()


def consume(reader) -> None:
    for _ in reader:
        1 / 0  # noqa: B018
