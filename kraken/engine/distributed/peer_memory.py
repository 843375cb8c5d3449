"""Memory that all ranks of one host can read and write, through torch's symmetric memory. `PeerChannel` uses it.

The engine has signals of its own instead of torch's: those need a process group that is registered for the whole
process, and some of them use NVLink's multicast, which this engine never does.
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
    # torch tells devices apart by index, which is 0 in every process that sees one GPU
    "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
    # implied by the setting above, which may change; otherwise torch makes a multicast object
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}


@dataclass(frozen=True, slots=True)
class PeerMemory:
    """A buffer of equal size on every rank, initially zero."""

    buffers: list[Tensor]
    """uint8 [bytes] of each rank, mapped into this device's address space."""
    owner: Any = None
    """The objects that keep the memory mapped."""


def share_memory(store: Store, rank: int, size: int, device: torch.device, num_bytes: int, name: str) -> PeerMemory:
    """Allocate memory that every rank reaches; all ranks call this at the same time.

    Args:
        store: shared by the ranks of this engine alone.
        name: unique in this process.
    Raises:
        RuntimeError: the devices do not reach each other's memory.
    """
    own = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
    own.zero_()
    torch.cuda.synchronize(device)  # the other ranks may write after the rendezvous
    renumbered = _Renumbered(store)  # bound to a name, since torch does not keep the Python object alive
    group = ProcessGroup(renumbered, rank, size)
    # torch's rendezvous finds the store by a name that is global to the process, here only while it runs
    _register_process_group(name, group)  # type: ignore[arg-type]
    try:
        with environment(ENVIRONMENT):
            handle = _SymmetricMemory.rendezvous(own, name)
    finally:
        _unregister_process_group(name)  # type: ignore[arg-type]
    return PeerMemory([handle.get_buffer(peer, (num_bytes,), torch.uint8) for peer in range(size)], (own, handle))


class _Renumbered(Store):
    """A store in which torch's rendezvous keys are counted from the first one that it sees.

    Torch counts rendezvous per process. Rank 0 may have had others, with the workers of earlier engines, and would use
    other keys than its new workers.
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
