"""The way axis: ways, vocabulary and their collectives when several processes share one model.

Each process holds some of the ways, and as large a share of the token embedding. Whatever all of them hold (positions,
the state before the first layer and after the last) is equal on every process, and so is its gradient. Four operations
keep it so, named by what forward and backward do:

    start_sum, then wait_sum  sum / sum      the others' inputs of a layer; in flight in between, in both directions
    sum_partial               sum / -        partial results become the whole: embedding rows, the conjunction's columns
    share                     - / sum        a whole is read by every process, each contributing to its gradient

The sums in flight are torch's functional collectives, so that a compiled layer is one graph with its sum inside, and a
CUDA graph can hold it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kraken.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True)
class WayGroup:
    """The processes that share one model's ways; the default is one process that holds them all.

    Args:
        group: their process group; None for one process.
        group_name: its name in torch's registry, by which functional collectives find the group.
        overlap: whether a layer's sum is in flight while its attention computes, or waited for at once.
        communication: runs while a sum is waited for, except in compiled code, where the host waits for nothing.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    group_name: str = ""
    overlap: bool = True
    communication: Stopwatch = field(default_factory=Stopwatch)

    def part(self, count: int) -> range:
        """Which of `count` things in a row this process holds; the last process may hold fewer."""
        each = -(-count // self.size)
        return range(min(count, self.rank * each), min(count, (self.rank + 1) * each))

    def sum_dtype(self, x: Tensor) -> torch.dtype:
        """The type of a layer's sum over the ways of x.

        A sum that crosses devices is as wide as x: in float32 a sum of bfloat16 states would take the link twice as
        long. A sum that stays on one device is at least float32.
        """
        return x.dtype if self.size > 1 or x.dtype == torch.float64 else torch.float32

    def start_sum(self, x: Tensor) -> Tensor:
        """Begin summing x over the processes.

        Returns:
            A tensor that may only be given to `wait_sum`: its values arrive while other work goes on.
        """
        return x if self.size == 1 else _StartSum.apply(x, self)

    def wait_sum(self, in_flight: Tensor) -> Tensor:
        """Wait for what `start_sum` began; returns the sum, on every process."""
        return in_flight if self.size == 1 else _WaitSum.apply(in_flight, self)

    def sum_partial(self, x: Tensor) -> Tensor:
        """Sum over the processes; the gradient passes through, since it is whole on each of them."""
        return x if self.size == 1 else _SumPartial.apply(x, self)

    def share(self, x: Tensor) -> Tensor:
        """x itself, whose gradient is summed over the processes."""
        return x if self.size == 1 else _Share.apply(x, self)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum in place, without gradients."""
        if self.size > 1:
            with self.communication.running():
                dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every process's x in the order of ranks, [size, *x.shape], without gradients."""
        if self.size == 1:
            return x[None]
        gathered = x.new_empty(self.size * len(x), *x.shape[1:])
        with self.communication.running():
            dist.all_gather_into_tensor(gathered, x.contiguous(), group=self.group)
        return gathered.unflatten(0, (self.size, len(x)))


def _start(x: Tensor, ways: WayGroup) -> Tensor:
    in_flight = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", ways.group_name)
    return in_flight if ways.overlap else _wait(in_flight, ways)


def _wait(in_flight: Tensor, ways: WayGroup) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops._c10d_functional.wait_tensor(in_flight)
    with ways.communication.running():
        return torch.ops._c10d_functional.wait_tensor(in_flight)


class _StartSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ways: WayGroup) -> Tensor:
        ctx.ways = ways
        return _start(x, ways)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _wait(gradients[0], ctx.ways), None


class _WaitSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, in_flight: Tensor, ways: WayGroup) -> Tensor:
        ctx.ways = ways
        return _wait(in_flight, ways).view_as(in_flight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # autograd runs nodes in the reverse order of their making: attention's backward comes before _StartSum's
        return _start(gradients[0], ctx.ways), None


class _SumPartial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ways: WayGroup) -> Tensor:
        return ways.all_reduce(x.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ways: WayGroup) -> Tensor:
        ctx.ways = ways
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.ways.all_reduce(gradients[0].contiguous().clone()), None
