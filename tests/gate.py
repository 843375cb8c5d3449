"""What the engine's thread would otherwise do when it likes, held."""

import asyncio
import threading
from typing import Any

from kraken.engine.batch import ForwardOutput, StepBatch
from kraken.engine.engine import TorchEngine


class Gate:
    """Holds every step of an engine, once planned, until it may go on."""

    def __init__(self, engine: TorchEngine):
        self.num_begun = 0
        self._may_go_on = threading.Semaphore(0)
        self._runner: Any = engine._runner
        self._forward = self._runner.forward
        self._runner.forward = self._held

    def _held(self, batch: StepBatch) -> ForwardOutput:
        self.num_begun += 1
        assert self._may_go_on.acquire(timeout=30), "a step was not let through"
        output: ForwardOutput = self._forward(batch)
        return output

    def go_on(self, num_steps: int = 1) -> None:
        self._may_go_on.release(num_steps)

    def open(self) -> None:
        """Hold nothing any more."""
        self._runner.forward = self._forward
        self.go_on(2)  # one may be held, and one on its way here

    async def until_begun(self, step: int) -> None:
        async with asyncio.timeout(30):
            while self.num_begun < step:
                await asyncio.sleep(0.001)
