"""The limit of the memory that threads use at the same time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from convlens.utils.files import MemorySemaphore


def peak_usage(semaphore: MemorySemaphore, sizes: list[int], threads: int) -> int:
    """Acquire `sizes` in several threads; return the most that was held at the same time."""
    current, peak, lock = 0, 0, threading.Lock()

    def hold(size: int) -> None:
        nonlocal current, peak
        with semaphore.acquire(size):
            with lock:
                current, peak = current + size, max(peak, current + size)
            time.sleep(0.002)
            with lock:
                current -= size

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(hold, sizes))
    assert current == 0
    return peak


def test_memory_semaphore_is_never_exceeded() -> None:
    assert peak_usage(MemorySemaphore(100, free=10), [60, 40, 30, 90, 100, 20] * 8, 8) <= 100
    assert (
        peak_usage(MemorySemaphore(100, free=100), [60] * 16, 8) > 100
    )  # small requests don't wait
    assert (
        peak_usage(MemorySemaphore(100, free=10), [300] * 3, 3) == 300
    )  # above the limit: one at a time
