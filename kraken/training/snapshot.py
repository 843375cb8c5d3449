"""Snapshots: a rank's tensors as they are now, copied to the host while the device computes on.

Weights and moments change only in the optimizer's update. So nothing waits for a copy but the next update: the copying
has the forward and backward pass of a whole step to hide behind. The buffers are made once and used again.
"""

import threading
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from kraken.stopwatch import Stopwatch


class Snapshot:
    """Host buffers, and the copying into them: one thread trains and calls `begin` and `before_change`, another copies.

    Args:
        waiting: runs while a change waits for the copies.
    """

    def __init__(self, device: torch.device, waiting: Stopwatch):
        self._device, self._waiting = device, waiting
        self._buffers: dict[str, Tensor] = {}
        self._sources: dict[str, Tensor] = {}
        self._issued = threading.Event()  # by the host; on CUDA the copies may still be under way
        self._issued.set()
        self._ready: torch.cuda.Event | None = None
        self._copied: torch.cuda.Event | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """Mark what is to be copied, as it is now; every snapshot is of the same names and shapes."""
        self._sources = dict(tensors)
        self._issued.clear()
        if self._stream is not None:
            self._ready, self._copied = torch.cuda.Event(), torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(self._device))

    def copy(self) -> dict[str, Tensor]:
        """Copy what was marked, and return the copies, which stay until the next `begin`."""
        copied = self._copied
        try:
            if self._stream is None:
                self._copy_all()
            else:
                assert self._ready is not None and copied is not None
                with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                    self._stream.wait_event(self._ready)
                    self._copy_all()
                    copied.record(self._stream)
        finally:
            self._issued.set()
        if copied is not None:
            copied.synchronize()
        buffers = {name: self._buffers[name] for name in self._sources}
        self._sources = {}
        return buffers

    def _copy_all(self) -> None:
        for name, tensor in self._sources.items():
            if name not in self._buffers:
                pinned = self._stream is not None  # only into pinned memory does a copy overlap with computation
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._buffers[name].copy_(tensor, non_blocking=True)

    def before_change(self) -> None:
        """Return when the tensors may change: on CUDA when the device has been told to wait for the copies."""
        if self._issued.is_set() and self._copied is None:
            return
        started_at = time.perf_counter()
        self._issued.wait()
        self._waiting.add(time.perf_counter() - started_at)
        if self._copied is not None:
            with self._waiting.running():
                torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._copied = None
