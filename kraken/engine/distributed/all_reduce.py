"""The all-reduce of an engine: the interface that the layers use, and what it is on a single device.

Three backends implement the interface: NCCL, or gloo and sockets on CPUs (`process_group.py`), and for CUDA devices of
one host stores into the memory of peers and copy engines (both in `peer_all_reduce.py`). `DeviceGroup` picks the
backend of every call.

Shape letters as in `kraken/model/architecture.py`, and: R rows, C columns.
"""

from typing import Protocol

from torch import Tensor

from kraken.engine.kernels.norm import Norm, Normed
from kraken.engine.kernels.torch.kernels import TorchKernels


class Handle(Protocol):
    """An all-reduce in flight. Handles are consumed in the order in which they were started."""

    def wait(self) -> None:
        """Wait for the other ranks' parts: the host waits on CPUs, the current stream on CUDA."""

    def add_norm(self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm) -> tuple[Tensor, Normed]:
        """Wait, add and normalise.

        Args:
            x_WTD: what the all-reduce was started with.
        Returns:
            a = x + addend, and for each way the norm of a plus all other ways' x, those of other ranks included.
        """


class AllReduce:
    """A backend. Every rank makes the same calls in the same order.

    Args:
        kernels: of the model.
        is_blocking: wait for each all-reduce where it is started, instead of where it is consumed.
    """

    def __init__(self, kernels: TorchKernels, is_blocking: bool = False):
        self.kernels, self.is_blocking = kernels, is_blocking

    def start(self, x_WTD: Tensor) -> Handle:
        """Begin to sum x over the ways of all ranks. x must not be modified until the handle has been consumed."""
        raise NotImplementedError

    def all_reduce(self, x_RC: Tensor) -> Tensor:
        """Sum x over the ranks: bit-equal on all of them. May overwrite x."""
        raise NotImplementedError

    def gather_columns(self, x_RC: Tensor) -> Tensor:
        """Put the ranks' columns side by side on rank 0; the other ranks get x back."""
        raise NotImplementedError

    def add_norm_start(
        self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm | None
    ) -> tuple[Tensor, Normed | None, Handle]:
        """x + addend, its norm, and the all-reduce of x + addend in flight."""
        out_WTD, normed = self.kernels.add_norm(x_WTD, addend_WTD, norm)
        return out_WTD, normed, self.start(out_WTD)

    def all_reduce_add_norm(self, x_1TD: Tensor, part_1TD: Tensor, norm: Norm | None) -> tuple[Tensor, Normed | None]:
        """x + the all-reduced part, and the norm of that: bit-equal on all ranks if x is. May overwrite the part."""
        return self.kernels.add_norm(x_1TD, self.all_reduce(part_1TD[0])[None], norm)

    def _started(self, handle: Handle) -> Handle:
        if self.is_blocking:
            handle.wait()
        return handle


class LocalHandle:
    """The handle of one rank alone, which holds all ways."""

    def __init__(self, kernels: TorchKernels):
        self._kernels = kernels

    def wait(self) -> None:
        pass

    def add_norm(self, x_WTD: Tensor, addend_WTD: Tensor, norm: Norm) -> tuple[Tensor, Normed]:
        return self._kernels.add_reduced_norm(x_WTD, addend_WTD, norm)


class LocalAllReduce(AllReduce):
    """The backend of one rank alone."""

    def start(self, x_WTD: Tensor) -> Handle:
        return LocalHandle(self.kernels)

    def all_reduce(self, x_RC: Tensor) -> Tensor:
        return x_RC

    def gather_columns(self, x_RC: Tensor) -> Tensor:
        return x_RC
