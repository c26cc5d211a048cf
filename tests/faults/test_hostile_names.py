"""Hostile names of files, labels, sources and detectors come out as text."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from explain2me import open_run
from explain2me.detectors.runs import MOST_NAME_BYTES
from explain2me.run.plan import plan


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


FEW_MEASURES = "noise = false\nresilience = false\nfocus = false"


def write_set(folder: Path, names: list[bytes]) -> Path:
    """An image of each name, as bytes below the folder."""
    for i, name in enumerate(names):
        path = Path(os.fsdecode(bytes(folder) + b"/" + name))
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed=i).save(path)
    return folder


def copied_weights(weights: Path, folder: Path, stems: list[str]) -> str:
    """Checkpoints with these names; returns the pattern that matches them."""
    folder.mkdir()
    for i, stem in enumerate(stems):
        shutil.copy(weights / f"seed{i}.safetensors", folder / f"{stem}.pt")
    return f"{folder}/*.pt"


def test_the_longest_names_that_check_passes_run_writes(call, write_config, detector_table, weights, tmp_path):
    """Of images and folders 255 bytes; of detectors, runs and checkpoints as many as the longest file name leaves."""
    names = [
        label + b"/" + b"s" * 255 + b"/%d" % i + b"n" * 250 + b".png" for label in (b"real", b"fake") for i in range(3)
    ]
    euro, name = "\N{EURO SIGN}", "x" + 99 * "\N{POUND SIGN}"
    stems = [f"{i}".ljust(MOST_NAME_BYTES - len(f"{name}__".encode()), "w") for i in range(2)]
    pattern = copied_weights(weights, tmp_path / "weights", stems)
    tables = {"data": f'manifest = "{write_set(tmp_path / "set", names)}"', "measures": FEW_MEASURES}
    config = write_config(
        top=f'name = "{66 * euro}"\nseed = 7', detectors=detector_table(name, pattern), report="images = 1", **tables
    )
    for command in ("check", "run"):
        code, output, errors = call(command, config)
        assert (code, errors) == (0, ""), output
    longest = max(len(os.fsencode(f"explain-{shard.title}")) for shard in plan(open_run(f"runs/{66 * euro}")))
    assert longest == 255
    (tmp_path / "weights" / f"{stems[0]}.pt").rename(tmp_path / "weights" / f"{stems[0]}w.pt")
    for command in ("check", "run"):
        code, _, errors = call(command, config, "--out", "another")
        assert code == 2
        assert "at most 211 bytes" in errors
        assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "stem", "message"),
    [
        (f'name = "{67 * chr(0x20AC)}"', "w", "name: expected at most 200 bytes"),
        ('name = "tiny"', "w\udce9", "expected a path in UTF-8, got"),
    ],
    ids=["run", "checkpoint"],
)
def test_check_refuses_names_that_run_could_not_write(
    text, stem, message, call, write_config, detector_table, weights, tmp_path
):
    try:
        pattern = copied_weights(weights, tmp_path / "weights", [stem, "v"])
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    config = write_config(top=text, detectors=detector_table("a", pattern))
    for command in ("check", "run"):
        code, _, errors = call(command, config)
        assert code == 2
        assert message in errors
        assert errors.count("\n") == 1


def test_odd_names_of_checkpoints_and_thin_images_pass_check_and_run(
    call, write_config, detector_table, weights, tmp_path, no_pdf
):
    """An image of one pixel by 20,000 goes to the quarantine; one of 8 by 20,000 is used."""
    odd = ["a\nb", "-y 'x' \"q\" %s $(z) `w`"]
    pattern = copied_weights(weights, tmp_path / "weights", odd)
    folder = write_set(tmp_path / "set", [f"{label}/{source}/%s.png".encode() for label in odd for source in odd])
    sizes = {"thin": (1, 20_000), "flat": (20_000, 1), "strip": (8, 20_000), "band": (20_000, 8)}
    for name, size in sizes.items():
        Image.new("RGB", size, (200, 90, 30)).save(folder / odd[0] / odd[0] / f"{name}.png")
    data = f'manifest = "{folder}"\npositive = {json.dumps(odd[0])}\nallowed_quarantine = 0.3'
    tables = {"data": data, "measures": FEW_MEASURES, "report": "images = 1"}
    config = write_config(detectors=detector_table("-a%s 'q'", pattern), **tables)
    for command in ("check", "run"):
        code, output, errors = call(command, config)
        assert (code, errors) == (0, ""), output
    run = open_run("runs/tiny")
    assert [model.run for model in run.models] == ["-y 'x' \"q\" %s $(z) `w`", "a\nb"]
    assert {row["path"].rpartition("/")[2]: row["kind"] for row in run.quarantine().to_pylist()} == {
        "thin.png": "too_small",
        "flat.png": "too_small",
    }
    assert len(run.image_table) == 6
