"""The rate at which a warm device multiplies matrices, which a model's own rate is compared with (MFU)."""

import time
from collections.abc import Callable
from statistics import median

import torch

SIZES = {"cuda": 8192, "cpu": 512}
"""Rows and columns: large enough to keep the device busy."""
WARM_UP_S = {"cuda": 0.5, "cpu": 0.05}
"""Products run for so long before any is timed: the first one starts cuBLAS, and clocks settle under load."""
ROUND_S = {"cuda": 0.1, "cpu": 0.02}
"""Products are timed together for at least so long."""
NUM_ROUNDS = 5

Timer = Callable[[Callable[[], object], int, torch.device], float]
"""(what to run, how often, device) -> the seconds that all of it takes."""


def seconds_of(run: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of `count` calls in a row: between two events on CUDA, where the host is ahead; else by the clock."""
    if device.type != "cuda":
        started_at = time.perf_counter()
        for _ in range(count):
            run()
        return time.perf_counter() - started_at
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3


def matrix_rate(dtype: torch.dtype, device: torch.device, timer: Timer = seconds_of) -> float:
    """Floating-point operations per second of a square product in this type: the median of some warm rounds.

    Takes a quarter of a second on a CPU, one to two on CUDA. The operands are random: a GPU draws less power for
    constant ones, and multiplies them faster than any that a model has. The default generator is left as it is.
    """
    size = SIZES.get(device.type, SIZES["cpu"])
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    timer(multiply, 1, device)
    round_s, warm_up_s = (limits.get(device.type, limits["cpu"]) for limits in (ROUND_S, WARM_UP_S))
    count, warm_s = 1, 0.0
    while (seconds := timer(multiply, count, device)) < round_s or warm_s < warm_up_s:
        warm_s += seconds
        if seconds < round_s:
            count *= 2
    return 2 * size**3 * count / median(timer(multiply, count, device) for _ in range(NUM_ROUNDS))
