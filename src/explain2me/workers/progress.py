"""Estimate the time left: the images left of each model, times the mean seconds of an image of this model."""

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Generic, TypeVar

Kind = TypeVar("Kind")


class TimeLeft(Generic[Kind]):
    """Sums of images and seconds by model. A model without images yet counts as the mean of the others.

    Args:
        left: number of images left, by model.
        workers: number of processes that share the work.

    >>> clock = TimeLeft({"small": 10, "large": 30}, workers=2)
    >>> clock.add("small", 10, 5.0)
    >>> clock.seconds()
    7.5
    >>> clock.add("large", 10, 20.0)
    >>> clock.seconds()
    20.0
    """

    def __init__(self, left: Mapping[Kind, int], *, workers: int) -> None:
        self._left = Counter(left)
        self._workers = workers
        self._images: Counter[Kind] = Counter()
        self._seconds: dict[Kind, float] = {}
        self._lock = threading.Lock()

    def add(self, kind: Kind, count: int, seconds: float) -> None:
        """Add images that are done and their seconds; a negative count takes back images that are done again.

        Images that took no time were there already: they say nothing about the others.
        """
        with self._lock:
            self._left[kind] -= count
            self._images[kind] += max(count, 0) if seconds else 0
            self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def seconds(self) -> float | None:
        """Seconds left; None before the first image."""
        with self._lock:
            each = {kind: self._seconds[kind] / count for kind, count in self._images.items() if count}
            if not each:
                return None
            mean = sum(each.values()) / len(each)
            work = sum(max(count, 0) * each.get(kind, mean) for kind, count in self._left.items())
            return work / self._workers
