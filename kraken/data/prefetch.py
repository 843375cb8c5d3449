"""Prefetch: the next step's batch is read, and on its way to the device, while this one computes."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from kraken.data.loader import Loader

Batch = tuple[Tensor, Tensor]
"""(inputs_BT, targets_BT), int64."""


class Prefetcher:
    """One rank's batches in order, one ahead. Close it, or use it as a context, to end its thread.

    Args:
        first_step: the step whose batch is asked for first.
        last_step: no batch is read from this step on.
    """

    def __init__(
        self, loader: Loader, rank: int, num_ranks: int, device: torch.device, first_step: int, last_step: int
    ):
        self._loader, self._rank, self._num_ranks = loader, rank, num_ranks
        self._device, self._last_step = device, last_step
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kraken-prefetch")
        self._next: Future[Batch] | None = None
        self._request(first_step)

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def batch(self, step: int) -> Batch:
        """The batch of a step, on the device; steps are asked for one after the other.

        Raises:
            ArtefactError: the shards are damaged.
        """
        assert self._next is not None, "steps are asked for in order, up to the last"
        inputs_BT, targets_BT = self._next.result()
        self._request(step + 1)
        return tuple(x.to(self._device, non_blocking=True) for x in (inputs_BT, targets_BT))  # type: ignore[return-value]

    def _request(self, step: int) -> None:
        self._next = self._thread.submit(self._read, step) if step < self._last_step else None

    def _read(self, step: int) -> Batch:
        inputs_BT, targets_BT = self._loader.batch(step, self._rank, self._num_ranks)
        if self._device.type == "cuda":  # only from pinned memory does a copy overlap with computation
            return inputs_BT.pin_memory(), targets_BT.pin_memory()
        return inputs_BT, targets_BT
