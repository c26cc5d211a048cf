"""Run folders from strangers: every file, name and table of a real run changed, then one command on it.

Beside each lies a canary, another run whose bytes must stay: links, names and lists lead there.
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from fuzzing.mutations import BLIND, MOST_CHARACTERS, NUMBERS, Outcome

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "run-1"
COMMANDS = ("show",) * 6 + ("verify",) * 6 + ("measure",) * 5 + ("compact",) * 4 + ("summarise",) * 3 + ("report",)
ABSURD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**70, 10**5000, 0.5, 1e308, float("nan"), float("inf"), "", "a", "..", "."),
    *("../canary", "/", "/etc/passwd", "a/b", "a\\b", "\0", "\n", "\x1b[2J", "x" * 300, "x" * 100_000, "~", "fake", "real", "3x3"),
    *([], {}, [[]], [None], {"": {}}, [1, 2, 3], ["a", "a"], "\U0001f600", "auto", "cuda:7", "ray", "ray://127.0.0.1:1", "bfloat16"),
)  # fmt: skip
ODD_NAMES = (
    ".lock",
    "events.jsonl",
    "events-1-of-2.jsonl",
    ".scores-0123456789abcdef",
    ".tmp-0-0.tmp",
    "index",
    "report",
)
ODD_NAMES += ("report/figures", "report/.written", "precision", "precision/model=a__seed0", "maps/model=a__seed9", "a")
Change = Callable[[Path, Path, random.Random], None]
"""Changes the run at the first path; the canary is at the second."""


def read_run_folder(data: bytes, rng: random.Random, folder: Path) -> Outcome:
    """Change a copy of a run, call a command, and look for tracebacks, long errors, changed canaries and lost memory."""
    place = folder / f"{rng.getrandbits(64):x}"
    shutil.copytree(whole_run(), place / "run")
    shutil.copytree(whole_run(), place / "canary")
    change = rng.choice(CHANGES)
    command = rng.choice(COMMANDS)
    try:
        if rng.random() < 0.2:
            pack(place / "run")
        change(place / "run", place / "canary", rng)
        if rng.random() < 0.2:
            with contextlib.suppress(Exception):  # it may not find what the first has changed
                rng.choice(CHANGES)(place / "run", place / "canary", rng)
        before = contents(place / "canary")
        code, error = call(command, place / "run", rng)
        assert contents(place / "canary") == before, f"{command} after {change.__name__} changed files elsewhere"
        assert sorted(path.name for path in place.iterdir()) == ["canary", "run"]
        assert "out of memory" not in error, error
        assert code in (0, 2), (code, error)
        assert len(error) <= MOST_CHARACTERS, error[:300]
        lines = [line for line in error.splitlines() if "these tables are of earlier scores" not in line]  # a warning
        assert len(lines) <= 1, error
        assert all(line.startswith("explain2me: ") and line.isprintable() for line in lines), error
    except AssertionError:
        raise
    except Exception as error:
        error.add_note(f"{command} after {change.__name__}")
        raise
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return "accepted" if code == 0 else f"{command} refuses"


def call(command: str, run: Path, rng: random.Random) -> tuple[int, str]:
    """Exit code and errors of the command line."""
    from explain2me import cli
    from explain2me.report.write import KINDS

    KINDS.update(dict.fromkeys(KINDS, lambda figure, stream: None))  # the files of figures take most of a report's time
    output, errors = io.StringIO(), io.StringIO()
    arguments = ["explain2me", command, str(run)]
    before = sys.argv
    sys.argv = arguments + (["--set", 'measures.similarity=["pearson"]'] if command == "measure" else []) * rng.randint(
        0, 1
    )
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            cli.main()
    except SystemExit as stop:
        return int(stop.code or 0), errors.getvalue()
    finally:
        sys.argv = before
    return 0, errors.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@cache
def whole_run() -> Path:
    """A run with every kind of file, in a folder that ends with the process."""
    import atexit
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="explain2me-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(GOLDEN, folder / "run")
    (folder / "run/report/figures").mkdir(parents=True)
    for name in ("index.html", "figures/roc.png", "notes.txt"):
        (folder / "run/report" / name).write_text(name)
    (folder / "run/report/.written").write_text("figures/roc.png\nindex.html\n")
    return folder / "run"


def pack(run: Path) -> None:
    from explain2me.run.folder import open_run
    from explain2me.stages.compact import compact_run

    compact_run(open_run(run))


def change_json(run: Path, canary: Path, rng: random.Random) -> None:
    """Other values in run.json, keys deleted and added."""
    path = run / "run.json"
    record = json.loads(path.read_text())
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        node, key = rng.choice(nodes(record))
        how = rng.randrange(8)
        if how == 0:
            del node[key]
        elif how == 1 and isinstance(node, dict):
            node[rng.choice(("x", "..", "", "name", key * 2))] = rng.choice(ABSURD)
        else:
            node[key] = rng.choice((*ABSURD, str(canary), [node[key]] * rng.choice((0, 2, 3000)), {"a": node[key]}))
        if not nodes(record):
            break
    path.write_text(dumps(record), errors="surrogatepass")


def dumps(value: Any) -> str:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value)
    finally:
        sys.set_int_max_str_digits(before)


def change_json_text(run: Path, canary: Path, rng: random.Random) -> None:
    """Text that is nearly JSON: nested, long, doubled keys, changed bytes."""
    path = run / "run.json"
    text = path.read_text()
    key = rng.choice([key for _, key in nodes(json.loads(text)) if isinstance(key, str)])
    inside = rng.choice(
        (
            "[" * 10**5,
            '{"a":' * 10**5,
            "[" * 150 + "]" * 150,
            "[" * 900 + "]" * 900,
            "1" * 5000,
            "[" + "1," * 10**6 + "1]",
            "NaN",
            '"' + "x" * 20000000 + '"',
            "[" + "{}," * 200000 + "{}]",
            '"\\ud800"',
            "1e999",
            "-0",
            "null",
            '"\\u0000"',
        )
    )
    how = rng.randrange(4)
    if how == 0:
        path.write_bytes(blindly(path.read_bytes(), rng))
    elif how == 1:
        path.write_text(text.replace(f'"{key}":', f'"{key}": {inside}, "{key}":', 1))
    elif how == 2:
        path.write_text(text.replace(f'"{key}":', f'"{key}": {inside}, "_":', 1))
    else:
        path.write_text(rng.choice((inside, "", "{}", "[]", "null", "\ufeff" + text, text * 2, text[: len(text) // 2])))


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a tree."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [pair for key, value in items for pair in [(tree, key), *nodes(value)]]


def change_names(run: Path, canary: Path, rng: random.Random) -> None:
    """Names of detectors and runs that lead into the canary."""
    path = run / "run.json"
    record = json.loads(path.read_text())
    up = f"x/../../../canary/{rng.choice(('maps', 'precision'))}/model=a"
    name = rng.choice(
        (up, f"{canary}/maps/model=a", "..", "../a", "a/..", "a\0", "a" * 1000, ".a", "a__b", "a/../a", "")
    )
    for model in record["models"]:
        model[rng.choice(("detector", "detector", "run"))] = name
    record["config"]["detectors"][0]["name"] = rng.choice((name, "a"))
    (run / "maps" / "model=x").mkdir()
    path.write_text(json.dumps(record))


def tables(run: Path) -> list[Path]:
    return sorted(run.rglob("*.parquet"))


def change_bytes(run: Path, canary: Path, rng: random.Random) -> None:
    """Changed bytes of any file, most of them in footers."""
    path = rng.choice([*tables(run) * 3, *(path for path in run.rglob("*") if path.is_file())])
    data = path.read_bytes()
    if path.suffix == ".parquet" and rng.random() < 0.7:
        start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        path.write_bytes(data[:start] + blindly(data[start:], rng))
    else:
        path.write_bytes(blindly(data, rng))


def blindly(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(BLIND)(changed, rng)
        changed = changed or bytearray(b"\0")
    return bytes(changed)


LONG = "x" * 10**6


def change_table(run: Path, canary: Path, rng: random.Random) -> None:
    """Another column, type, row, cell or metadata in a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = rng.choice(tables(run))
    table = pq.read_table(path, partitioning=None)
    names = table.column_names
    i = rng.randrange(len(names))
    metadata = dict(table.schema.metadata or {})
    how = rng.randrange(12)
    if how == 0:
        table = table.remove_column(i)
    elif how == 1:
        table = table.rename_columns(
            [rng.choice(("x", "..", "\0", "x" * 10**6)) if n == i else x for n, x in enumerate(names)]
        )
    elif how == 2:
        other = rng.choice(
            (pa.string(), pa.int64(), pa.float64(), pa.binary(), pa.list_(pa.int8()), pa.null(), pa.int32())
        )
        table = table.set_column(i, names[i], pa.nulls(len(table), other))
    elif how == 3:
        table = table.set_column(i, names[i], pa.nulls(len(table), table.schema.field(i).type))
    elif how == 4:
        table = pa.concat_tables([table.slice(0, rng.choice((0, 1, len(table))))] * rng.choice((1, 2, 300)))
    elif how == 5 and len(table):
        rows = [rng.randrange(len(table)) for _ in range(rng.choice((1, len(table))))]
        table = table.take(rows)
    elif how == 6:
        table = table.select(rng.sample(names, len(names)))
    elif how == 7:
        metadata = rng.choice(({}, {"x": "y" * 10**7}, {f"k{n}": "" for n in range(10_000)}, {b"\xff": b"\xff"}))
    elif how == 8:
        key = rng.choice([*metadata, b"members", b"scores"])
        words = (
            "",
            "3x4",
            "0x0",
            "-3x-3",
            "9" * 5000 + "x1",
            "[" * 10**5,
            "[]",
            '["clean"]',
            "[1]",
            "\0",
            "{}",
            '["clean","clean"]',
        )
        metadata[key] = rng.choice(words).encode()
    elif how == 9:
        table = bomb(table, rng)
    else:
        values = {
            "int": rng.choice((-1, 10**6, 2**31 - 1, -(2**31))),
            "str": rng.choice(("\0", LONG, "..", "a@b", "=1")),
        }
        kind = table.schema.field(i).type
        word = values["str"] if "string" in str(kind) else values["int"] if "int" in str(kind) else None
        if word is not None:
            share = 0.5 if word != LONG else 10 / max(len(table), 1)  # else this script itself would run out of memory
            cells = [word if rng.random() < share else cell for cell in table[names[i]].to_pylist()]
            table = table.set_column(
                i, names[i], pa.array(cells, pa.string() if "string" in str(kind) else kind).cast(kind)
            )
    pq.write_table(table.replace_schema_metadata(metadata), path)


def bomb(table: Any, rng: random.Random) -> Any:
    """A few kilobytes that take gigabytes: many equal rows, or a long text that stands in every row."""
    import pyarrow as pa

    if rng.random() < 0.5:
        one = table.slice(0, 1)
        return pa.table(
            [pa.repeat(one[name][0] if len(one) else None, 1_000_000) for name in one.column_names], one.column_names
        )
    texts = [name for name in table.column_names if "string" in str(table.schema.field(name).type)]
    word = pa.scalar("x" * 30_000_000)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([word]))
    if not texts or not len(table):
        return table
    name = rng.choice(texts)
    return table.take([0] * 1000).set_column(table.column_names.index(name), name, column)


def change_pack(run: Path, canary: Path, rng: random.Random) -> None:
    """Members of packs elsewhere, twice, and not there."""
    import pyarrow.parquet as pq

    packs = [path for path in tables(run) if path.name.startswith("packed-")]
    if not packs:
        pack(run)
        packs = [path for path in tables(run) if path.name.startswith("packed-")]
    path = rng.choice(packs)
    table = pq.read_table(path, partitioning=None)
    members = json.loads(table.schema.metadata[b"members"])
    node, key = rng.choice(nodes(members))
    elsewhere = (f"../../canary/{rng.choice(['images', 'a'])}.parquet", f"{canary}/images.parquet", "../images.parquet")
    node[key] = rng.choice((*ABSURD, *elsewhere, -1, 2**40))
    size = max(1, len(table) // max(1, len(members)))
    pq.write_table(table.replace_schema_metadata({"members": dumps(members)}), path, row_group_size=size)


def put_links(run: Path, canary: Path, rng: random.Random) -> None:
    """A link, pipe, or other kind of file in the place of any file or folder."""
    paths = sorted(run.rglob("*"))
    path = rng.choice([*paths, *(run / name for name in ODD_NAMES)])
    twin = canary / path.relative_to(run)
    if rng.random() < 0.2:
        path, twin = rng.choice(
            [(run / "link", canary), (run / "maps/link", canary / "maps"), (run / "scores/x.parquet", twin)]
        )
    was_folder = path.is_dir()
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not twin.exists():
        twin = rng.choice((canary / "events.jsonl", canary / "report", canary / "scores", canary / "new"))
    how = rng.randrange(8)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.symlink_to(rng.choice((path.name, "nowhere", "/dev/zero", "..", ".")))
    elif how == 2 and path.parent == run and path.name.startswith((".lock", "events")):
        path.hardlink_to(canary / "events.jsonl")
    elif how == 3:
        path.write_text("") if was_folder else path.mkdir()
    else:
        path.symlink_to(twin)


def change_report(run: Path, canary: Path, rng: random.Random) -> None:
    """Lists and names in the report that lead elsewhere."""
    report = run / "report"
    words = (
        "../../canary/run.json\n",
        "../run.json\n../images.parquet\n",
        f"{canary}/run.json\n",
        "\0\n",
        "x" * 10**6,
        "\n" * 10**6,
    )
    (report / ".written").write_bytes(rng.choice((*(word.encode() for word in words), b"\xff\xfe", b"")))
    deep = report / rng.choice(("a\nb", "/".join("d" * rng.choice((2, 100))), "\\xff", "x" * 200))
    deep.mkdir(parents=True, exist_ok=True)
    (deep / "file").write_text("")


def change_sizes(run: Path, canary: Path, rng: random.Random) -> None:
    """Empty files, and files of zeros that are larger than any."""
    path = rng.choice([path for path in run.rglob("*") if path.is_file()])
    os.truncate(path, rng.choice((0, 1, 4, 8, 12, 100, 10**8, 3 * 10**9, rng.choice(NUMBERS) % 2**30)))


CHANGES: tuple[Change, ...] = (change_json,) * 4 + (change_table,) * 4 + (change_bytes,) * 4
CHANGES += (put_links, put_links, put_links, change_names, change_json_text, change_pack, change_report, change_sizes)
