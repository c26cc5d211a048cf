"""Files made to do harm, given to the command line: each is refused in one line, and none is executed."""

import io
import json
import os
import pickle
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

Call = Callable[..., tuple[int, str, str]]
State = dict[str, torch.Tensor]
SECONDS = 20
"""Enough for any refusal on a machine that does other things as well; what is refused would take minutes."""


def refused(result: tuple[int, str, str], message: str = "") -> None:
    """Exit code 2 and one line of bearable length without control characters."""
    code, _, errors = result
    assert code == 2, errors
    assert errors.startswith("explain2me: ")
    assert errors.count("\n") == 1
    assert len(errors) < 3000
    assert errors[:-1].isprintable()
    assert message in errors


# -------------------------------------------------------------------------------------------------- weights with code


class Runs:
    """Pickled, it is a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def saved(tree: object, *, new: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def with_member(data: bytes, name: str, body: bytes, *, keep: bool = False) -> bytes:
    """The same zip with one member replaced, or (``keep``) with a second one of its name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.namelist():
            if keep or not member.endswith(name):
                new.writestr(member, old.read(member))
            if member.endswith(name):
                new.writestr(zipfile.ZipInfo(member), body)
    return buffer.getvalue()


def hub(canary: Path) -> Runs:
    """A call of torch.hub.load for a folder: its hubconf.py is run."""
    folder = canary.parent / "hub"
    folder.mkdir(exist_ok=True)
    (folder / "hubconf.py").write_text(f"import os\nos.mkdir({str(canary)!r})\ndef entry():\n    return None\n")
    return Runs(run_hub, str(folder))


def run_hub(folder: str) -> object:
    return torch.hub.load(folder, "entry", source="local", trust_repo=True)


def touch(canary: Path) -> Runs:
    return Runs(os.system, f"touch {canary}")


def written_by_hand(canary: Path) -> bytes:
    return f"cos\nmkdir\n(V{canary}\ntR.".encode()


CODE: dict[str, tuple[str, Callable[[Path, State], bytes]]] = {
    "os.system": ("w.pt", lambda canary, state: saved({"state_dict": touch(canary)})),
    "exec": ("w.pth", lambda canary, state: saved(Runs(exec, f"import os; os.mkdir({str(canary)!r})"))),
    "beside good weights": ("w.pth", lambda canary, state: saved({"state_dict": state, "optimizer": touch(canary)})),
    "instead of a weight": ("w.pth", lambda canary, state: saved(state | {"fc.bias": touch(canary)})),
    "plain pickle": ("w.pkl", lambda canary, state: pickle.dumps(touch(canary))),
    "pickle of protocol 0": ("w.pkl", lambda canary, state: pickle.dumps(touch(canary), protocol=0)),
    "written by hand": ("w.bin", lambda canary, state: written_by_hand(canary)),
    "legacy": ("w.pth", lambda canary, state: saved({"state_dict": touch(canary)}, new=False)),
    "data.pkl replaced": (
        "w.pth", lambda canary, state: with_member(saved(state), "/data.pkl", pickle.dumps(touch(canary), protocol=2))
    ),
    "named .safetensors": ("w.safetensors", lambda canary, state: saved(touch(canary))),
    "torch.hub": ("w.pt", lambda canary, state: saved(hub(canary))),
    "a folder is made": ("w.pt", lambda canary, state: saved(Runs(os.mkdir, str(canary)))),
    "import": ("w.pt", lambda canary, state: saved(Runs(eval, f"__import__('pathlib').Path({str(canary)!r}).touch()"))),
    "a whole model": ("w.pt", lambda canary, state: saved({"model": torch.nn.Linear(2, 2), "then": touch(canary)})),
}  # fmt: skip


@pytest.fixture
def state(weights: Path) -> State:
    return load_file(weights / "seed0.safetensors")


@pytest.fixture
def check_weights(call: Call, write_config: Callable[..., Path], detector_table: Callable[..., str], tmp_path: Path):
    """`explain2me check` of one detector with these weights: (name, bytes) -> exit code, output, errors."""

    def check(name: str, data: bytes) -> tuple[int, str, str]:
        (tmp_path / name).write_bytes(data)
        table = detector_table("a", str(tmp_path / name))
        return call("check", write_config(detectors=table, measures="stability = false"))

    return check


def test_good_weights_pass(check_weights, state):
    assert check_weights("w.pth", saved(state))[0] == 0
    assert (
        check_weights("w2.pth", with_member(saved(state), "/nothing", b""))[0] == 0
    )  # the zips made here are in order


@pytest.mark.parametrize("name", CODE)
def test_code_in_weights_is_refused_and_never_run(check_weights, state, tmp_path, name):
    canary = tmp_path / "canary"
    file_name, make = CODE[name]
    data = make(canary, state)
    assert not canary.exists()
    refused(check_weights(file_name, data), "w.")
    assert not canary.exists()
    if name == "written by hand" or file_name.endswith(".pkl"):  # who trusts such a file runs it
        pickle.loads(data)
    else:
        torch.load(io.BytesIO(data), weights_only=False)
    assert canary.exists()


# ------------------------------------------------------------------------------------- weights that are not in order


def safetensors(change: Callable[[dict[str, Any]], object]) -> Callable[[State], bytes]:
    """A file whose header was changed."""

    def make(state: State) -> bytes:
        data = save(state)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        return with_header(json.dumps(header).encode(), data[8 + size :])

    return make


def with_header(header: bytes, body: bytes = b"", *, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def repeated(state: State) -> bytes:
    data = save(state)
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip()
    return with_header(header[:-1] + b"," + header[1:], data[8 + size :])


def bomb(state: State) -> bytes:
    """200 MB of zeros where a weight should be, in 1 MB."""
    data = saved(state)
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for member in old.namelist():
            with new.open(member, "w") as file:
                for _ in range(20 if member.endswith("/data/0") else 0):
                    file.write(bytes(10**7))
                file.write(old.read(member))
    return buffer.getvalue()


DAMAGED: dict[str, tuple[str, Callable[[State], bytes], str]] = {
    "header longer than the file": (
        "w.safetensors", lambda state: with_header(b"{}", length=2**62), "is not a valid safetensors file"
    ),
    "header of 100 MB, by its length": (
        "w.safetensors", lambda state: with_header(b"{}", length=10**8), "is not a valid safetensors file"
    ),
    "header is no JSON": ("w.safetensors", lambda state: with_header(b"{not json"), "is not a valid safetensors file"),
    "header nested": ("w.pt", lambda state: with_header(b'{"a":' * 10**5), "is not a valid safetensors file"),
    "offsets overlap": (
        "w.safetensors",
        safetensors(lambda header: header["fc.bias"].update(data_offsets=header["fc.weight"]["data_offsets"])),
        "is not a valid safetensors file",
    ),
    "offsets beyond the end": (
        "w.safetensors",
        safetensors(lambda header: header["fc.bias"].update(data_offsets=[2**40, 2**40 + 8])),
        "is not a valid safetensors file",
    ),
    "offsets backwards": (
        "w.safetensors",
        safetensors(lambda header: header["fc.bias"].update(data_offsets=header["fc.bias"]["data_offsets"][::-1])),
        "is not a valid safetensors file",
    ),
    "shape of 2^64": (
        "w.safetensors", safetensors(lambda header: header["fc.bias"].update(shape=[2**33, 2**33])), "safetensors file"
    ),
    "another type": (
        "w.safetensors", safetensors(lambda header: header["fc.bias"].update(dtype="I32")), "must hold floating point"
    ),
    "unknown type": (
        "w.safetensors", safetensors(lambda header: header["fc.bias"].update(dtype="F31")), "safetensors file"
    ),
    "every name twice": ("w.safetensors", repeated, "safetensors file"),
    "names of a megabyte": (
        "w.safetensors",
        safetensors(lambda header: header.update({"\x1b[2J" * 10**5: header.pop("fc.bias")})),
        "1 of 92 weights are missing ('fc.bias') and 1 are unknown",
    ),
    "zip bomb": ("w.pth", bomb, "would unpack to 20"),
    "two members of one name": (
        "w.pth", lambda state: with_member(saved(state), "/data.pkl", b"N.", keep=True), "two members of one name"
    ),
    "holds itself": (
        "w.pth", lambda state: b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dictq\x01h\x00s.", "checkpoint"
    ),
    "a billion classes": (
        "w.pth",
        lambda state: saved(state | {"fc.weight": torch.zeros(1).as_strided((10**9, 96), (0, 0))}),
        "larger than the file",
    ),
    "cut off": ("w.pth", lambda state: saved(state)[:-200], "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_damaged_weights_are_refused(check_weights, state, name):
    file_name, make, message = DAMAGED[name]
    data = make(state)
    started = time.monotonic()
    refused(check_weights(file_name, data), message)
    assert time.monotonic() - started < SECONDS


# -------------------------------------------------------------------------------------------------------------- images


def picture(side: int = 96, *, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytearray:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return bytearray(buffer.getvalue())


def png_bomb() -> bytes:
    """60,000 x 60,000 pixels of one bit."""
    packer = zlib.compressobj(9)
    first, again = (packer.compress(bytes(7501 * 1000)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    body = first + again * 59 + packer.flush()
    chunks = (b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")
    written = [struct.pack(">I", len(b)) + name + b + struct.pack(">I", zlib.crc32(name + b)) for name, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def gif_bomb() -> bytes:
    data = encoded(picture().quantize(4), "GIF")
    data[6:10] = struct.pack("<HH", 65_535, 65_535)
    return bytes(data)


def webp_bomb() -> bytes:
    data = encoded(picture(), "WEBP", lossless=True)
    start = data.index(b"VP8L") + 9
    data[start : start + 4] = struct.pack("<I", 16_382 | 16_382 << 14)
    return bytes(data)


def tiff_bomb() -> bytes:
    data = encoded(picture(), "TIFF", compression="tiff_adobe_deflate")
    for tag in (256, 257):  # ImageWidth, ImageLength
        entry = next(
            i for i in range(len(data)) if struct.unpack_from("<H", data, i)[0] == tag and data[i + 2] in (3, 4)
        )
        struct.pack_into("<HI", data, entry + 2, 4, 1)
        struct.pack_into("<I", data, entry + 8, 60_000)
    return bytes(data)


def jpeg_of_scans() -> bytes:
    """A progressive photograph whose last scan is repeated: each repetition costs a pass over 49 million pixels."""
    data = encoded(Image.new("L", (7000, 7000)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return bytes(data[:-2] + data[last:-2] * 3000 + data[-2:])


BOMBS = {
    "PNG": (png_bomb, "pixels"),
    "GIF": (gif_bomb, "pixels"),
    "WebP": (webp_bomb, "pixels"),
    "TIFF": (tiff_bomb, "pixels"),
    "JPEG of 3,000 scans": (jpeg_of_scans, "more than 100 scans"),
    "a zip": (lambda: b"PK\3\4" + bytes(1000), "archive is not read"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_go_off(call, write_config, tmp_path, name):
    make, message = BOMBS[name]
    data = make()
    assert len(data) < 2_000_000
    for label in ("real", "fake"):
        (tmp_path / f"{label}.png").write_bytes(data)
    (tmp_path / "bombs.csv").write_text("path,label\nreal.png,real\nfake.png,fake\n")
    started = time.monotonic()
    refused(call("run", write_config(data='manifest = "bombs.csv"'), "-o", "run"), message)
    assert time.monotonic() - started < SECONDS


def test_a_photograph_of_many_pictures_has_few_scans(tmp_path):
    """Only those of the picture that is taken count."""
    from explain2me.images.decode import MAX_SCANS, decode_image

    pages = [picture(16, seed=i) for i in range(30)]
    data = encoded(pages[0], "MPO", save_all=True, append_images=pages[1:], progressive=True)
    assert data.count(b"\xff\xda") > MAX_SCANS
    assert decode_image(bytes(data)).shape == (16, 16, 3)


# ------------------------------------------------------------------------------------------------------------- configs

ABSURD = {
    "seed of 5,000 digits": ("--set", "seed=" + "9" * 5000),
    "seed of 24,000 bits": ("--set", "seed=0x" + "f" * 6000),
    "batches of 10^15": ("--set", "compute.batch_size=1000000000000000"),
    "images of a million pixels a side": ("--set", "detectors.0.input_size=1000000"),
    "images without pixels": ("--set", "detectors.0.input_size=[0,0]"),
    "images too small for the network": ("--set", "detectors.0.input_size=8"),
    "10^18 images of each source": ("--set", "data.sample=1000000000000000000"),
    "brackets": ("--set", "measures.noise=" + "[" * 10_000),
    "nested": ("--set", "measures.noise=" + "[" * 40 + "]" * 40),
    "endless key": ("--set", "a." * 100_000 + "a=1"),
    "NUL": ("--set", 'data.manifest="a\\u0000.csv"'),
    "device that does not exist": ("--set", "compute.device=cuda:99999999999999999999"),
    "weights from a device": ("--set", "detectors.0.checkpoints=/dev/zero"),
    "escape sequences": ("--set", 'salience.target="\\u001b[2J\\u009b31m"'),
    "markup": ("--set", "compute.device=[red]x[/red]"),
    "code to import": ("--set", "detectors.0.architecture=os:system"),
    "a pattern without end": ("--set", "detectors.0.checkpoints=" + "*" * 5000),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_settings_are_refused(call, write_config, name):
    started = time.monotonic()
    refused(call("check", write_config(), *ABSURD[name]))
    assert time.monotonic() - started < SECONDS


@pytest.mark.parametrize(
    "text",
    [b"\xff\xfe", b"[" * 10**5, b"a." * 10**4 + b"a = 1", b"x = " + b"9" * 10**5, b"\0", b"x = 1\n" * 10**6, b""],
    ids=["UTF-16", "brackets", "endless key", "endless number", "NUL", "too large", "empty"],
)
def test_absurd_files_are_refused(call, tmp_path, text):
    (tmp_path / "config.toml").write_bytes(text)
    refused(call("check", "config.toml"))


@pytest.mark.parametrize("architecture", ["torchvision:densenet121", "torchvision:vit_b_16"])
def test_a_size_that_a_network_cannot_take_is_one_line(call, write_config, architecture):
    table = f'[[detectors]]\nname = "a"\narchitecture = "{architecture}"\nrandom_runs = 2\ninput_size = 17\n'
    refused(call("check", write_config(detectors=table)), "17")


# --------------------------------------------------------------------------------------------------------------- names

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
