"""The device of a run, and the engine for its shards."""

from typing import Any

import torch

from explain2me.config.schema import ComputeConfig, Config
from explain2me.errors import ConfigError
from explain2me.workers import Engine


def engine_of(compute: ComputeConfig) -> Engine:
    """The engine for the shards of a run."""
    gpus = compute.gpus_per_worker if compute.device.startswith("cuda") else 0.0
    return Engine(compute.executor, compute.workers, compute.threads, compute.ray_address, gpus)


def with_device(config: Config, old: Config | None = None) -> Config:
    """The config with ``auto`` replaced by the kind of device at hand (cuda, mps or cpu), and threads by a number.

    Args:
        config: of the run.
        old: the config that the run began with; its number of threads and batch size stay.
    """
    compute = config.compute
    changes: dict[str, Any] = {"device": real_device(compute.device, "compute.device")}
    if compute.threads is None:
        changes["threads"] = old.compute.threads if old else max(1, torch.get_num_threads() // compute.workers)
    if compute.batch_size == "auto" and old is not None:
        changes["batch_size"] = old.compute.batch_size
    return config.model_copy(update={"compute": compute.model_copy(update=changes)})


def real_device(device: str, key: str) -> str:
    """``auto`` replaced by the kind of device at hand.

    Raises:
        ConfigError: this machine lacks the device; ``key`` is its field in the config, for the message.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{key} = {device!r}: {torch.cuda.device_count() or 'no'} CUDA devices are visible here; use 'auto' or "
            f"'cpu'" + (", or a smaller number" if torch.cuda.device_count() else "")
        )
    if device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"{key} = 'mps': this machine has none; use 'auto' or 'cpu'")
    return device
