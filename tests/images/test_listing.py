"""x"""

import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from explain2me.images import listing


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
