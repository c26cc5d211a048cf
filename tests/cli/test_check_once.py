"""`explain2me check` looks at each folder and file once."""

import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

Call = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("kind", ["folder", "manifest", "containers"])
def test_a_check_walks_a_folder_and_reads_a_manifest_once(
    call: Call,
    write_config: Callable[..., Path],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    source = images if kind == "manifest" else tmp_path / "set"
    if kind == "folder":
        for label in ("real", "fake"):
            shutil.copytree(images.parent / label, source / label)
    elif kind == "containers":
        source.mkdir()
        with tarfile.open(source / "a.tar", "w") as tar:
            for label in ("real", "fake"):
                tar.add(images.parent / label, label)
    seen: Counter[str] = Counter()
    scandir, open_file = os.scandir, os.open

    def count_scandir(path: str = ".") -> object:
        seen[os.fspath(path)] += 1
        return scandir(path)

    def count_open(path: str, *arguments: int, **options: int) -> int:
        seen[os.fspath(path)] += 1
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(os, "scandir", count_scandir)
    monkeypatch.setattr(os, "open", count_open)
    assert call("check", write_config(data=f'manifest = "{source}"'))[0] == 0
    visits = {path: count for path, count in seen.items() if path.startswith(str(source))}
    assert visits
    most = 2 if kind == "containers" else 1  # the first walk finds no images
    assert {path: count for path, count in visits.items() if count > most} == {}
