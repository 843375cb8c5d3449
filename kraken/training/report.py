"""What is reported of a run: everything between two reports, put together into one set of metrics."""

import resource
import sys
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from kraken.checkpoint.history import History
from kraken.config import RunConfig
from kraken.plan.cost import training_flops_per_token
from kraken.stopwatch import Stopwatch
from kraken.training.checkpointer import Checkpointer
from kraken.training.control_all_reduce import ControlAllReduce
from kraken.training.optim import learning_rate
from kraken.training.parallel import Mesh
from kraken.training.rate import matrix_rate


class Reporter:
    """Counts from one report to the next, on every rank.

    Args:
        compute: the type of the model's products, whose rate is measured here for `mfu`.
        first_step: where this process begins; `history` is of the steps before.
        interval: what a checkpoint kept of the steps after its last report, as `interval` gives it.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        control: ControlAllReduce,
        checkpointer: Checkpointer,
        compute: torch.dtype,
        first_step: int,
        history: History,
        interval: Mapping[str, float],
    ):
        self._config, self._mesh, self._control, self._checkpointer = config.train, mesh, control, checkpointer
        self._tokens_per_step = config.train.sequences_per_step * config.model.context_length
        self._flops_per_token = training_flops_per_token(config.model)
        (self._matrix_rate,) = control.largest(int(matrix_rate(compute, mesh.device)))
        self._first_step, self._seconds_before = first_step, history[-1]["seconds"] if history else 0.0
        self._skipped = int(history[-1].get("skipped_steps", 0)) if history else 0
        self.data = Stopwatch()
        """Runs while this rank's host waits for a batch."""
        mine = interval.get("loss_sum", 0.0) if mesh.data_rank == 0 else 0.0
        self._loss_sum = torch.tensor(mine, device=mesh.device, dtype=torch.float64)
        self.num_steps = int(interval.get("steps", 0))
        """Steps since the last report, skipped ones included."""
        self._num_untimed = self.num_steps  # of these, those of a process before this one
        self.num_bad = int(interval.get("bad", 0))
        """Of these, those that were skipped."""
        self._started_at = self._interval_started_at = time.monotonic()

    def add(self, loss: Tensor) -> None:
        """Count a step; `loss` is this data rank's part of it, and stays on the device."""
        self._loss_sum += loss
        self.num_steps += 1

    def interval(self) -> dict[str, float]:
        """What is counted since the last report, for a checkpoint, so that a resumed run reports the same losses."""
        if self.num_steps == 0:
            return {}
        loss_sum = float(self._mesh.sum(self._loss_sum.clone()))
        return {"loss_sum": loss_sum, "steps": self.num_steps, "bad": self.num_bad}

    def report(self, done: int, grad_norm: Tensor) -> dict[str, float]:
        """The metrics since the last report, and a new start; equal on every rank.

        `loss` is the objective: its softmax is over the padded vocabulary, that of the validation over the tokenizer's
        ids.

        Times in data, in checkpoints and in communication are of the rank that spent most in each, in seconds.
        """
        c, mesh = self._config, self._mesh
        num_good = self.num_steps - self.num_bad
        # the sum waits for the device, so that the clock is read when the steps are done
        loss = float(mesh.sum(self._loss_sum)) / num_good if num_good else float("nan")
        now = time.monotonic()
        seconds = now - self._interval_started_at
        in_checkpoint = self._checkpointer.waiting.read() + self._checkpointer.snapshot_waiting.read()
        times = (self.data.read(), in_checkpoint, mesh.communication.read())
        *micros, peak = self._control.largest(*(int(t * 1e6) for t in times), peak_bytes(mesh.device))
        self._skipped += self.num_bad
        tokens_per_second = (self.num_steps - self._num_untimed) * self._tokens_per_step / seconds
        report = {
            "step": float(done),
            "loss": loss,
            "learning_rate": learning_rate(c, done - 1),
            "grad_norm": float(grad_norm),
            "tokens": float(done * self._tokens_per_step),
            "tokens_per_second": tokens_per_second,
            "tokens_per_second_per_device": tokens_per_second / mesh.size,
            "mfu": tokens_per_second / mesh.size * self._flops_per_token / self._matrix_rate,
            "peak_memory_bytes": float(peak),
            "seconds_in_data": micros[0] / 1e6,
            "seconds_in_checkpoint": micros[1] / 1e6,
            "seconds_in_communication": micros[2] / 1e6,
            "skipped_steps": float(self._skipped),
            "failed_checkpoints": float(self._checkpointer.num_failed),
            "seconds": self._seconds_before + now - self._started_at,
            "seconds_left": (c.steps - done) * (now - self._started_at) / (done - self._first_step),
        }
        self._loss_sum.zero_()
        self.num_steps = self.num_bad = self._num_untimed = 0
        return report

    def restart_clock(self) -> None:
        """The next interval begins now: what came since the report, such as validation, is no part of it."""
        self._interval_started_at = time.monotonic()


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has used until now: of CUDA's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
