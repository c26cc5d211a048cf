"""--verify-hashes: what no decoder notices is found, where the manifest names the hash of every image."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from explain2me.errors import ManifestError
from explain2me.images.decode import decode_image
from explain2me.images.examine import verify_hashes
from explain2me.images.listing import list_images, require_hashes

ENTROPY = "noise = false\nresilience = false\nfocus = false\nstability = false"


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def zeroed(data: bytes) -> bytes:
    """As after a failed copy: a stretch in the middle of the file is zeros."""
    start = len(data) // 2
    return data[:start] + bytes(400) + data[start + 400 :]


@pytest.fixture
def rotten(tmp_path: Path) -> Callable[..., Path]:
    """A folder of 12 JPEG files, the third of which has zeros in it, and its manifest; ``column``: the hashes given."""

    def make(column: str = "all") -> Path:
        lines = ["path,label" + (",sha256" if column != "none" else "")]
        for i in range(12):
            data = jpeg(i)
            (tmp_path / f"{i:02d}.jpg").write_bytes(zeroed(data) if i == 2 else data)
            sha256 = hashlib.sha256(data).hexdigest() if column == "all" or i else ""
            lines.append(f"{i:02d}.jpg,{'fake' if i % 2 else 'real'}" + (f",{sha256}" if column != "none" else ""))
        (tmp_path / "set.csv").write_text("\n".join(lines) + "\n")
        return tmp_path / "set.csv"

    return make


@pytest.fixture
def config(write_config: Callable[..., Path]) -> Path:
    return write_config(data='manifest = "set.csv"\nallowed_quarantine = 0.5', measures=ENTROPY)


def test_zeros_inside_a_jpeg_decode_to_another_picture():
    whole, broken = decode_image(jpeg(2)), decode_image(zeroed(jpeg(2)))
    assert whole.shape == broken.shape
    assert (whole != broken).mean() > 0.1


def test_without_hashes_it_is_scored_and_with_them_quarantined(call, config, rotten, tmp_path):
    rotten("none")
    assert call("run", config, "-o", "blind")[0] == 0
    assert len(pq.read_table(tmp_path / "blind/images.parquet")) == 12
    rotten()
    for command in ("run", "explain"):
        code, _, errors = call(command, config, "-o", command, "--verify-hashes")
        assert (code, errors) == (0, "")
        assert "02.jpg" not in pq.read_table(tmp_path / command / "images.parquet")["path"].to_pylist()
        (row,) = pq.read_table(tmp_path / command / "quarantine").to_pylist()
        assert (row["path"], row["kind"]) == ("02.jpg", "hash_mismatch")


@pytest.mark.parametrize("command", ["check", "run", "explain", "study"])
@pytest.mark.parametrize(
    ("column", "message"),
    [("none", "12 of 12 have none, first '00.jpg'"), ("some", "1 of 12 have none, first '00.jpg'")],
)
def test_every_image_must_have_a_hash(call, config, rotten, tmp_path, command, column, message):
    rotten(column)
    code, _, errors = call(command, config, "--verify-hashes")
    assert code == 2
    assert errors.count("\n") == 1
    assert message in errors
    assert "column 'sha256', 64 digits each, as `sha256sum` prints them" in errors
    assert not (tmp_path / "runs").exists()


def test_the_images_to_train_on_must_have_hashes_too(call, config, rotten, tmp_path):
    rotten()
    (tmp_path / "train.csv").write_text("path,label,split\n00.jpg,real,a\n01.jpg,fake,b\n")
    config.write_text(
        config.read_text()
        + '[training]\narchitectures = ["timm:test_resnet"]\nmanifest = "train.csv"\nsplit = "a"\nvalidation_split = "b"\n'
    )
    for command in ("study", "check"):
        code, _, errors = call(command, config, "--verify-hashes")
        assert code == 2
        assert "train.csv': --verify-hashes needs the sha256 of every image, 1 of 1 have none" in errors


def test_check_reads_every_file_and_says_which_differ(call, config, rotten, tmp_path):
    manifest = rotten()
    assert call("check", config)[0] == 0  # opens no image
    code, _, errors = call("check", config, "--verify-hashes")
    assert code == 2
    first, last = errors.splitlines()
    assert first.startswith("explain2me: 02.jpg: hash_mismatch: '02.jpg': expected the sha256 ")
    assert last == "explain2me: 1 of 12 images are not what the manifest names"
    (tmp_path / "05.jpg").unlink()
    (tmp_path / "07.jpg").write_bytes(b"")
    errors = call("check", config, "--verify-hashes")[2].splitlines()
    assert [line.split(": ")[1:3] for line in errors[:-1]] == [
        ["02.jpg", "hash_mismatch"],
        ["05.jpg", "missing"],
        ["07.jpg", "empty"],
    ]
    for i in (2, 5, 7):
        (tmp_path / f"{i:02d}.jpg").write_bytes(jpeg(i))
    code, output, errors = call("check", config, "--verify-hashes")
    assert (code, errors) == (0, "")
    assert "12 images have the bytes that the manifest names" in output
    assert manifest.exists()


def test_many_files_that_differ_are_counted(call, config, tmp_path):
    lines = ["path,label,sha256"]
    lines += [f"{i:02d}\x1b[2J.jpg,{'fake' if i % 2 else 'real'},{'0' * 64}" for i in range(33)]
    (tmp_path / "set.csv").write_text("\n".join(lines) + "\n")
    code, _, errors = call("check", config, "--verify-hashes")
    assert code == 2
    assert "\x1b" not in errors
    said = errors.splitlines()
    assert len(said) == 22
    assert said[20:] == ["explain2me: and 13 more", "explain2me: 33 of 33 images are not what the manifest names"]


def test_a_folder_has_no_hashes(rotten, tmp_path):
    rotten()
    with pytest.raises(ManifestError, match="needs the sha256 of every image, 12 of 12 have none"):
        require_hashes(list_images(tmp_path), tmp_path)


def test_hashes_of_files_that_are_no_images_are_compared_too(tmp_path):
    (tmp_path / "text.jpg").write_bytes(b"text")
    sha256 = hashlib.sha256(b"text").hexdigest()
    (tmp_path / "set.csv").write_text(f"path,sha256\ntext.jpg,{sha256}\n")
    table = list_images(tmp_path / "set.csv")
    done: list[int] = []
    assert len(verify_hashes(table, tmp_path, on_done=done.append)) == 0
    assert done == [1]
