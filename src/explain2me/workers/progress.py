"""How long a run will take: what is left of each model, at the time that an image of this model has taken so far."""

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Generic, TypeVar

Kind = TypeVar("Kind")


class TimeLeft(Generic[Kind]):
    """Sums of images and seconds by model. A model not begun yet is taken for the mean of those that are.

    Args:
        left: images still to do, by model.
        workers: that share the work.

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
        """So many images more are done; a negative count takes back what is done again."""
        with self._lock:
            self._left[kind] -= count
            self._images[kind] += max(count, 0)
            self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def seconds(self) -> float | None:
        """Seconds left; None while nothing is known."""
        with self._lock:
            each = {kind: self._seconds[kind] / count for kind, count in self._images.items() if count}
            if not each:
                return None
            mean = sum(each.values()) / len(each)
            work = sum(max(count, 0) * each.get(kind, mean) for kind, count in self._left.items())
            return work / self._workers
