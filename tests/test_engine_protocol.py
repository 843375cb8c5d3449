"""One suite for every engine: PyTorch, echo, TensorRT-LLM over processes and over Ray (both on the stand-in).

`test_engine_settings.py` checks that every engine honours or refuses each setting.
"""

import asyncio
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from protocol_checks import CHECKS, CONFIG, EngineActor, make_exchange, request, the_numbers_are_ours
from trtllm_ranks import environment

from kraken.choose_engine import Choice, open_engine
from kraken.engine.echo import EchoEngine
from kraken.engine.engine import TorchEngine
from kraken.engine.protocol import Engine, EngineError
from kraken.evaluate import collect
from kraken.trtllm.engine import TensorRTEngine
from kraken.trtllm.tree import marked


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_exchange(tmp_path_factory.mktemp("exchange"))


class Local:
    """An engine of this process, on a loop of its own."""

    def __init__(self, engine: Engine, exchange: Path):
        self.engine, self._exchange, self._runner = engine, exchange, asyncio.Runner()

    def run(self, name: str) -> None:
        numbers = the_numbers_are_ours(self.engine, self._exchange) if name == NUMBERS else None
        self._runner.run(numbers or CHECKS[name](self.engine))

    def close(self) -> None:
        async def run() -> None:
            stream = self.engine.generate(request("cut", draw={"max_tokens": 40}))
            await anext(stream)
            await self.engine.close()
            with pytest.raises(EngineError, match="closed"):
                while True:
                    await anext(stream)
            with pytest.raises(EngineError, match="closed"):
                await collect(self.engine, request("late"))
            await self.engine.close()

        self._runner.run(run())
        self._runner.close()


class Remote:
    """The engine over Ray, in an actor."""

    def __init__(self, exchange: Path, words: str):
        import ray
        from ray.util import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._group = placement_group([{"CPU": 0.2}] * 3)
        self._actor = (
            ray.remote(num_cpus=0, max_concurrency=8)(EngineActor)
            .options(
                runtime_env={
                    "env_vars": {
                        "PYTHONPATH": environment()["PYTHONPATH"] + os.pathsep + str(Path(__file__).parent),
                        "FAKE_TRTLLM": words,
                        "SLURM_PROCID": "0",
                    }
                },
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._group,
                    placement_group_bundle_index=0,
                    placement_group_capture_child_tasks=True,
                ),
            )
            .remote()
        )
        self.call("start", exchange, (1, 2))

    def call(self, method: str, *args: Any) -> None:
        import ray

        ray.get(getattr(self._actor, method).remote(*args), timeout=120)

    def run(self, name: str) -> None:
        self.call("run", name)

    def close(self) -> None:
        import ray
        from ray.util import remove_placement_group

        try:
            self.call("close")
        finally:
            ray.kill(self._actor)
            remove_placement_group(self._group)


@contextmanager
def opened(kind: str, exchange: Path) -> Iterator[Local | Remote]:
    if kind == OVER_RAY:
        remote = Remote(exchange, "canned,reject-8")
        yield remote
        remote.close()
        return
    if kind == "tensorrt_llm":
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment().items():
                patch.setenv(name, value)
            trtllm = open_engine(Choice("tensorrt_llm", "asked for"), exchange, CONFIG)
            local = Local(trtllm, exchange)
            yield local
            local.close()
            assert isinstance(trtllm, TensorRTEngine) and marked(trtllm.backend.mark) == []  # type: ignore[attr-defined]
        return
    engine: Engine = TorchEngine.from_exchange(exchange, replace(CONFIG, kind="torch", device="cpu"))
    if kind == "echo":
        limits = replace(CONFIG, dtype="auto")
        engine = EchoEngine(replace(engine.info, name="echo"), token_delay_s=0.001, config=limits)
    local = Local(engine, exchange)
    yield local
    local.close()


class Subjects:
    """One engine at a time, which starts once for all that is checked of it."""

    def __init__(self, exchange: Path):
        self._exchange, self._kind, self._stack = exchange, "", ExitStack()
        self._subject: Local | Remote | None = None

    def get(self, kind: str) -> Local | Remote:
        if kind != self._kind:
            self.close()
            self._kind, self._subject = kind, self._stack.enter_context(opened(kind, self._exchange))
        assert self._subject is not None
        return self._subject

    def close(self) -> None:
        self._kind = ""
        self._stack.close()


@pytest.fixture(scope="module")
def subjects(exchange: Path) -> Iterator[Subjects]:
    found = Subjects(exchange)
    yield found
    found.close()


NUMBERS = the_numbers_are_ours.__name__
OVER_RAY = "tensorrt_llm over Ray"
CASES = {
    "torch": [*CHECKS, NUMBERS],
    "echo": [*CHECKS],
    "tensorrt_llm": [*CHECKS, NUMBERS],
    OVER_RAY: [
        *CHECKS,
        EngineActor.a_request_that_is_never_answered_fails_by_its_id.__name__,
        EngineActor.a_constructor_that_blocks_does_not_stop_the_clock.__name__,
    ],
}
"""Engine -> its checks, in the order in which one instance of the engine runs them; the engine over Ray starts three
processes, so it is started once."""


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[pytest.mark.ray, pytest.mark.slow] if kind == OVER_RAY else [])
        for kind, names in CASES.items()
        for name in names
    ],
)
def test_every_engine_keeps_the_protocol(
    kind: str, name: str, subjects: Subjects, request: pytest.FixtureRequest
) -> None:
    if kind == OVER_RAY:
        request.getfixturevalue("ray_cluster")
    subjects.get(kind).run(name)
