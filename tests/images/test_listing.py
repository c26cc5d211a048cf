"""Labels that are known, files that are there, and the real faces."""

import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pictures import write_manifest
from PIL import Image

from explain2me.errors import ManifestError
from explain2me.images import listing
from explain2me.images.batches import batches
from explain2me.images.examine import index_images
from explain2me.images.listing import check_labels, list_images, list_source, resolve

FACES = Path(__file__).resolve().parents[2] / "../shared/data/faces"


needs_faces = pytest.mark.skipif(not FACES.is_dir(), reason="the shared face photographs are not beside the repository")


def test_unknown_label(tmp_path):
    table = list_images(write_manifest(tmp_path, "path,label\na.jpg,real\nb.jpg,fak\nc.jpg,fak\nd.jpg,x\n"))
    with pytest.raises(ManifestError) as caught:
        check_labels(table, ["real", "fake"])
    assert str(caught.value) == (
        "expected labels among the classes ['fake', 'real'], got the label 'fak' in 2 row(s), "
        "first for the path 'b.jpg'; did you mean 'fake'? (unknown as well: ['x'])"
    )
    check_labels(table, ["real", "fak", "x"])
    check_labels(list_images(write_manifest(tmp_path, "path\na.jpg\n")), ["real"])


@needs_faces
def test_real_faces():
    table = list_images(FACES / "manifest.csv", split="test")
    check_labels(table, ["real", "fake"])
    some = table.take(list(range(0, table.num_rows, 8)))
    usable, quarantine = index_images(some, FACES)
    assert usable.num_rows == some.num_rows
    assert quarantine.num_rows == 0
    paths = [resolve(FACES, path) for path in usable["path"].to_pylist()]
    images = torch.cat([batch.images for batch in batches(paths, size=(224, 224), batch_size=16)])
    for path, image in list(zip(paths, images, strict=True))[::10]:
        with Image.open(path) as original:
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(original.convert("RGB")))


@needs_faces
def test_folder_of_real_faces_has_the_labels_of_its_manifest():
    manifest = list_images(FACES / "manifest.csv")
    folder = list_images(FACES)
    assert folder.equals(manifest)
    assert list_source(FACES).num_ignored == 1


def test_files_are_looked_for_all_over_a_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "LOOKED_FOR", 3)
    (tmp_path / "0.png").touch()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "0.png", "0.png")
    images = pa.table({"path": ["0.png", "x.png", "0.png", "y.png", "a.tar/0.png", "z.png"]})
    (tmp_path / "manifest.csv").touch()
    assert listing.missing_files(tmp_path / "manifest.csv", images) == ([], 3)
    others = pa.table({"path": ["0.png", "x.png", "0.png", "x.png", "y.png", "x.png"]})
    assert listing.missing_files(tmp_path / "manifest.csv", others) == (["y.png"], 3)
    assert listing.missing_files(tmp_path, images) == ([], 0)
