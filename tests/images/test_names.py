"""Names that look the same, and pictures that are there twice."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pictures import write_manifest

from explain2me import open_run
from explain2me.errors import ManifestError
from explain2me.images.listing import list_images

Call = Callable[..., tuple[int, str, str]]
NFC, NFD = "r\u00e9al", "re\u0301al"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (NFC, NFD),
        ("real", "real\u200b"),
        ("real", "real "),
        ("real", "real\u00a0"),
        ("real", "\ufeffreal"),
        ("a b", "a  b"),
    ],
)
@pytest.mark.parametrize("column", ["label", "source"])
def test_names_that_look_the_same_are_refused(tmp_path: Path, column: str, first: str, second: str) -> None:
    lines = f'path,{column}\na.png,"{first}"\nb.png,"{second}"\nc.png,fake\n'
    with pytest.raises(
        ManifestError, match=f"the {column}s '.*' and '.*' look the same but count as two; write one"
    ) as caught:
        list_images(write_manifest(tmp_path, lines))
    assert str(caught.value).isascii()


def test_folders_that_look_the_same_are_refused(tmp_path: Path) -> None:
    for name in ("real", "real\u200b", "fake"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").touch()
    with pytest.raises(ManifestError, match="look the same but count as two"):
        list_images(tmp_path)


def test_names_that_look_different_are_taken(tmp_path: Path) -> None:
    names = ["real", "Real", "real2", "ré al", "nan", "None", "0", "0.0"]
    lines = "path,label\n" + "".join(f"{i}.png,{name}\n" for i, name in enumerate(names))
    assert list_images(write_manifest(tmp_path, lines))["label"].to_pylist() == names


def other_path(manifest: Path, way: str) -> str:
    """Another path of the first real image."""
    folder = manifest.parent / "real" / "camera"
    first, again = folder / "000.png", folder / "again.png"
    if way == "absolute":
        return str(first)
    if way == "folder link":
        (manifest.parent / "linked").symlink_to(manifest.parent / "real")
        return "linked/camera/000.png"
    {"link": again.symlink_to, "hard link": again.hardlink_to}.get(way, lambda path: shutil.copy(path, again))(first)
    return "real/camera/again.png"


@pytest.mark.parametrize("way", ["absolute", "folder link", "link", "hard link", "copy"])
def test_a_picture_that_is_there_twice_is_reported(
    tmp_path: Path, make_images: Callable[..., Path], write_config: Callable[..., Path], call: Call, way: str
) -> None:
    manifest = make_images(tmp_path / "images", counts={("real", "camera"): 3, ("fake", "gan"): 3})
    path = other_path(manifest, way)
    with manifest.open("a") as file:
        file.write(f"{path},real,camera,test\n")
    measures = "noise = false\nresilience = false\nfocus = false"
    config = write_config(data=f'manifest = "{manifest}"', measures=measures, report="images = 1")
    code, output, errors = call("run", config)
    assert (code, errors) == (0, "")
    said = " ".join(output.split())
    assert said.count("1 image is a copy of another one, byte for byte, first ") == 2  # a warning and a finding
    assert Path(path).name in said
    assert len(open_run("runs/tiny").image_table) == 7


def test_a_picture_with_two_labels_is_refused(
    tmp_path: Path, make_images: Callable[..., Path], write_config: Callable[..., Path], call: Call
) -> None:
    manifest = make_images(tmp_path / "images", counts={("real", "camera"): 3, ("fake", "gan"): 3})
    shutil.copy(manifest.parent / "real/camera/000.png", manifest.parent / "copy.png")
    with manifest.open("a") as file:
        file.write("copy.png,fake,gan,test\n")
    code, _, errors = call("run", write_config(data=f'manifest = "{manifest}"'))
    assert (code, errors.count("\n")) == (2, 1)
    assert (
        "'copy.png' and 'real/camera/000.png' are the same picture with the labels 'fake' and 'real'; keep the right"
        in errors
    )
    assert not Path("runs/tiny/run.json").exists()
    manifest.write_text(manifest.read_text().replace("copy.png,fake,gan,test\n", ""))
    assert call("explain", write_config(data=f'manifest = "{manifest}"'))[0] == 0
