"""``compute.batch_size = "auto"``: found once, then part of the run, so that no result depends on who goes on with it."""

import functools
import time
from collections.abc import Callable, Sequence

import torch

from explain2me.config.schema import Config, DetectorConfig
from explain2me.detectors.load import Detector
from explain2me.errors import ConfigError
from explain2me.salience.gradcam import GradCAM

SIZES = (4, 8, 16, 32, 64, 128, 256, 512)


GAIN = 1.05
"""A size that is not so much faster than the best before it, twice in a row, ends the search."""


def find_batch_size(config: Config, load: Callable[[DetectorConfig], Detector]) -> int:
    """The smallest batch that is about as fast as any, for the slowest to gain among the detectors of a config.

    Each architecture explains blank images in growing batches on the device and at the precision of the run; on a GPU
    half of the largest batch that fits is the most.

    Args:
        config: of the run.
        load: a detector of the config, on the CPU.

    Raises:
        ConfigError: not even the smallest batch fits into memory.
    """
    found: dict[tuple[str, object], int] = {}
    for wanted in config.detectors:
        key = wanted.architecture, wanted.input_size
        if key not in found:
            detector = load(wanted)
            detector.model.to(config.compute.device).to(memory_format=torch.channels_last)
            blank = torch.zeros(1, 3, *detector.input_size, dtype=torch.uint8, device=config.compute.device)
            with (
                GradCAM(detector.model, layer=wanted.layer) as cam,
                torch.autocast(blank.device.type, torch.bfloat16, enabled=config.compute.precision == "bfloat16"),
            ):
                explain = functools.partial(_explain, detector, cam, blank)
                found[key] = fastest(explain, [size for size in SIZES if size <= config.compute.shard_size] or [1])
    if not all(found.values()):
        raise ConfigError(
            f"compute.batch_size = 'auto': not even {SIZES[0]} images of {next(k for k, v in found.items() if not v)[0]} fit into "
            f"the memory of {config.compute.device}; set a smaller number, or device = 'cpu'"
        )
    return min(found.values())


def _explain(detector: Detector, cam: GradCAM, blank: torch.Tensor, count: int) -> None:
    cam(detector.preprocess(blank.expand(count, -1, -1, -1)))
    if blank.device.type == "cuda":
        torch.cuda.synchronize()


def fastest(
    explain: Callable[[int], None], sizes: Sequence[int], *, clock: Callable[[], float] = time.perf_counter
) -> int:
    """The smallest of growing sizes that is nearly as fast an image as the best; 0 where none fits into memory.

    Args:
        explain: explains so many images.
        sizes: to try.
        clock: seconds.
    """
    rates: dict[int, float] = {}
    idle = 0
    full = False
    for size in sizes:
        try:
            explain(size)  # warms up
            started = clock()
            explain(size)
        except (torch.cuda.OutOfMemoryError, MemoryError):
            full = True
            break
        best = max(rates.values(), default=0.0)
        rates[size] = size / max(clock() - started, 1e-9)
        idle = idle + 1 if rates[size] < GAIN * best else 0
        if idle == 2:
            break
    if not rates:
        return 0
    if full and len(rates) > 1:  # what else lies in memory varies
        rates.pop(max(rates))
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate * GAIN >= best)
