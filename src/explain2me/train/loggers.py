"""Lightning's loggers of the metrics of a training, beside its CSV file; they continue after an interrupt."""

import contextlib
import functools
import importlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.utilities.rank_zero import rank_zero_only

from explain2me.errors import ConfigError
from explain2me.run.files import write_json

KNOWN = "loggers.json"
"""Under which names the services know this training."""


@contextlib.contextmanager
def open_loggers(
    kinds: tuple[str, ...], folder: Path, *, project: str, name: str, settings: Mapping[str, Any], continues: bool
) -> Iterator[list[Logger]]:
    """The loggers of a training; after an interrupt they continue the run that they had begun.

    Args:
        kinds: of ``tensorboard``, ``wandb`` and ``mlflow``.
        folder: of the training. TensorBoard and W&B write in it. MLflow writes where ``MLFLOW_TRACKING_URI`` says,
            otherwise to ``mlflow.db`` in the folder of the study, three above, which its trainings share.
        project: the trainings to be shown together, unless ``WANDB_PROJECT`` or ``MLFLOW_EXPERIMENT_NAME`` say otherwise.
        name: of the training.
        settings: the hyperparameters, nested or flat.
        continues: whether to continue the run that these loggers have begun, if any; otherwise they begin a new one.

    Raises:
        ConfigError: a logger is not installed, or does not start.
    """
    if not continues:
        (folder / KNOWN).unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    known: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError):
        known = json.loads((folder / KNOWN).read_text(encoding="utf-8"))
    with contextlib.ExitStack() as stack:
        # Lightning's loggers write in the process of rank 0 only, and take the rank of a SLURM task for that of a process.
        stack.callback(setattr, rank_zero_only, "rank", getattr(rank_zero_only, "rank", None))
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
        made = []
        for kind in kinds:
            # MLflow: trainings side by side would spoil a new database
            with FileLock(folder.parents[2] / ".mlflow.lock") if kind == "mlflow" else contextlib.nullcontext():
                make = functools.partial(_make, kind, folder, project, name, known.get(kind))
                logger = _start(kind, settings, make)
            stack.push(functools.partial(_finish, kind, logger))
            made.append(logger)
            if kind != "tensorboard":
                known[kind] = logger.experiment.id if kind == "wandb" else logger.run_id
                write_json(known, folder / KNOWN)
        yield made


def _make(kind: str, folder: Path, project: str, name: str, run: str | None) -> Any:
    loggers = importlib.import_module("lightning.pytorch.loggers")
    if kind == "tensorboard":
        return loggers.TensorBoardLogger(folder, "tensorboard", "", default_hp_metric=False)
    if kind == "wandb":
        project = os.environ.get("WANDB_PROJECT", project)
        options = {"console": "off"}  # W&B would wrap our output, and the progress bars with it
        return loggers.WandbLogger(name, save_dir=folder, project=project, id=run, settings=options)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.parents[2] / 'mlflow.db'}"
    project = os.environ.get("MLFLOW_EXPERIMENT_NAME", project)
    return loggers.MLFlowLogger(project, run_name=name, tracking_uri=uri, run_id=run)


def _finish(kind: str, logger: Any, error: type[BaseException] | None, *_: object) -> None:
    """Tell the logger at the end whether the training succeeded; a service that fails now stops no training."""
    try:
        if kind == "wandb":  # or the next training of this process would be taken for the same
            logger.experiment.finish(exit_code=None if error is None else 1)
        else:
            logger.finalize("success" if error is None else "failed")
    except Exception as refusal:
        _warn(logger, "the end of the training", refusal)


def log_epoch(loggers: Sequence[Logger], metrics: Mapping[str, float]) -> None:
    """Log one epoch, by its number. A service that fails now stops no training: the CSV file has all metrics."""
    for logger in loggers:
        try:
            logger.log_metrics(dict(metrics), step=int(metrics["epoch"]))
            logger.save()
        except Exception as error:
            _warn(logger, f"epoch {metrics['epoch']:.0f}", error)


def _warn(logger: Logger, refused: str, error: Exception) -> None:
    reason = str(error).strip().partition("\n")[0]
    warnings.warn(f"{type(logger).__name__} did not take {refused}: {reason}", stacklevel=3)


def _start(kind: str, settings: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """Make a logger, connect it, and tell it the settings."""
    try:
        logger = make()
        _ = logger.experiment  # connects
        logger.log_hyperparams(dict(settings))
        return logger
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"training.loggers: {kind!r} needs a package that is not installed ({error.name or error}); install it, "
            f"or remove it from the list"
        ) from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"training.loggers: {kind!r} does not start ({type(error).__name__}: {reason}); mend that, or remove it from "
            f"the list"
        ) from error
