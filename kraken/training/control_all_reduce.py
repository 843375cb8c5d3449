"""All-reduces of a few integers with the maximum, over gloo on the CPU, so that no rank waits for its device.

The training loop calls them: `start` begins one after a step, and `result` reads it one step later, when the numbers of
all ranks have arrived. That is how all ranks decide at the same step that one of them was asked to stop, or that a
checkpoint is finished, without waiting for each other more than the gradients make them wait.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kraken.training.parallel import Mesh


class ControlAllReduce:
    """All-reduces among the ranks of a mesh, one at a time. Every rank must start and read the same ones.

    Args:
        timeout_s: time after which a rank that waits for another raises RuntimeError.
    """

    def __init__(self, mesh: Mesh, timeout_s: float):
        # made by all ranks together, like every group
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if mesh.size > 1 else None
        self._numbers: Tensor | None = None
        self._work: dist.Work | None = None

    def start(self, numbers: Sequence[int]) -> None:
        """Begin an all-reduce."""
        assert self._numbers is None, "one all-reduce at a time"
        self._numbers = torch.tensor(numbers)
        if self._group is not None:
            self._work = dist.all_reduce(self._numbers, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def result(self) -> list[int] | None:
        """The largest value of each number, of the all-reduce that `start` began; None if there is none."""
        if self._numbers is None:
            return None
        if self._work is not None:
            self._work.wait()
        numbers, self._numbers, self._work = self._numbers.tolist(), None, None
        return numbers

    def largest(self, *numbers: int) -> list[int]:
        """The largest value of each number over the ranks; waits for every rank. Drops the result of one that was
        begun."""
        self.result()
        self.start(numbers)
        result = self.result()
        assert result is not None
        return result

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order, on rank 0, and nothing on the others; waits for every rank."""
        assert self._numbers is None, "not while an all-reduce is in flight"
        if self._group is None:
            return [value]
        values: list[Any] | None = [None] * dist.get_world_size(self._group) if dist.get_rank() == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def close(self) -> None:
        """End the group; every rank that gets here must have read the open round."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
