"""Workers on a Ray cluster: one actor each, which keeps its model warm. Ray Core only; needs the extra ``ray``."""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch

from explain2me.errors import ConfigError
from explain2me.workers.engine import Engine
from explain2me.workers.local import WorkerDied, listening


class RayWorker:
    """An actor, started again after it died. Not thread-safe: one task at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._actor: Any = None
        self._killed = False
        self._lock = threading.Lock()

    def run(self, work: Callable[[Any], None], task: object, on_progress: Callable[[int, float], None]) -> None:
        """Do one task and wait for it; its progress is reported when it is done.

        Raises:
            WorkerDied: the actor or its node ended; the next call starts another.
            Exception: whatever the task raised.
        """
        import ray

        with self._lock:
            if self._killed:
                raise WorkerDied
            if self._actor is None:
                actor = ray.remote(num_cpus=1, num_gpus=self._engine.gpus, max_restarts=0)(_Actor)
                self._actor = actor.remote(self._engine.threads)
        try:
            reports, error = ray.get(self._actor.run.remote(work, task))
        except ray.exceptions.RayTaskError:  # our own bug
            raise
        except ray.exceptions.RayError:  # the actor, its node or the memory
            self._actor = None
            raise WorkerDied from None
        for report in reports:
            on_progress(*report)
        if error is not None:
            raise error

    def kill(self) -> None:
        """End the actor at once; may be called from another thread."""
        import ray

        with self._lock:
            self._killed = True
            if self._actor is not None and ray.is_initialized():
                ray.kill(self._actor)

    def close(self) -> None:
        """Do nothing: the cluster stays until the process ends."""


class _Actor:
    """The part of a worker that runs in the cluster."""

    def __init__(self, threads: int | None) -> None:
        if threads:
            torch.set_num_threads(threads)

    def run(
        self, work: Callable[[Any], None], task: object
    ) -> tuple[list[tuple[int, float]], Exception | None]:  # Ray would wrap an exception in one of its own
        reports: list[tuple[int, float]] = []
        try:
            with listening(lambda *report: reports.append(report)):
                work(task)
        except Exception as error:
            return reports, error
        return reports, None


def open_workers(engine: Engine) -> list[RayWorker]:
    """Connect to the cluster, or start one on this machine, without usage statistics.

    Raises:
        ConfigError: Ray is not installed, or the cluster cannot be reached.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ModuleNotFoundError:
        raise ConfigError(
            "compute.executor = 'ray' needs Ray, which is not installed; install it (`pip install ray`), or use 'local'"
        ) from None
    if not ray.is_initialized():
        here: dict[str, Any] = {"address": "local", "num_cpus": engine.workers, "include_dashboard": False}
        where = {"address": engine.address} if engine.address else here
        try:
            ray.init(**where, logging_level=logging.ERROR, log_to_driver=False, configure_logging=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"compute.ray_address: expected the address of a Ray cluster, got {engine.address!r}: "
                f"{str(error).splitlines()[0]}; start one with `ray start --head`, or leave the address out"
            ) from None
    _check_room(engine, ray.cluster_resources())  # type: ignore[no-untyped-call]
    return [RayWorker(engine) for _ in range(engine.workers)]


def _check_room(engine: Engine, there: Mapping[str, float]) -> None:
    """Raise if the cluster is too small: a worker without room would wait for ever."""
    for name, each, other in (("CPU", 1.0, ""), ("GPU", engine.gpus, ", or a smaller compute.gpus_per_worker")):
        needed, has = each * engine.workers, there.get(name, 0.0)
        if needed > has + 1e-6:
            raise ConfigError(
                f"workers = {engine.workers} need {needed:g} {name}s of the Ray cluster, which has {has:g}; use at most "
                f"{int(has / each + 1e-6)} workers{other}. A cluster that grows must have grown before"
            )
