"""Shared by the tests of sources and others."""

from __future__ import annotations

import numpy as np


def cifar10_files() -> dict[str, bytes]:
    random = np.random.default_rng(1)
    files = {}
    for i, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
        records = random.integers(0, 256, (4, 3073), np.uint8)
        records[:, 0] = [i, (i + 1) % 10, (i + 2) % 10, 9]
        files[name] = records.tobytes()
    return files
