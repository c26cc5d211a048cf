"""run.json: what it must hold, its models, and the hash of its content."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from explain2me.config.compare import digest
from explain2me.config.fields import Finite, Name, repeated
from explain2me.config.mistakes import explain
from explain2me.errors import RunFolderError
from explain2me.run.schema import SCHEMA_VERSION
from explain2me.text import printable_line, shorten

MOST_BYTES = 16 * 2**20
"""Of run.json; a model takes some 700."""
MOST_VALUES = 300_000
"""Values in run.json; a model has some 20."""
MOST_RUNS = 1000
"""Models of one detector, as many as a config may ask for; a measure of pairs compares each with each."""
MOST_NAME_BYTES = 255
"""Of the name of a folder."""


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """run.json with a hash of its content, which :func:`explain2me.stages.verify.verify_run` compares."""
    return record | {"sha256": record_hash(record)}


def record_hash(record: dict[str, Any]) -> str:
    """Hash of everything in run.json except the hash itself."""
    return digest({key: value for key, value in record.items() if key != "sha256"})


def _file_name(name: str) -> str:
    """The name of a run, which becomes part of file names. It comes from a checkpoint, so that it may hold anything else."""
    if not name or name.startswith(".") or "/" in name or "\0" in name or os.sep in name:
        raise ValueError(f"expected a name without '/' and without a leading dot, got {shorten(repr(name))}")
    return name


DECIDING = ("architecture", "weights_sha256", "layer", "input_size", "num_classes", "mean", "std", "interpolation")
"""Fields of a model that decide its maps. Its names, the place of its file and its seed do not."""
Size = Annotated[int, Field(ge=1, le=2**16)]
Number = Annotated[int, Field(ge=0, lt=2**31)]
PixelNumbers = Annotated[tuple[Annotated[int, Field(ge=-(2**31), lt=2**31)] | Finite, ...], Field(max_length=4)]
"""One number for each channel, as it was written: another form of the same number would name other part files."""
Word = Annotated[str, Field(max_length=4096)]


@dataclass(frozen=True)
class Model:
    """One run (checkpoint) of one detector, as recorded in run.json."""

    detector: Name
    run: Annotated[str, AfterValidator(_file_name)]
    architecture: Word
    checkpoint: Word | None
    seed: Annotated[int, Field(ge=0, lt=2**64)]
    weights_sha256: Word
    layer: Word
    input_size: tuple[Size, Size]
    num_classes: Size
    mean: PixelNumbers
    std: PixelNumbers
    interpolation: Word

    @property
    def deciding(self) -> tuple[Any, ...]:
        """What decides its maps, beside the settings of the run."""
        return tuple(getattr(self, name) for name in DECIDING)

    @property
    def name(self) -> str:
        """``<detector>__<run>``, the folder under maps/."""
        return f"{self.detector}__{self.run}"


class _Trained(BaseModel):
    """How a model was trained: what :func:`explain2me.detectors.cards.trained` returns."""

    model_config = ConfigDict(strict=True)
    loss: Word
    human_maps: Word
    images: str
    start: Word
    epochs: Number
    taken: Number
    val_auroc: float | None
    val_accuracy: float | None


class _Git(BaseModel):
    model_config = ConfigDict(strict=True)
    commit: Word
    changed: bool


class Record(BaseModel):
    """Everything in run.json. Older versions wrote less, and keys of later ones are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)
    config: dict[str, Any]
    classes: Annotated[tuple[Word, ...], Field(min_length=1)]
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    map_sizes: dict[str, tuple[Size, Size]] = {}
    listed: Word = ""
    num_listed: Number = 0
    images_sha256: Word | None = None
    sha256: Word | None = None
    versions: dict[Word, Word] = {}
    later_versions: tuple[dict[Word, Word], ...] = ()
    git: _Git | None = None
    hardware: dict[Word, Word] | None = None
    trained: dict[str, _Trained] = {}

    @model_validator(mode="after")
    def _names_differ_and_are_short(self) -> Self:
        names = [model.name for model in self.models]
        if twice := repeated(names):
            raise ValueError(f"expected different models, got {shorten(repr(twice[0]))} twice")
        if max(Counter(model.detector for model in self.models).values()) > MOST_RUNS:
            raise ValueError(f"expected at most {MOST_RUNS} models of a detector")
        longest = max(names, key=lambda name: len(os.fsencode(name)))
        if len(os.fsencode(f"model={longest}")) > MOST_NAME_BYTES:
            raise ValueError(
                f"expected names of models of at most {MOST_NAME_BYTES} bytes, got {shorten(repr(longest))}"
            )
        if twice := repeated(self.classes):
            raise ValueError(f"expected different classes, got {shorten(repr(twice[0]))} twice")
        if max(model.num_classes for model in self.models) > len(self.classes):
            raise ValueError(f"expected a name for each class of each model, got {len(self.classes)} names")
        return self


def read_record(path: Path) -> tuple[dict[str, Any], Record]:
    """run.json as it is, and checked.

    Raises:
        OSError: there is none, or it cannot be read.
        RunFolderError: what was expected and what came.
    """
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES or data.count(b",") > MOST_VALUES:
        raise wrong_record(path, f"expected at most {MOST_BYTES} bytes and {MOST_VALUES} values")
    try:
        record = json.loads(data.decode())
        if isinstance(record, dict) and record.get("schema") != SCHEMA_VERSION:
            got = shorten(repr(record.get("schema")))
            raise RunFolderError(
                f"{path}: expected schema {SCHEMA_VERSION}, got {got}; open it with the version that wrote it"
            )
        return record, Record.model_validate_json(data)
    except ValidationError as error:
        raise wrong_record(path, explain(error)) from None
    except (ValueError, RecursionError) as error:
        raise wrong_record(path, f"cannot be read: {error}") from None


def wrong_record(path: Path, reason: str) -> RunFolderError:
    """The error for a run.json that is not what was written."""
    return RunFolderError(
        f"{path} is not as it was written: {printable_line(reason, 600)}; put back a copy of it, or start a new run"
    )
