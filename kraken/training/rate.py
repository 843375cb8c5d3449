"""The rate at which a device multiplies matrices, which a model's own rate is compared with (MFU)."""

import time

import torch

SIZES = {"cuda": 8192, "cpu": 512}
"""Rows and columns: large enough to keep the device busy."""

BUDGET_S = 0.1
"""Measuring ends after so long, or ten products."""


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a square product in this type, the best of some that were timed."""
    size = SIZES.get(device.type, SIZES["cpu"])
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    started_at = time.perf_counter()
    for _ in range(10):
        begun_at = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ended_at = time.perf_counter()
        best = min(best, ended_at - begun_at)
        if ended_at - started_at > BUDGET_S:
            break
    return 2 * size**3 / best
