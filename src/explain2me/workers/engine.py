"""Who carries the tasks: this process, processes of this machine, or a Ray cluster."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Engine:
    """Where tasks run; no result depends on it.

    Attributes:
        executor: ``local`` (this process, or several of this machine) or ``ray``.
        workers: processes.
        threads: of torch in each; None: as many as this process has, or cores / workers.
        address: of a Ray cluster; None starts one on this machine.
        gpus: that a Ray worker asks for; 0.5 puts two workers on each.
    """

    executor: Literal["local", "ray"] = "local"
    workers: int = 1
    threads: int | None = None
    address: str | None = None
    gpus: float = 0.0
