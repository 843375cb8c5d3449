"""The way axis: ways, vocabulary and their collectives when several processes share one model.

Each process holds some of the ways, and as large a share of the token embedding. Whatever all of them hold (positions,
the state before the first layer and after the last) is equal on every process, and so is its gradient. Four operations
keep it so, named by what forward and backward do:

    start_sum, then wait      sum / sum      the others' inputs of a layer; in flight in between, in both directions
    sum_partial               sum / -        partial results become the whole: embedding rows, the conjunction's columns
    share                     - / sum        a whole is read by every process, each contributing to its gradient
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
        overlap: whether a layer's sum is in flight while its attention computes, or waited for at once.
        communication: runs while a sum is waited for.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    overlap: bool = True
    communication: Stopwatch = field(default_factory=Stopwatch)

    def part(self, count: int) -> range:
        """Which of `count` things in a row this process holds; the last process may hold fewer."""
        each = -(-count // self.size)
        return range(min(count, self.rank * each), min(count, (self.rank + 1) * each))

    @torch.compiler.disable  # a collective in flight is nothing that a compiler may move
    def start_sum(self, x: Tensor) -> "PendingSum":
        """Begin summing x over the processes."""
        pending = PendingSum(self)
        pending.tensor = x if self.size == 1 else _StartSum.apply(x, pending)
        return pending

    def sum_partial(self, x: Tensor) -> Tensor:
        """Sum over the processes; the gradient passes through, since it is whole on each of them."""
        return x if self.size == 1 else _SumPartial.apply(x, self)

    def share(self, x: Tensor) -> Tensor:
        """x itself, whose gradient is summed over the processes."""
        return x if self.size == 1 else _Share.apply(x, self)

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduce in place, without gradients."""
        if self.size > 1:
            with self.communication.running():
                dist.all_reduce(x, op, group=self.group)
        return x


class PendingSum:
    """A sum in flight. `wait` ends it; the backward pass starts the gradient's there and ends it where x was."""

    def __init__(self, ways: WayGroup):
        self.ways = ways
        self.tensor: Tensor
        self.work: Any = None

    def launch(self, x: Tensor) -> Tensor:
        """A copy of x that the processes' sum overwrites."""
        buffer = x.contiguous().clone()
        self.work = dist.all_reduce(buffer, group=self.ways.group, async_op=True)
        if not self.ways.overlap:
            self.land()
        return buffer

    def land(self) -> None:
        """Wait for what was launched last."""
        if self.work is not None:
            with self.ways.communication.running():
                self.work.wait()
            self.work = None

    @torch.compiler.disable
    def wait(self) -> Tensor:
        """The sum, on every process."""
        return self.tensor if self.ways.size == 1 else _WaitForSum.apply(self.tensor, self)


class _StartSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pending: PendingSum) -> Tensor:
        ctx.pending = pending
        return pending.launch(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.pending.land()
        return gradients[0], None


class _WaitForSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pending: PendingSum) -> Tensor:
        ctx.pending = pending
        pending.land()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # autograd runs nodes in the reverse order of their making: attention's backward comes before _StartSum's
        return ctx.pending.launch(gradients[0]), None


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
