"""`explain2me check` says what would run, and warns of what is odd."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from refused import refused

from explain2me.images import listing

Call = Callable[..., tuple[int, str, str]]


def test_check_says_what_would_run_and_writes_nothing(call: Call, write_config: Callable[..., Path]) -> None:
    config = write_config()
    before = set(config.parent.rglob("*"))
    code, output, _ = call("check", config)
    assert code == 0
    assert "26 images x 16 conditions x 2 models = 832 forward passes on cpu" in output
    assert "real, fake; positive: fake" in output
    assert re.search(r"a seed0: timm:test_resnet, input 96x96, layer .*, maps of 3x3 cells", output)
    assert (
        "warning: the maps of timm:test_resnet have only 3 x 3 cells: they say little of where a model looks" in output
    )
    assert "no file where" not in output
    assert set(config.parent.rglob("*")) == before
    finer = call("check", config, "--set", "detectors.0.input_size=160", "--set", "measures.stability=false")[1]
    assert "maps of 5x5 cells" in finer
    assert "cells: they say little" not in finer


def test_check_looks_for_the_files_of_a_manifest(
    call: Call, write_config: Callable[..., Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = images.read_text().splitlines()
    moved = tmp_path / "moved.csv"  # paths are relative to another folder
    absolute = [f"{images.parent}/{line}" for line in lines[1:]]
    moved.write_text("\n".join([lines[0], *absolute[:-1], lines[-1]]) + "\n")
    config = write_config(data=f'manifest = "{moved}"')
    first = lines[-1].partition(",")[0]
    warning = (
        f"warning: no file where the manifest says it is, for 1 of 26 images, first '{first}': paths are relative to"
    )
    assert warning in call("check", config)[1]
    moved.write_text("\n".join([lines[0], *absolute]) + "\n")
    assert "no file where" not in call("check", config)[1]
    moved.write_text(images.read_text())
    monkeypatch.setattr(listing, "LOOKED_FOR", 5)
    assert "for 5 of 5 images that were looked for (26 in all), first" in call("check", config)[1]


def test_rows_of_all_splits_are_warned_of(
    call: Call, write_config: Callable[..., Path], rewrite_manifest: Callable[..., Path]
) -> None:
    def change(text: str) -> str:
        lines = text.splitlines()
        return "\n".join(line.replace(",test", ",train") if i % 2 == 0 else line for i, line in enumerate(lines))

    output = call("check", write_config(data=f'manifest = "{rewrite_manifest(change)}"'))[1]
    assert "warning: data.split is not set, so the rows of all splits are taken: 'test' (13), 'train' (13)" in output


def test_a_positive_class_without_labels_is_warned_of(
    call: Call, write_config: Callable[..., Path], rewrite_manifest: Callable[..., Path]
) -> None:
    unlabelled = rewrite_manifest(lambda text: text.replace(",label,", ",class,", 1))
    for positive, warned in (('positive = "fake"', True), ("", False)):
        output = call("check", write_config(data=f'manifest = "{unlabelled}"\n{positive}'))[1]
        assert "no labels, so no AUROC" in output
        assert ("data.positive = 'fake' is set, but no image has a label" in output) == warned


def test_labels_that_differ_by_case_are_refused(
    call: Call, write_config: Callable[..., Path], rewrite_manifest: Callable[..., Path]
) -> None:
    mixed = rewrite_manifest(lambda text: text.replace(",real,", ",Real,", 1))
    result = call("check", write_config(data=f'manifest = "{mixed}"'))
    refused(result, "differ by more than case and spaces, got ['Real', 'fake', 'real']")
