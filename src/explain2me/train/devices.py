"""Lightning Fabric for one training: its devices, processes and precision, with the caller's process left as it was."""

import contextlib
import functools
import logging
import multiprocessing
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.queues import SimpleQueue

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from explain2me.config.training import TrainingConfig
from explain2me.errors import ConfigError, Explain2MeError
from explain2me.workers.device import real_device

LOGS = [
    logging.getLogger(name)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "torch.multiprocessing.spawn")
]

Work = Callable[[Fabric], None]


def training_device(settings: TrainingConfig) -> str:
    """Where to train on this machine; a ConfigError if the device, or that many of them, are absent."""
    device = real_device(settings.device, "training.device")
    if device == "cuda" and settings.devices > torch.cuda.device_count():
        raise ConfigError(
            f"training.devices = {settings.devices}: {torch.cuda.device_count()} CUDA devices are visible here; use a smaller number"
        )
    return device


def run_on_devices(work: Work, settings: TrainingConfig, device: str, loggers: Sequence[Logger]) -> None:
    """Call ``work`` with a Fabric: in this process, or with several devices in one process for each.

    Args:
        work: picklable where there are several devices.
        settings: number of devices and precision.
        device: of :func:`training_device`.
        loggers: for ``fabric.loggers``.

    Raises:
        Explain2MeError: of ``work``; or a device is out of memory, or a process ended by itself.
        KeyboardInterrupt: Ctrl-C, or SIGTERM.
    """
    kind, _, index = device.partition(":")
    devices: int | list[int] = settings.devices
    if kind == "cuda" and settings.devices == 1:  # a count of 1 would be the first GPU for every worker
        devices = [int(index) if index else torch.cuda.current_device()]
    with _process_settings(kind):
        fabric = Fabric(
            accelerator=kind,
            devices=devices,
            strategy="auto" if settings.devices == 1 else "ddp_spawn",
            precision="bf16-mixed" if settings.precision == "bfloat16" else "32-true",
            plugins=[_Processes()],
            loggers=list(loggers),
        )
        try:
            fabric.launch(work) if settings.devices == 1 else _launch_processes(fabric, work)
        except torch.OutOfMemoryError as error:
            raise Explain2MeError(
                f"{str(error).partition(chr(10))[0]}; the committed epochs are kept. Free the device and call the same "
                f"command again, or give a new folder with a smaller training.batch_size"
            ) from None
        except Explain2MeError as error:
            if "\n" not in str(error):
                raise
            # of a process that reads images: the message is its whole trace, which ends with "Type: message"
            raise type(error)(str(error).strip().rpartition("\n")[2].partition(": ")[2]) from None


@contextlib.contextmanager
def _process_settings(kind: str) -> Iterator[None]:
    """No hints about hardware, loaders and processes; SIGTERM interrupts; cuDNN tries its algorithms. All is undone."""
    with contextlib.ExitStack() as undo:
        undo.enter_context(warnings.catch_warnings())
        for log in LOGS:
            undo.callback(log.setLevel, log.level)
        _silence()
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # not where the program handles it
            undo.callback(signal.signal, signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        undo.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
        torch.backends.cudnn.benchmark = kind == "cuda"
        undo.enter_context(torch.random.fork_rng(range(torch.cuda.device_count() if kind == "cuda" else 0)))
        yield


def _silence() -> None:
    for log in LOGS:
        log.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*|torch\.utils\.data.*")


class _Processes(LightningEnvironment):
    """One process for each device of one training, and not, as SLURM_PROCID would say, one for each training."""

    def set_global_rank(self, rank: int) -> None:
        """Lightning's first call in each process, which is to be quiet."""
        super().set_global_rank(rank)
        _silence()


def _launch_processes(fabric: Fabric, work: Work) -> None:
    """One process for each device. The first error of any of them is raised here; none outlives this call."""
    errors: SimpleQueue[Exception] = multiprocessing.get_context("spawn").SimpleQueue()
    others = set(multiprocessing.active_children())
    try:
        fabric.launch(functools.partial(_send_errors, work=work, errors=errors))
    except ProcessRaisedException:
        if errors.empty():
            raise
        raise errors.get() from None
    except ProcessExitedException as error:
        raise Explain2MeError(
            f"a process of the training of several devices ended by itself ({error}; out of memory?); the committed epochs "
            f"are kept: call the same command again"
        ) from None
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
            process.join()


def _send_errors(fabric: Fabric, work: Work, errors: "SimpleQueue[Exception]") -> None:
    """Work in one process, and send the caller an error that is no bug as it is, not as the text of a trace."""
    try:
        work(fabric)
    except (Explain2MeError, OSError, torch.OutOfMemoryError) as error:
        errors.put(error)
        raise
