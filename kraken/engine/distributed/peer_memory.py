"""Memory of every rank that all ranks of one host can read and write, by torch's symmetric memory.

Torch's own signals and barriers are not used: they want a process group that is registered for the whole process, and
some of them use NVLink's multicast, which this engine never does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import (
    ProcessGroup,
    Store,
    _register_process_group,
    _SymmetricMemory,
    _unregister_process_group,
)

from kraken.environment import environment

ENVIRONMENT = {
    # devices are told apart by index, and processes that see one GPU each all call it 0
    "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    # also implied by the first; a multicast object would be made although nobody asked
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """A buffer of equal size on every rank, zero at first."""

    buffers: list[Tensor]
    """uint8 [bytes] of each rank, as this device reaches it."""
    owner: Any = None
    """What keeps them alive."""


def share_memory(store: Store, rank: int, size: int, device: torch.device, num_bytes: int, name: str) -> PeerMemory:
    """Make memory that every rank reaches, at the same time on all of them.

    Args:
        store: of the ranks alone.
        name: of the engine, unique in this process.
    Raises:
        RuntimeError: the devices do not reach each other's memory.
    """
    own = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
    own.zero_()
    torch.cuda.synchronize(device)  # the others may write as soon as they have met us
    renumbered = _Renumbered(store)  # by this name, since torch keeps only the half of it that is not Python
    group = ProcessGroup(renumbered, rank, size)
    # a meeting finds its store by a name that the whole process knows, for as long as it takes
    _register_process_group(name, group)  # type: ignore[arg-type]
    try:
        with environment(ENVIRONMENT):
            handle = _SymmetricMemory.rendezvous(own, name)
    finally:
        _unregister_process_group(name)  # type: ignore[arg-type]
    return PeerMemory([handle.get_buffer(peer, (num_bytes,), torch.uint8) for peer in range(size)], (own, handle))


class _Renumbered(Store):
    """The keys of a meeting, counted from the first one that this store sees.

    Torch counts meetings per process, and a leader has met others before that its new followers have not.
    """

    def __init__(self, store: Store):
        super().__init__()
        self._store = store
        self._first: int | None = None

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._renumbered(key), value)

    def get(self, key: str) -> bytes:
        return self._store.get(self._renumbered(key))

    def wait(self, keys: Sequence[str], timeout: Any = None) -> None:
        renumbered = [self._renumbered(key) for key in keys]
        self._store.wait(renumbered) if timeout is None else self._store.wait(renumbered, timeout)

    def _renumbered(self, key: str) -> str:
        prefix, number, rank = key.rsplit("/", 2)
        if self._first is None:
            self._first = int(number)
        return f"{prefix}/{int(number) - self._first}/{rank}"
