"""Work done in threads ahead of whoever takes the results, in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")
Result = TypeVar("Result")

MOST_THREADS = 16
DEPTH = 2
"""Items in work or waiting for the caller, a thread."""


def ordered(
    items: Iterable[Item],
    prepare: Callable[[Item], Prepared],
    work: Callable[[Item, Prepared], Result],
    *,
    threads: int | None = None,
) -> Generator[tuple[Item, Result], None, None]:
    """Yields `(item, work(item, prepare(item)))` in the order of the items.

    `prepare` runs in the caller's thread, one item after another; `work` in `threads` threads (None: one a
    core), a few items ahead of the caller. What `work` raises is raised where its item comes out. Close the
    iterator when it is left early: then what has not begun is dropped.
    """
    count = threads or min(MOST_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(count, thread_name_prefix="ahead")
    coming: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for item in items:
            coming.append((item, pool.submit(work, item, prepare(item))))
            if len(coming) > DEPTH * count:
                item, future = coming.popleft()
                yield item, future.result()
        while coming:
            item, future = coming.popleft()
            yield item, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
