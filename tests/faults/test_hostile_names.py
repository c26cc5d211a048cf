"""Hostile names of files, labels, sources and detectors come out as text."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image


def picture(side: int = 96, *, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytearray:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return bytearray(buffer.getvalue())


EVIL = (
    '"><img src=x onerror=evil()>',
    "</script><script>evil()</script>",
    "\x1b[2J\x1b]0;evil\x07",
    "\x9b31m\u202egnp",
    "[red]x[/red]",
    "=cmd()|'x'!A1",
    "+1+1",
    "-2+3",
    "@SUM(1)",
    "\t=1",
    "\r\n=1+1",
    "\n=2",
)


def quoted(cells: list[str]) -> str:
    return ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)


def test_hostile_names_come_out_as_text(call, weights, tmp_path):
    """In labels, sources, image ids, file names and the names of detectors: on the terminal and in CSV.

    tests/report follows them into the page.
    """
    lines = ["path,label,source,image_id"]
    for i in range(2 * len(EVIL)):
        name = f"{i} {EVIL[i % len(EVIL)]}.png".replace("/", "|")
        picture(seed=i).save(tmp_path / name)
        lines.append(quoted([name, EVIL[i % 2], f"{EVIL[i % len(EVIL)]}", f"{EVIL[i % len(EVIL)]}{i}"]))
    lines.append(quoted(["missing\x1b[2J\n=1.png", EVIL[0], EVIL[0], "=missing"]))
    (tmp_path / "manifest.csv").write_text("\n".join(lines) + "\n", newline="")
    text = 'name = "evil"\n'
    for i, evil in enumerate(("=cmd()|'x'!A1", "[red]<img src=x onerror=evil()>")):
        text += f"[[detectors]]\nname = {json.dumps(evil)}\narchitecture = 'timm:test_resnet'\ninput_size = 96\n"
        text += f"checkpoints = '{weights}/seed[{i}{i + 1}].safetensors'\n"
    text += f"[data]\nmanifest = 'manifest.csv'\npositive = {json.dumps(EVIL[0])}\nallowed_quarantine = 0.5\n"
    text += "[measures]\nresilience = false\nfocus = false\nnoise = false\n[summary]\nbootstrap = 10\n"
    text += "[report]\nafter_run = false\n[compute]\ndevice = 'cpu'\n"
    (tmp_path / "config.toml").write_text(text)
    results = [call("check", "config.toml"), call("run", "config.toml", "-o", "run")]
    results += [call("show", "run"), call("verify", "run")]
    assert [code for code, _, _ in results] == [0] * 4, results
    for _, output, errors in results:
        assert [char for char in output + errors if not char.isprintable() and char != "\n"] == []
    assert "[red]x[/red]" in results[2][1]
    assert len(pq.read_table(tmp_path / "run/images.parquet")) == 2 * len(EVIL)
    tables = sorted((tmp_path / "run/summary").glob("*.csv"))
    assert len(tables) == 6
    for path in tables:
        assert formulas(path) == []
    assert "'=cmd()|'x'!A1" in (tmp_path / "run/summary/measures.csv").read_text()


def formulas(path: Path) -> list[str]:
    """Cells that a spreadsheet might run: not numbers, and begun, after blanks, as formulas are."""
    import csv

    with path.open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    found = [cell for cell in cells if cell.lstrip()[:1] in ("=", "+", "-", "@")]
    return [cell for cell in found if cell != "-" and not is_number(cell)]


def is_number(text: str) -> bool:
    try:
        float(text.split(" ")[0])
    except ValueError:
        return False
    return "\n" not in text


ODD_NAMES = (b"a\nb.png", b"caf\xe9 \xff.png", b"\\xff.png", b" .png", b"-rf.png", b"\xe2\x80\xae.png", b"'; rm.png")


@pytest.mark.parametrize("how", ["folder", "manifest"])
def test_odd_file_names_work_from_end_to_end(call, write_config, tmp_path, how):
    names = [f"{label}/".encode() + name for label in ("real", "fake") for name in ODD_NAMES]
    for i, name in enumerate(names):
        path = Path(os.fsdecode(bytes(tmp_path) + b"/set/" + name))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.write_bytes(encoded(picture(seed=i), "PNG"))
        except OSError:
            pytest.skip("this file system takes only UTF-8 names")
    if how == "manifest":
        written = [name.decode("utf-8", "backslashreplace") for name in names]
        lines = ["path,label", *(quoted([name, name.partition("/")[0]]) for name in written)]
        (tmp_path / "set/manifest.csv").write_text("\n".join(lines) + "\n", newline="")
    source = "set" if how == "folder" else "set/manifest.csv"
    config = write_config(data=f'manifest = "{source}"', measures="noise = false\nresilience = false\nfocus = false")
    code, output, errors = call("run", config, "-o", "run")
    assert (code, errors) == (0, ""), output
    images = pq.read_table(tmp_path / "run/images.parquet")
    assert len(images) == len(names)
    assert len(set(images["path"].to_pylist())) == len(names)
    scores = pq.read_table(tmp_path / "run/scores")
    entropy = scores.filter([measure == "entropy" for measure in scores["measure"].to_pylist()])
    assert set(entropy["image"].to_pylist()) == set(range(len(names)))
    assert call("verify", "run")[:2] == (0, "whole\n")
