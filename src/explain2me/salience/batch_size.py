"""``compute.batch_size = "auto"``: measure a fast batch size when a run begins.

The run keeps this size, so its results do not depend on the machine that resumes it.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch

from explain2me.config.schema import ComputeConfig, Config
from explain2me.detectors.load import Detector
from explain2me.detectors.runs import load_model, weights_of
from explain2me.errors import ConfigError
from explain2me.run.conditions import conditions_for
from explain2me.salience.gradcam import choose_predicted
from explain2me.salience.methods import METHODS, Explainer

SIZES = (4, 8, 16, 32, 64, 128, 256, 512)
GAIN = 1.05
"""The search ends after two sizes in a row that are not faster than the best smaller size by this factor."""
MOST_SECONDS = 30.0
"""Of a batch under all conditions: so much work a stop may lose."""


def find_batch_size(config: Config, num_classes: int) -> int:
    """For each architecture, find the smallest batch size within 5 % of its fastest rate; return the smallest of these.

    The first run of each architecture explains blank images in growing batches, on the device and at the precision of
    the run. Where the memory is exhausted, the size is at most half of the largest batch that fits.

    Raises:
        ConfigError: the smallest batch does not fit into memory.
    """
    sizes: dict[tuple[str, object], int] = {}
    make_explainer = METHODS[config.salience.method].load()
    for settings in config.detectors:
        key = settings.architecture, settings.input_size
        if key in sizes:
            continue
        _, checkpoint, seed = weights_of(settings, config.seed)[0]
        detector = load_model(settings, checkpoint, seed, num_classes)
        detector.model.to(config.compute.device).to(memory_format=torch.channels_last)
        with make_explainer(detector.model, settings.layer) as explainer:
            num_passes = len(conditions_for(config.measures, detector.input_size))
            sizes[key] = _size_for(detector, explainer, config.compute, most_seconds=MOST_SECONDS / num_passes)
    too_large = [architecture for (architecture, _), size in sizes.items() if not size]
    if too_large:
        raise ConfigError(
            f"compute.batch_size = 'auto': not even {SIZES[0]} images of {too_large[0]} fit into "
            f"the memory of {config.compute.device}; set a smaller number, or device = 'cpu'"
        )
    return min(sizes.values())


def _size_for(detector: Detector, explainer: Explainer, compute: ComputeConfig, *, most_seconds: float) -> int:
    blank = torch.zeros(1, 3, *detector.input_size, dtype=torch.uint8, device=compute.device)

    def explain(count: int) -> None:
        explainer.explain(detector.preprocess(blank.expand(count, -1, -1, -1)), choose_predicted)
        if blank.device.type == "cuda":
            torch.cuda.synchronize()

    with torch.autocast(blank.device.type, torch.bfloat16, enabled=compute.precision == "bfloat16"):
        sizes = [size for size in SIZES if size <= compute.shard_size] or [1]
        return fastest(explain, sizes, most_seconds=most_seconds)


def fastest(
    explain: Callable[[int], None],
    sizes: Sequence[int],
    *,
    most_seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Find the smallest batch size whose rate, in images per second, is within 5 % of the best; 0 where none fits.

    Args:
        explain: explains a batch of the given size; called twice for each size, the second call is timed.
        sizes: to try, in ascending order.
        most_seconds: that a batch may take, if a smaller one fits.
        clock: returns the time in seconds.
    """
    rates: dict[int, float] = {}
    idle, full = 0, False
    for size in sizes:
        try:
            explain(size)  # warms up
            started = clock()
            explain(size)
        except (torch.cuda.OutOfMemoryError, MemoryError):
            full = True
            break
        seconds = max(clock() - started, 1e-9)
        if seconds > most_seconds and rates:
            break
        best = max(rates.values(), default=0.0)
        rates[size] = size / seconds
        idle = idle + 1 if rates[size] < GAIN * best else 0
        if idle == 2:
            break
    if not rates:
        return 0
    if full and len(rates) > 1:  # other processes use a varying part of the memory
        rates.pop(max(rates))
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate * GAIN >= best)
