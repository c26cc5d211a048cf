"""Container files that stay open: a bounded cache, how many of them there may be, the identity of a file, and pyarrow's errors."""

import stat
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from explain2me.errors import ImageError

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """The values used last, up to a total cost. One thread makes a value while the others wait."""

    def __init__(self, max_cost: int, cost: Callable[[Value], int] = lambda _: 1) -> None:
        self._max_cost, self._cost_of = max_cost, cost
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        self._cost = 0

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made where it is not kept."""
        with self._lock:
            if key not in self._values:
                self._values[key] = make()
                self._cost += self._cost_of(self._values[key])
            self._values.move_to_end(key)
            while self._cost > self._max_cost and len(self._values) > 1:
                self._cost -= self._cost_of(self._values.popitem(last=False)[1])
            return self._values[key]


def num_kept_open(most: int) -> int:
    """``most``, or fewer so that two caches stay below half of the files that this process may open."""
    if sys.platform == "win32":
        return most
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # 8: threads that may still read from a container that left its cache
    return most if limit == resource.RLIM_INFINITY else max(1, min(most, limit // 4 - 8))


def file_identity(path: Path) -> tuple[object, ...]:
    """A key that changes when another file is put in the place of this one; only regular files have one."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("not_regular", f"{path.name!r}: expected a file, got a folder, pipe or device")
    return str(path), status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


@contextmanager
def refusing_damage(name: str) -> Iterator[None]:
    """Turn whatever pyarrow raises on hostile bytes into an ImageError; errors of the machine stay what they are."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        why = " ".join(str(error).split())[:200].encode("unicode_escape").decode()
        raise ImageError(
            "unreadable", f"{name!r} cannot be read as a table ({why}); look whether it is whole"
        ) from error
