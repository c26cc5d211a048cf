"""Where the numbers of a training go beside its CSV file: Lightning's loggers, which an interrupt does not start anew."""

import contextlib
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.pytorch.loggers import Logger

from explain2me.errors import ConfigError
from explain2me.files import write_json

KNOWN = "loggers.json"
"""Under which names the services know this training."""


@contextlib.contextmanager
def open_loggers(
    kinds: tuple[str, ...], folder: Path, *, project: str, name: str, settings: Mapping[str, Any]
) -> Iterator[list[Logger]]:
    """The loggers of a training; those of one that goes on continue the run that they had begun.

    Args:
        kinds: of ``tensorboard``, ``wandb`` and ``mlflow``.
        folder: of the training. TensorBoard and W&B write in it. MLflow writes where ``MLFLOW_TRACKING_URI`` says,
            otherwise to ``mlflow.db`` in the folder of the study, three above, which its trainings share.
        project: the trainings to be shown together, unless ``WANDB_PROJECT`` or ``MLFLOW_EXPERIMENT_NAME`` say otherwise.
        name: of the training.
        settings: the hyperparameters, nested or flat.

    Raises:
        ConfigError: a logger is not installed, or does not start.
    """
    known: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError):
        known = json.loads((folder / KNOWN).read_text(encoding="utf-8"))
    with contextlib.ExitStack() as stack:
        made = []
        for kind in kinds:
            made.append(stack.enter_context(_open(kind, folder, project, name, known)))
            if known:
                write_json(known, folder / KNOWN)
        for logger in made:
            logger.log_hyperparams(dict(settings))
        yield made


@contextlib.contextmanager
def _open(kind: str, folder: Path, project: str, name: str, known: dict[str, str]) -> Iterator[Logger]:
    loggers = importlib.import_module("lightning.pytorch.loggers")
    if kind == "tensorboard":
        yield _start(kind, lambda: loggers.TensorBoardLogger(folder, "tensorboard", "", default_hp_metric=False))
    elif kind == "wandb":
        project = os.environ.get("WANDB_PROJECT", project)

        def make() -> Any:
            # console: W&B would wrap our output, and the progress bars with it
            return loggers.WandbLogger(
                name, save_dir=folder, project=project, id=known.get("wandb"), settings={"console": "off"}
            )

        logger = _start(kind, make)
        known["wandb"] = logger.experiment.id
        try:
            yield logger
        finally:
            logger.experiment.finish()  # or the next training of this process would be taken for the same
    else:
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.parents[2] / 'mlflow.db'}"
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", project)

        def make() -> Any:
            return loggers.MLFlowLogger(project, run_name=name, tracking_uri=uri, run_id=known.get("mlflow"))

        with FileLock(folder.parents[2] / ".mlflow.lock"):  # trainings side by side would spoil a new database
            logger = _start(kind, make)
        known["mlflow"] = logger.run_id
        yield logger


def _start(kind: str, make: Callable[[], Any]) -> Any:
    """Make a logger and connect it."""
    try:
        logger = make()
        _ = logger.experiment  # connects
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
