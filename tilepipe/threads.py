"""Several pieces of work at once: how many cores there are, and results in the order of work."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def cores() -> int:
    """Return the processor cores that this process may use, which may be bound to few."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def several_at_once(
    work: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    at_once: int,
    name: str,
    ahead: int | None = None,
) -> Generator[_Result]:
    """Yield ``work(item)`` of every item, in their order, from ``at_once`` threads.

    Raises what the first item, in their order, raises; what has not begun by then is left. No more
    than ``ahead`` items (None: ``at_once``) beyond the one that is taken are asked for, so memory
    is bounded, and an interpreter that ends waits for no more.
    """
    ahead = at_once if ahead is None else ahead
    under_way: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(at_once, thread_name_prefix=name) as pool:
        try:
            for item in items:
                under_way.append(pool.submit(work, item))
                if len(under_way) > ahead:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for begun in under_way:
                begun.cancel()
