"""Stopwatches: how long training stood still for something, measured without making it stand still for that."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Sums up the time between begin and end of what runs inside it.

    On a CPU that is the calling thread's time. On CUDA it is the current stream's, between two events: what the device
    waited or worked there, while the host went on; `add` counts what the host waited besides. What is recorded as a
    CUDA graph is not measured.

    Args:
        device: None measures the calling thread whatever the device is.
    """

    def __init__(self, device: torch.device | None = None):
        self._on_cuda = device is not None and device.type == "cuda"
        self._seconds = 0.0
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what is inside; does not nest."""
        if not self._on_cuda:
            started_at = time.perf_counter()
            try:
                yield
            finally:
                self._seconds += time.perf_counter() - started_at
            return
        if torch.cuda.is_current_stream_capturing():  # a graph's events hold no times
            yield
            return
        self._collect(wait=False)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._pending.append((begin, end))

    def add(self, seconds: float) -> None:
        """Count what somebody else measured."""
        self._seconds += seconds

    def _collect(self, wait: bool) -> None:
        """Add what the device has finished, so that few events are held."""
        while self._pending and (wait or self._pending[0][1].query()):
            begin, end = self._pending.popleft()
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000

    def read(self) -> float:
        """Seconds since it was read last; waits for the device."""
        self._collect(wait=True)
        seconds, self._seconds = self._seconds, 0.0
        return seconds
