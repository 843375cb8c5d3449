"""An engine on several devices gives what one device gives, and says so when a device is gone. CPU, over gloo."""

import asyncio
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gate import Gate
from safetensors.torch import save_file
from test_engine_batching import CONTEXT, KRAKEN, NUM_IDS, VARIANTS, T, assert_equal, requests, run, together

from kraken.config import ConfigError, EngineConfig, ModelConfig
from kraken.convert import WEIGHTS_NAME, to_exchange
from kraken.engine.batch import ForwardOutput, StepBatch
from kraken.engine.distributed.control_channel import SPIN_S, Connection, ConnectionLost, Kind
from kraken.engine.distributed.partition import Part, read_weights, shapes_of, weights_of
from kraken.engine.distributed.rendezvous import Rendezvous
from kraken.engine.engine import TorchEngine
from kraken.engine.protocol import EngineError, EngineInfo, Output, Request, SamplingParams
from kraken.evaluate import collect
from kraken.model.architecture import Kraken, whole_shapes

INFO = EngineInfo(name="torch", context_length=CONTEXT, num_ids=NUM_IDS, eot_id=0, tokenizer_fingerprint="none")
FOUR = {"width": 32, "num_heads": 8, "num_ways": 4}
DIVISIBLE: dict[str, dict[str, Any]] = {
    "kraken_2way": {"num_heads": 4, "num_ways": 2},
    "kraken_4way": FOUR,
    "kraken_modern": FOUR | {"positions": "rope", "activation": "swiglu", "bias": True},
    "delayed_4way": FOUR | {"architecture": "kraken_delayed", "num_layers": 4, "bias": True},
    "standard": {"num_heads": 4, "num_ways": 1, "ffn_multiple": 4, "architecture": "standard"},
    "standard_modern": {"num_heads": 4, "num_ways": 1, "ffn_multiple": 4, "architecture": "standard"}
    | {"positions": "rope", "activation": "swiglu", "bias": True, "width": 32},
    "parallel": {"num_heads": 4, "num_ways": 1, "ffn_multiple": 4, "architecture": "parallel", "bias": True},
}


def make_model(variant: str) -> Kraken:
    """Random weights, large enough that logits differ and biases matter; the vocabulary divides unevenly."""
    torch.manual_seed(1)
    shape = {"num_layers": 3, "width": 24, "context_length": CONTEXT, "vocab_size": 128} | DIVISIBLE[variant]
    model = Kraken(ModelConfig(**shape))
    model.init_weights(seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0) if parameter.dim() > 1 and parameter.std() > 0 else parameter.normal_(1.0, 0.2)
    return model.requires_grad_(False)


def processes_of(engine: TorchEngine) -> list["subprocess.Popen[bytes]"]:
    return list(engine._runner._workers._processes.values())  # type: ignore[attr-defined]


async def until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    ends_at = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < ends_at
        await asyncio.sleep(0.01)


def a_request(name: str, **sampling: Any) -> Request:
    settings = {"max_tokens": 30, "temperature": 0.0} | sampling
    return Request(id=name, prompt_ids=(3, 1, 4, 1, 5), sampling=SamplingParams(**settings))


def test_two_processes_equal_one_and_a_killed_one_is_told() -> None:
    """One start for both, since a process takes seconds to import torch."""
    model, made = make_model("kraken_4way"), requests(8)
    expected = run(model, together(made))

    async def use(engine: TorchEngine) -> list[list[Output]]:
        results = await together(made)(engine)
        gate = Gate(engine)
        aborted = asyncio.create_task(collect(engine, a_request("aborted")))
        await gate.until_begun(1)
        engine.abort("aborted")
        gate.open()
        await aborted
        await until(lambda: engine.stats().num_free_blocks == engine.stats().num_blocks)
        (process,) = processes_of(engine)
        gate = Gate(engine)
        tasks = [asyncio.create_task(collect(engine, a_request(f"k{n}", max_tokens=40))) for n in range(2)]
        await asyncio.sleep(0)  # both are queued
        gate.go_on()
        await gate.until_begun(2)
        os.kill(process.pid, signal.SIGKILL)
        gate.open()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(o, EngineError) and "rank 1 was ended by SIGKILL" in str(o) for o in outcomes), outcomes
        assert not engine.stats().healthy
        with pytest.raises(EngineError, match="failed before"):
            await collect(engine, a_request("later"))
        assert process.poll() is not None
        return results

    found = run(model, use, num_devices=2, num_threads=2, max_batch_size=8, max_step_tokens=24)
    assert_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["overlapped", "blocking"])
@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize("variant", DIVISIBLE)
def test_every_family_on_several_processes_equals_one(variant: str, num_devices: int, overlap: str) -> None:
    model, made = make_model(variant), requests(14)
    if variant == "kraken_2way" and num_devices == 4:
        with pytest.raises(ConfigError, match=r"num_devices=4 does not divide the 2 ways.*choose from \[1, 2\]"):
            run(model, together(made), num_devices=4)
        return
    settings: dict[str, Any] = {"max_batch_size": 8, "kv_cache_tokens": 64, "max_step_tokens": 9}
    expected = run(model, together(made), max_batch_size=1, prefix_reuse=False)
    found = run(model, together(made), num_devices=num_devices, overlap=overlap, num_threads=2, **settings)
    assert_equal(found, expected)


@pytest.mark.slow
def test_messages_too_large_to_exchange_are_reduced() -> None:
    """Three ranks and more use gloo's all-reduce for what a prompt of this width sends."""
    torch.manual_seed(0)
    model = Kraken(
        ModelConfig(num_layers=2, width=512, num_heads=8, num_ways=4, context_length=CONTEXT, vocab_size=128)
    )
    model.init_weights(seed=0)
    request = Request(id="r", prompt_ids=tuple(range(1, 41)), sampling=SamplingParams(max_tokens=4, temperature=0.0))
    assert len(request.prompt_ids) * 512 * 4 > 64 * 1024
    expected = run(model.requires_grad_(False), together([dataclasses.replace(request, num_logprobs=3)]))
    assert_equal(run(model, together([dataclasses.replace(request, num_logprobs=3)]), num_devices=4), expected)


class TestPartition:
    @pytest.mark.parametrize("size", [1, 2, 4])
    @pytest.mark.parametrize("variant", DIVISIBLE)
    def test_parts_are_the_model(self, variant: str, size: int) -> None:
        """Every weight that is divided is held once; nothing is lost."""
        model = make_model(variant)
        if model.config.num_ways == 2 and size == 4:
            pytest.skip("two ways")
        parts = [weights_of(model, Part(model.config, rank, size)) for rank in range(size)]
        for name, whole in model.named_parameters():
            held = [part[name] for part in parts]
            if held[0].shape == whole.shape:
                assert all(torch.equal(each, whole) for each in held)
            else:
                together = torch.cat([each.flatten() for each in held]).sort().values
                assert torch.equal(together, whole.detach().flatten().sort().values), name
        shapes = shapes_of(Part(model.config, size - 1, size))
        assert {name: weight.shape for name, weight in parts[-1].items()} == shapes
        assert shapes.keys() == whole_shapes(model.config).keys()

    def test_a_folder_is_read_in_part(self, tmp_path: Path) -> None:
        for variant in ("kraken_modern", "standard_modern"):
            model = make_model(variant)
            save_file(to_exchange(model), tmp_path / WEIGHTS_NAME)
            for rank in range(2):
                part = Part(model.config, rank, 2)
                expected = weights_of(model, part)
                found = read_weights(tmp_path, part, torch.float32, torch.device("cpu"))
                assert found.keys() == expected.keys()
                assert all(torch.equal(found[name], expected[name]) for name in found)

    def test_what_cannot_be_divided_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"num_devices=2 does not divide the 3 ways .*choose from \[1, 3\]"):
            Part(ModelConfig(num_layers=1, width=24, context_length=8, vocab_size=128, **KRAKEN), 0, 2)
        with pytest.raises(ConfigError, match=r"num_devices=2 does not divide the 3 heads"):
            Part(ModelConfig(num_layers=1, width=24, context_length=8, vocab_size=128, **VARIANTS["standard"]), 0, 2)


@pytest.mark.parametrize("delay_s", [0.0, SPIN_S / 2, 5 * SPIN_S])
def test_who_spins_hears_the_same(delay_s: float) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    speaker = Connection(socket.create_connection(server.getsockname()))
    listener = Connection(server.accept()[0])
    for step in (b"one", b""):
        timer = threading.Timer(delay_s, speaker.send, (Kind.STEP, step))
        timer.start()
        assert listener.receive(spins=True) == (Kind.STEP, step)
        timer.join()
    speaker.close()
    with pytest.raises(ConnectionLost):
        listener.receive(spins=True)
    listener.close()
    server.close()


class TestFailure:
    """Slow, since every test starts processes."""

    pytestmark = pytest.mark.slow

    def run(self, use: Callable[[TorchEngine], Awaitable[T]], **config: Any) -> T:
        return run(make_model("kraken_4way"), use, num_threads=2, **config)

    @pytest.mark.parametrize("num_devices", [2, 4])
    def test_an_idle_engine_notices(self, num_devices: int) -> None:
        async def use(engine: TorchEngine) -> None:
            assert engine.stats().healthy
            processes = processes_of(engine)
            os.kill(processes[-1].pid, signal.SIGKILL)
            await until(lambda: not engine.stats().healthy)
            with pytest.raises(EngineError, match=f"rank {num_devices - 1} was ended by SIGKILL"):
                await collect(engine, a_request("later"))
            await engine.close()
            assert all(process.poll() is not None for process in processes)

        self.run(use, num_devices=num_devices)

    def test_a_stuck_rank_is_waited_for_no_longer_than_asked(self) -> None:
        async def use(engine: TorchEngine) -> None:
            (process,) = processes_of(engine)
            os.kill(process.pid, signal.SIGSTOP)
            with pytest.raises(EngineError, match="rank 1 sent nothing for 2 s"):
                await collect(engine, a_request("r"))
            assert not engine.stats().healthy

        self.run(use, num_devices=2, collective_timeout_s=2.0)

    def test_a_rank_that_fails_says_why(self) -> None:
        """Its own words reach whoever waits for an answer."""

        async def use(engine: TorchEngine) -> None:
            workers = engine._runner._workers  # type: ignore[attr-defined]
            send = workers.send
            # an id that only the other rank is told: its embedding has no such row
            workers.send = lambda kind, payload=b"": send(
                kind, StepBatch.concatenate([[2**20]], [0], [[0]], [1], 4).to_bytes()
            )
            with pytest.raises(EngineError, match=r"rank 1 failed: IndexError"):
                await collect(engine, a_request("r"))
            workers.send = send

        self.run(use, num_devices=2)

    def test_an_exception_in_one_request_stops_no_other(self) -> None:
        made = requests(3, temperature=0.0)

        async def use(engine: TorchEngine) -> list[Any]:
            forward = engine._runner.forward

            @torch.inference_mode()
            def poisoned(batch: StepBatch) -> ForwardOutput:
                output = forward(batch)
                for row, token_id in enumerate(batch.token_ids_T[batch.logit_rows()]):
                    if token_id == 7:
                        output.logits_RV[row] = torch.nan
                return output

            engine._runner.forward = poisoned  # type: ignore[method-assign]
            bad = Request(id="bad", prompt_ids=(1, 7), sampling=SamplingParams(max_tokens=3))
            results = await asyncio.gather(
                collect(engine, bad), *(collect(engine, r) for r in made), return_exceptions=True
            )
            assert engine.stats().healthy
            return list(results)

        bad, *good = self.run(use, num_devices=2)
        assert isinstance(bad, EngineError) and "not finite" in str(bad)
        assert all(isinstance(outputs, list) for outputs in good)

    def test_the_followers_end_with_the_leader(self) -> None:
        """A leader that is killed leaves nobody behind."""
        code = (
            "import sys, time; sys.path[:0] = ['tests', '.']\n"
            "from test_engine_devices import *\n"
            "config = EngineConfig(device='cpu', num_devices=2)\n"
            "engine = TorchEngine.from_model(make_model('kraken_4way'), INFO, config)\n"
            "print(processes_of(engine)[0].pid, flush=True)\n"
            "time.sleep(600)\n"
        )
        leader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        try:
            assert leader.stdout is not None
            follower = int(leader.stdout.readline())
            assert Path(f"/proc/{follower}").exists()
        finally:
            leader.kill()
            leader.wait()
        ends_at = time.monotonic() + 10
        while Path(f"/proc/{follower}").exists() and "Z" not in Path(f"/proc/{follower}/stat").read_text().split()[2]:
            assert time.monotonic() < ends_at
            time.sleep(0.05)

    def test_a_rank_that_does_not_come_is_named(self) -> None:
        config = EngineConfig(device="cpu", num_devices=2, startup_timeout_s=1.0)
        with pytest.raises(EngineError, match=r"ranks \[1\] did not connect to 127.0.0.1"):
            TorchEngine.from_model(make_model("kraken_2way"), INFO, config, Rendezvous(2))

    def test_ranks_that_exist_already_are_invited(self) -> None:
        """As Ray's actors are: somebody else starts the process, which has nothing but its invitation."""
        model, made = make_model("standard"), requests(4)
        expected = run(model, together(made))
        rendezvous = Rendezvous(2)
        code = (
            "import sys; from kraken.engine.distributed.worker import run_worker, JoinToken; "
            "run_worker(JoinToken.from_json(sys.argv[1]))"
        )
        guest = subprocess.Popen([sys.executable, "-c", code, rendezvous.join_token(1).to_json()])
        config = EngineConfig(device="cpu", num_devices=2, num_threads=2, dtype="float32")

        async def main() -> list[list[Output]]:
            engine = TorchEngine.from_model(model, INFO, config, rendezvous)
            try:
                return await together(made)(engine)
            finally:
                await engine.close()

        try:
            assert_equal(asyncio.run(main()), expected)
            assert guest.wait(10) == 0
        finally:
            guest.kill()
            guest.wait()
