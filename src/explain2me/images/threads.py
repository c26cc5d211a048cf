"""Map a function over items in threads, in their order; an image that cannot be used gives its error."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from explain2me.errors import ImageError, MachineError

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_threads: int | None, ahead: int
) -> Generator[Result | ImageError, None, None]:
    """Map in threads; yield the results in the order of the items, with at most ``ahead`` items in progress.

    Raises:
        MachineError: of the function; any other error that is not an ImageError, too.
    """

    def attempt(item: Item) -> Result | ImageError:
        try:
            return function(item)
        except MachineError:
            raise
        except ImageError as error:
            return error

    pool = ThreadPoolExecutor(num_threads or min(8, _num_cores()), thread_name_prefix="explain2me-images")
    waiting: deque[Future[Result | ImageError]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(attempt, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
