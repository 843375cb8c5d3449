"""Agreement: small numbers of which every rank learns the largest, without waiting for the device.

Ranks agree over a group of their own, gloo on the CPU, whatever the gradients travel on. A round that `start` opens is
read by `result` one training step later, when the others' numbers have long arrived: that is how all ranks decide at
the same step that somebody asked to stop or that a checkpoint is finished, although none of them waits for the others
more than the gradients make them wait anyway.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kraken.training.parallel import Mesh


class Agreement:
    """Rounds among the ranks of a mesh, one at a time; every rank must open and read the same ones.

    Args:
        timeout_s: a rank that has waited so long for another raises RuntimeError.
    """

    def __init__(self, mesh: Mesh, timeout_s: float):
        # made by all ranks together, like every group
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if mesh.size > 1 else None
        self._numbers: Tensor | None = None
        self._work: dist.Work | None = None

    def start(self, numbers: Sequence[int]) -> None:
        """Open a round."""
        assert self._numbers is None, "one round at a time"
        self._numbers = torch.tensor(numbers)
        if self._group is not None:
            self._work = dist.all_reduce(self._numbers, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def result(self) -> list[int] | None:
        """The largest of each number in the open round, which this ends; None when there is none."""
        if self._numbers is None:
            return None
        if self._work is not None:
            self._work.wait()
        numbers, self._numbers, self._work = self._numbers.tolist(), None, None
        return numbers

    def largest(self, *numbers: int) -> list[int]:
        """A whole round, which ends an open one without reading it; waits for every rank."""
        self.result()
        self.start(numbers)
        result = self.result()
        assert result is not None
        return result

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order, on rank 0, and nothing on the others; waits for every rank."""
        assert self._numbers is None, "not within a round"
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
