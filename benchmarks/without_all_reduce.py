"""An engine whose all-reduces are left out, so that its tokens are WRONG: the baseline for the cost of communication.

`benchmarks.ttft` and `benchmarks.link` give `TorchEngine.from_shape` a `RendezvousWithoutAllReduce`, whose workers run
`python -m benchmarks.without_all_reduce`; `benchmarks.layers` uses the group alone. Logits are still gathered.
"""

from collections.abc import Callable

from torch import Tensor

from kraken.engine.distributed import worker
from kraken.engine.distributed.all_reduce import AllReduce, LocalAllReduce
from kraken.engine.distributed.device_group import DeviceGroup
from kraken.engine.distributed.peer_all_reduce import Backend, PeerChannel
from kraken.engine.distributed.rendezvous import Rendezvous


class GatherOnly(LocalAllReduce):
    """All-reduces as on one rank alone; gathers over the ranks."""

    def __init__(self, backend: AllReduce):
        super().__init__(backend.kernels)
        self._backend = backend

    def gather_columns(self, x_RC: Tensor) -> Tensor:
        return self._backend.gather_columns(x_RC)


class GroupWithoutAllReduce(DeviceGroup):
    """A group that only gathers; over peer memory where that works."""

    def use_peers(self, channel: PeerChannel, backend_for: Callable[[int], Backend]) -> None:
        super().use_peers(channel, lambda num_tokens: "p2p_store")

    def all_reduce_for(self, num_tokens: int) -> AllReduce:
        return GatherOnly(super().all_reduce_for(num_tokens))


class RendezvousWithoutAllReduce(Rendezvous):
    """Where the ranks of such an engine meet."""

    worker_module = "benchmarks.without_all_reduce"
    group_type = GroupWithoutAllReduce


if __name__ == "__main__":
    worker.main(GroupWithoutAllReduce)
