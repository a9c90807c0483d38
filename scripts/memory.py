"""Memory of this process while it works, and processes whose memory is their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any


def in_child(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of a function in a process of its own, whose peak of memory is its own too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()


def memory_gb() -> dict[str, float]:
    """GB of this process's own memory, and of its resident memory with mapped files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = {"own": status["RssAnon"], "resident": status["VmRSS"]}
    return {name: int(text.split()[0]) * 1024 / 1e9 for name, text in kilobytes.items()}


@contextmanager
def watched(every: float = 0.01) -> Iterator[list[dict[str, float]]]:
    """What `memory_gb` says again and again inside the block."""
    seen: list[dict[str, float]] = []
    done = threading.Event()

    def look() -> None:
        while not done.wait(every):
            seen.append(memory_gb())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
