"""An engine on several GPUs gives what one gives. Where there is one GPU, all ranks are on it, and NCCL is left out.

The weights are small, and in an exchange folder, since only NCCL sends them.
"""

import asyncio
import dataclasses
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from kraken.config import EngineConfig, ModelConfig
from kraken.convert import WEIGHTS_NAME, to_exchange
from kraken.engine.distributed import choose_backend as choose_backend
from kraken.engine.distributed.rendezvous import Rendezvous
from kraken.engine.distributed.setup import WeightSource
from kraken.engine.distributed.worker_group import WorkerError
from kraken.engine.engine import TorchEngine
from kraken.engine.kernels.torch.linear import TorchLinear
from kraken.engine.protocol import EngineError, EngineInfo, Output, PromptOutput, Request, SamplingParams, TokenOutput
from kraken.evaluate import collect
from kraken.model import Kraken

pytestmark = pytest.mark.gpu

NUM_IDS, CONTEXT = 120, 48
INFO = EngineInfo(name="torch", context_length=CONTEXT, num_ids=NUM_IDS, eot_id=0, tokenizer_fingerprint="none")
BASELINE: dict[str, Any] = {"num_heads": 4, "num_ways": 1, "ffn_multiple": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "kraken_2way": {"num_heads": 4, "num_ways": 2},
    "kraken_4way": {"width": 32, "num_heads": 8, "num_ways": 4, "bias": True},
    "kraken_modern": {"num_heads": 4, "num_ways": 2, "positions": "rope", "activation": "swiglu", "num_layers": 2},
    "delayed_4way": {"width": 32, "num_heads": 8, "num_ways": 4, "architecture": "kraken_delayed", "num_layers": 4},
    "standard": BASELINE | {"architecture": "standard"},
    "parallel": BASELINE | {"architecture": "parallel", "bias": True},
}
HAS_TWO = torch.cuda.device_count() > 1
BACKENDS = ["p2p", "copy_engine", *(["nccl", "auto"] if HAS_TWO else [])]
COPY_ENGINE = (
    "from kraken.engine.distributed import choose_backend, worker\n"
    "choose_backend._candidates = lambda *_: ['copy_engine']\n"
    "worker.main()"
)
"""A worker with the backend that is seldom the fastest for small messages."""


def make_source(variant: str, folder: Path) -> WeightSource:
    """Random weights, large enough that logits differ and biases matter."""
    torch.manual_seed(1)
    shape = {"num_layers": 3, "width": 24, "context_length": CONTEXT, "vocab_size": 128} | VARIANTS[variant]
    model = Kraken(ModelConfig(**shape))
    model.init_weights(seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0) if parameter.dim() > 1 and parameter.std() > 0 else parameter.normal_(1.0, 0.2)
    save_file(to_exchange(model), folder / WEIGHTS_NAME)
    return WeightSource(config=model.config, folder=folder)


@pytest.fixture(scope="module", params=VARIANTS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> WeightSource:
    return make_source(request.param, tmp_path_factory.mktemp(request.param))


def requests(count: int) -> list[Request]:
    """Greedy, drawn and truncated; short and long, some with a common beginning, some scored."""
    numbers = random.Random(count)
    common = [numbers.randrange(NUM_IDS) for _ in range(13)]
    made = []
    for index in range(count):
        own = [numbers.randrange(NUM_IDS) for _ in range(numbers.randrange(1, 18))]
        made.append(
            Request(
                id=f"r{index}",
                prompt_ids=tuple(common + own if index % 3 == 0 else own),
                sampling=SamplingParams(
                    max_tokens=numbers.randrange(1, 12),
                    seed=index,
                    temperature=float(index % 2),
                    top_k=5 if index % 4 == 3 else 0,
                ),
                num_logprobs=2,
                prompt_logprobs=index % 4 == 1,
            )
        )
    return made


def run(source: WeightSource, made: list[Request], backend: str = "auto", **config: Any) -> list[list[Output]]:
    """All requests at once, then the first of them alone."""
    settings = {"device": "cuda", "dtype": "float32", "tokens_per_block": 4, "max_batch_size": 4, "max_step_tokens": 24}
    num_devices = config.get("num_devices", 1)
    setting: Any = "p2p" if backend == "copy_engine" else backend

    async def main() -> list[list[Output]]:
        engine_config = EngineConfig(**(settings | config), all_reduce=setting)
        rendezvous = None
        if num_devices > 1:  # invited, so that they may share a GPU
            rendezvous = Rendezvous(num_devices)
            prefix = [sys.executable, "-c", COPY_ENGINE] if backend == "copy_engine" else []
            rendezvous.launch(1, dict.fromkeys(range(1, num_devices), prefix))
        device = torch.device("cuda")
        dtype = getattr(torch, engine_config.dtype)
        engine = TorchEngine._open(source, INFO, engine_config, device, dtype, rendezvous)
        try:
            results = await asyncio.gather(*(collect(engine, request) for request in made))
            results.append(await collect(engine, dataclasses.replace(made[0], id="alone")))
            assert engine.stats().num_free_blocks == engine.stats().num_blocks
            return results
        finally:
            await engine.close()

    return asyncio.run(main())


@pytest.fixture(scope="module")
def alone(source: WeightSource) -> list[list[Output]]:
    return run(source, requests(8), cuda_graphs=False)


def assert_equal(found: list[list[Output]], expected: list[list[Output]]) -> None:
    assert len(found) == len(expected)
    for outputs, others in zip(found, expected, strict=True):
        assert [type(output) for output in outputs] == [type(other) for other in others]
        for output, other in zip(outputs, others, strict=True):
            if isinstance(output, TokenOutput) and isinstance(other, TokenOutput):
                assert output.token_id == other.token_id
                assert output.logprobs is not None and other.logprobs is not None
                assert output.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-4)
            elif isinstance(output, PromptOutput) and isinstance(other, PromptOutput):
                for score, reference in zip(output.logprobs, other.logprobs, strict=True):
                    assert (score is None) == (reference is None)
                    if score is not None and reference is not None:
                        assert score.logprob == pytest.approx(reference.logprob, abs=1e-4)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("overlap", ["overlapped", "blocking"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_equal_one(
    source: WeightSource,
    alone: list[list[Output]],
    backend: str,
    overlap: str,
    cuda_graphs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if overlap == "blocking" and not source.config.is_kraken:
        pytest.skip("the baselines wait in either mode")
    if backend == "copy_engine":
        if not source.config.is_kraken or overlap == "blocking":
            pytest.skip("only all-reduces in flight during attention are copied")
        monkeypatch.setattr(choose_backend, "_candidates", lambda *_: ["copy_engine"])
    found = run(source, requests(8), backend, num_devices=2, overlap=overlap, cuda_graphs=cuda_graphs)
    assert_equal(found, alone)


def test_four_ranks_equal_one(source: WeightSource, alone: list[list[Output]]) -> None:
    if source.config.num_ways == 2:
        pytest.skip("two ways")
    assert_equal(run(source, requests(8), "p2p", num_devices=4), alone)


class TestFailure:
    """Of one rank of two, which the other would wait for on its device."""

    CONFIG = EngineConfig(
        device="cuda", dtype="float32", num_devices=2, all_reduce="p2p", max_batch_size=4, max_step_tokens=24
    )

    def open(self, folder: Path, rendezvous: Rendezvous, **config: Any) -> TorchEngine:
        source = make_source("kraken_2way", folder)
        engine_config = dataclasses.replace(self.CONFIG, **config)
        return TorchEngine._open(source, INFO, engine_config, torch.device("cuda"), torch.float32, rendezvous)

    @pytest.mark.skipif(HAS_TWO, reason="for one GPU")
    def test_nccl_refuses_ranks_that_share_a_gpu(self, tmp_path: Path) -> None:
        rendezvous = Rendezvous(2)
        rendezvous.launch(1)
        with pytest.raises(WorkerError):
            self.open(tmp_path, rendezvous, all_reduce="auto", startup_timeout_s=120.0)

    def test_a_rank_that_fails_to_capture_graphs_is_named(self, tmp_path: Path) -> None:
        failing = (
            "from kraken.engine import model_runner as runner\n"
            "from kraken.engine.distributed import worker\n"
            "def capture_graphs(self, sizes): raise ValueError('no graph today')\n"
            "runner.ModelRunner.capture_graphs = capture_graphs; worker.main()"
        )
        rendezvous = Rendezvous(2)
        rendezvous.launch(1, {1: [sys.executable, "-c", failing]})
        with pytest.raises(WorkerError, match=r"rank 1 failed: ValueError: no graph today"):
            self.open(tmp_path, rendezvous)
        torch.cuda.synchronize()  # nothing waits any more

    def test_a_killed_rank_is_told(self, tmp_path: Path) -> None:
        rendezvous = Rendezvous(2)
        rendezvous.launch(1)

        async def main() -> None:
            engine = self.open(tmp_path, rendezvous)
            try:
                rendezvous._processes[1].kill()
                sampling = SamplingParams(max_tokens=30, temperature=0.0)
                with pytest.raises(EngineError, match="rank 1 was ended by SIGKILL"):
                    await collect(engine, Request(id="r", prompt_ids=(1, 2, 3), sampling=sampling))
                assert not engine.stats().healthy
            finally:
                await engine.close()

        asyncio.run(main())
        torch.cuda.synchronize()

    def test_a_stuck_rank_is_waited_for_no_longer_than_asked(self, tmp_path: Path) -> None:
        rendezvous = Rendezvous(2)
        rendezvous.launch(1)

        async def main() -> None:
            engine = self.open(tmp_path, rendezvous, collective_timeout_s=20.0)
            try:
                os.kill(rendezvous._processes[1].pid, signal.SIGSTOP)
                sampling = SamplingParams(max_tokens=3, temperature=0.0)
                with pytest.raises(EngineError, match="a step took longer than engine.collective_timeout_s"):
                    await collect(engine, Request(id="r", prompt_ids=(1, 2, 3), sampling=sampling))
            finally:
                await engine.close()

        asyncio.run(main())
        torch.cuda.synchronize()


def test_graphs_of_one_gpu_equal_it_without(source: WeightSource, alone: list[list[Output]]) -> None:
    assert_equal(run(source, requests(8), cuda_graphs=True), alone)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_float8_is_near_bfloat16(num_devices: int, tmp_path: Path) -> None:
    """The mean distance of the log-probabilities of prompts: with graphs, and with norms quantised by their kernels."""
    source = make_source("kraken_4way", tmp_path)
    made = [dataclasses.replace(request, prompt_logprobs=True) for request in requests(8)]

    def scores(**config: Any) -> torch.Tensor:
        outputs = [outputs[0] for outputs in run(source, made, "auto", dtype="bfloat16", **config)]
        prompts = [output.logprobs for output in outputs if isinstance(output, PromptOutput)]
        return torch.tensor([score.logprob for prompt in prompts for score in prompt if score is not None])

    plain, quantised = scores(), scores(quantization="fp8", num_devices=num_devices)
    assert 0.0 < (quantised - plain).abs().mean() < 0.3


def test_gelu_in_the_products_kernel_is_the_tanh_form() -> None:
    torch.manual_seed(0)
    weight_1OI, bias_1O = torch.randn(1, 96, 64, device="cuda"), torch.randn(1, 96, device="cuda")
    x_1TI = torch.randn(1, 7, 64, device="cuda")
    for bias in (None, bias_1O):
        linear = TorchLinear(weight_1OI.bfloat16(), None if bias is None else bias.bfloat16(), "gelu")
        y_TO = x_1TI.bfloat16()[0].double() @ weight_1OI[0].bfloat16().double().t()
        y_TO = y_TO if bias is None else y_TO + bias[0].bfloat16().double()
        expected_TO = F.gelu(y_TO, approximate="tanh")
        torch.testing.assert_close(linear(x_1TI.bfloat16())[0].double(), expected_TO, rtol=2**-7, atol=0.01)


@pytest.mark.skipif(not HAS_TWO, reason="for several GPUs")
def test_one_engine_after_the_other_over_nccl(source: WeightSource, alone: list[list[Output]]) -> None:
    """Closing an engine frees its graphs before its process group; otherwise NCCL waits for them for ever."""
    for _ in range(2):
        assert_equal(run(source, requests(8), "nccl", num_devices=2, cuda_graph_sizes=(1, 4, 16)), alone)


@pytest.mark.skipif(not HAS_TWO, reason="for several GPUs")
def test_kernels_that_fill_the_device_wait_for_nothing_behind_them() -> None:
    """Rows so wide, and so many, that whoever waits keeps every multiprocessor: all methods and sizes are tried."""
    shape = ModelConfig(
        num_layers=6, width=3520, num_heads=110, num_ways=2, ffn_multiple=1, context_length=2048, vocab_size=128
    )
    config = EngineConfig(
        device="cuda", dtype="bfloat16", num_devices=2, max_batch_size=1, max_step_tokens=2048, kv_cache_tokens=4096,
        cuda_graph_sizes=(2048,), prefix_reuse=False,
    )  # fmt: skip
    info = dataclasses.replace(INFO, context_length=2048)

    async def main() -> None:
        engine = TorchEngine.from_shape(shape, info, config)
        try:
            for index in range(50):
                sampling = SamplingParams(max_tokens=1, temperature=0.0)
                prompt = tuple(numbers.randrange(NUM_IDS) for _ in range(2000))
                assert len(await collect(engine, Request(id=str(index), prompt_ids=prompt, sampling=sampling))) == 1
        finally:
            await engine.close()

    numbers = random.Random(0)
    asyncio.run(main())
