"""run.json: its models, and the hash of its content."""

from dataclasses import dataclass
from typing import Any

from explain2me.config.compare import digest


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """run.json with a hash of its content, which :func:`explain2me.stages.verify.verify_run` compares."""
    return record | {"sha256": record_hash(record)}


def record_hash(record: dict[str, Any]) -> str:
    """Hash of everything in run.json except the hash itself."""
    return digest({key: value for key, value in record.items() if key != "sha256"})


@dataclass(frozen=True)
class Model:
    """One run (checkpoint) of one detector, as recorded in run.json."""

    detector: str
    run: str
    architecture: str
    checkpoint: str | None
    seed: int
    weights_sha256: str
    layer: str
    input_size: tuple[int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    @property
    def name(self) -> str:
        """``<detector>__<run>``, the folder under maps/."""
        return f"{self.detector}__{self.run}"
