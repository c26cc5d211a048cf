"""Write container files for tests, and read what the package makes of them."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from explain2me.errors import ImageError, ManifestError
from explain2me.images.listing import image_root, list_images, resolve
from explain2me.images.reading import read_file


def png(seed: int = 0, side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def features(**kinds: object) -> dict[bytes, bytes]:
    """The schema metadata of datasets."""
    known = {"image": {"_type": "Image"}} | kinds
    return {b"huggingface": json.dumps({"info": {"features": known}}).encode()}


CLASS_LABEL = {"names": ["real", "fake"], "_type": "ClassLabel"}


def image_table(
    images: Sequence[bytes | None],
    columns: Mapping[str, Sequence[object]] = {},
    *,
    paths: Sequence[str | None] = (),
    **kinds: object,
) -> pa.Table:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    given = paths or [f"{i}.png" for i in range(len(images))]
    cells = [{"bytes": image, "path": path} for image, path in zip(images, given, strict=True)]
    table = pa.table({"image": pa.array(cells, kind)} | dict(columns))
    return table.replace_schema_metadata(features(**kinds))


def write_parquet(path: Path, table: pa.Table, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def write_saved(folder: Path, *tables: pa.Table, split: str | None = None, batch_rows: int = 2) -> Path:
    """What Dataset.save_to_disk writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=batch_rows)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))
    return folder


def rows_of(source: Path, **options: object) -> list[dict[str, str | None]]:
    return list_images(source, **options).to_pylist()


def image_bytes(source: Path, path: str) -> bytes:
    return read_file(resolve(image_root(source), path))


def refusal(source: Path, **options: object) -> str:
    with pytest.raises(ManifestError) as caught:
        list_images(source, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert source.name in message
    return message


def kind_of(function: Callable[[], object]) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        function()
    assert caught.value.message.isprintable()
    return caught.value.kind, caught.value.message
