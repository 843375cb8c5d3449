"""Paged batching: every way of computing a request must give the same tokens and log-probabilities."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from gate import Gate

from kraken.config import EngineConfig, ModelConfig
from kraken.engine.engine import TorchEngine
from kraken.engine.protocol import EngineInfo, Output, PromptOutput, Request, SamplingParams, TokenOutput
from kraken.evaluate import collect
from kraken.model import Kraken

T = TypeVar("T")

NUM_IDS = 120
CONTEXT = 48
SHAPE: dict[str, Any] = {"num_layers": 2, "width": 24, "context_length": CONTEXT, "vocab_size": 128}
KRAKEN: dict[str, Any] = {"num_heads": 6, "num_ways": 3}
BASELINE: dict[str, Any] = {"num_heads": 3, "num_ways": 1, "ffn_multiple": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "kraken": KRAKEN,
    "one_way": {"num_heads": 2, "num_ways": 1},
    "bias": KRAKEN | {"bias": True},
    "rope": KRAKEN | {"positions": "rope"},
    "swiglu": KRAKEN | {"activation": "swiglu", "bias": True},
    "delayed": KRAKEN | {"architecture": "kraken_delayed", "num_layers": 4},
    "standard": BASELINE | {"architecture": "standard"},
    "standard_modern": BASELINE
    | {"architecture": "standard", "positions": "rope", "activation": "swiglu", "bias": True},
    "parallel": BASELINE | {"architecture": "parallel"},
}


def make_model(variant: str) -> Kraken:
    """Random weights, large enough that logits differ and biases matter."""
    torch.manual_seed(1)
    model = Kraken(ModelConfig(**(SHAPE | VARIANTS[variant])))
    model.init_weights(seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0) if parameter.dim() > 1 and parameter.std() > 0 else parameter.normal_(1.0, 0.2)
    return model.requires_grad_(False)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> Iterator[Kraken]:
    yield make_model(request.param)


@pytest.fixture(scope="module")
def apart(model: Kraken) -> list[list[Output]]:
    """What requests get that have the engine to themselves, one after the other."""
    return run(model, one_by_one(requests(14)), max_batch_size=1, prefix_reuse=False)


def run(model: Kraken, use: Callable[[TorchEngine], Awaitable[T]], **config: Any) -> T:
    info = EngineInfo(name="torch", context_length=CONTEXT, num_ids=NUM_IDS, eot_id=0, tokenizer_fingerprint="none")
    settings = {"device": "cpu", "dtype": "float32", "num_threads": 1, "tokens_per_block": 4} | config

    async def main() -> T:
        engine = TorchEngine.from_model(model, info, EngineConfig(**settings))
        try:
            result = await use(engine)
            assert engine.stats().num_free_blocks == engine.stats().num_blocks
            return result
        finally:
            await engine.close()

    return asyncio.run(main())


def requests(count: int, **sampling: Any) -> list[Request]:
    """Greedy and seeded, short and long, some with a common beginning."""
    numbers = random.Random(count)
    common = [numbers.randrange(NUM_IDS) for _ in range(13)]
    made = []
    for index in range(count):
        own = [numbers.randrange(NUM_IDS) for _ in range(numbers.randrange(1, 18))]
        params = {"max_tokens": numbers.randrange(1, 18), "temperature": float(index % 2), "seed": index} | sampling
        made.append(
            Request(
                id=f"r{index}",
                prompt_ids=tuple(common + own if index % 3 == 0 else own),
                sampling=SamplingParams(**params),
                num_logprobs=2,
                prompt_logprobs=index % 4 == 1,
            )
        )
    return made


def together(made: list[Request]) -> Callable[[TorchEngine], Awaitable[list[list[Output]]]]:
    async def use(engine: TorchEngine) -> list[list[Output]]:
        gate = Gate(engine)
        results = asyncio.gather(*(collect(engine, request) for request in made))
        await asyncio.sleep(0)  # all are queued
        gate.open()
        return await results

    return use


def one_by_one(made: list[Request]) -> Callable[[TorchEngine], Awaitable[list[list[Output]]]]:
    async def use(engine: TorchEngine) -> list[list[Output]]:
        return [await collect(engine, request) for request in made]

    return use


def by_whole_passes(model: Kraken, request: Request) -> list[torch.Tensor]:
    """Log-probabilities [ids] before every token after the first, by one forward pass without any cache."""
    outputs = run(model, lambda engine: collect(engine, request))
    ids = [*request.prompt_ids, *(o.token_id for o in outputs if isinstance(o, TokenOutput))]
    logits_TV = model(torch.tensor([ids[:-1]]))[0, :, :NUM_IDS]
    return list(logits_TV.log_softmax(-1))


def assert_equal(found: list[list[Output]], expected: list[list[Output]]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if isinstance(a, PromptOutput):
                assert isinstance(b, PromptOutput)
                pairs = list(zip(a.logprobs, b.logprobs, strict=True))
            else:
                assert isinstance(b, TokenOutput)
                assert (a.token_id, a.finish_reason) == (b.token_id, b.finish_reason)
                pairs = [(a.logprobs, b.logprobs)]
            for x, y in pairs:
                if x is None or y is None:
                    assert x is y
                    continue
                assert (x.token_id, len(x.top)) == (y.token_id, len(y.top))
                assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
                assert [v for _, v in x.top] == pytest.approx([v for _, v in y.top], abs=1e-4)


def test_cached_equals_the_full_forward(model: Kraken) -> None:
    for request in requests(5, temperature=0.0, max_tokens=8):
        expected = by_whole_passes(model, request)
        outputs = run(model, lambda engine, r=request: collect(engine, r))
        start = len(request.prompt_ids)
        for index, output in enumerate(o for o in outputs if isinstance(o, TokenOutput)):
            row_V = expected[start - 1 + index]
            assert output.token_id == int(row_V.argmax())
            assert output.logprobs and output.logprobs.logprob == pytest.approx(float(row_V.max()), abs=1e-4)
        for output in outputs:
            if isinstance(output, PromptOutput):
                scores = [entry.logprob for entry in output.logprobs if entry]
                wanted = [float(expected[i][token]) for i, token in enumerate(request.prompt_ids[1:])]
                assert scores == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"max_batch_size": 8}, id="many"),
        pytest.param({"max_batch_size": 8, "max_step_tokens": 8}, id="chunked"),
        pytest.param({"max_batch_size": 3, "max_step_tokens": 5, "prefix_reuse": False}, id="chunked_without_reuse"),
        pytest.param({"max_batch_size": 8, "kv_cache_tokens": 48}, id="preempted"),
        pytest.param({"max_batch_size": 8, "kv_cache_tokens": 48, "max_step_tokens": 9}, id="preempted_and_chunked"),
        pytest.param({"max_batch_size": 8, "tokens_per_block": 1}, id="blocks_of_one"),
    ],
)
def test_sharing_the_engine_changes_nothing(model: Kraken, apart: list[list[Output]], config: dict[str, Any]) -> None:
    assert_equal(run(model, together(requests(14)), **config), apart)


def test_the_tests_above_preempt_and_reuse() -> None:
    async def use(engine: TorchEngine) -> tuple[int, int]:
        await together(requests(14))(engine)
        return engine.stats().num_preempted, engine.stats().reused_tokens

    num_preempted, reused = run(make_model("kraken"), use, max_batch_size=8, kv_cache_tokens=48)
    assert num_preempted > 0 and reused > 0


def test_an_equal_prefix_is_computed_once(model: Kraken) -> None:
    prompt = tuple(range(1, 31))
    made = [Request(id=f"r{n}", prompt_ids=prompt, sampling=SamplingParams(max_tokens=4, seed=n)) for n in range(4)]

    async def use(engine: TorchEngine) -> tuple[list[list[Output]], int, list[list[Output]], int]:
        at_once = await together(made)(engine)
        reused_at_once = engine.stats().reused_tokens
        later = await one_by_one(made)(engine)
        return at_once, reused_at_once, later, engine.stats().reused_tokens

    at_once, reused_at_once, later, reused = run(model, use)
    # seven full blocks of four, the thirtieth token's excepted; taken over within one step, too
    assert (reused_at_once, reused) == (3 * 28, 3 * 28 + 4 * 28)
    expected = run(model, one_by_one(made), prefix_reuse=False)
    assert_equal(at_once, expected)
    assert_equal(later, expected)


def test_a_conversation_reuses_what_was_generated() -> None:
    async def use(engine: TorchEngine) -> int:
        first = Request(id="a", prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=14, temperature=0.0))
        outputs = [o.token_id for o in await collect(engine, first) if isinstance(o, TokenOutput)]
        second = Request(id="b", prompt_ids=(1, 2, 3, *outputs, 9), sampling=SamplingParams(max_tokens=2))
        await collect(engine, second)
        return engine.stats().reused_tokens

    assert run(make_model("kraken"), use) == 16


class TestRules:
    """Sampling parameters through the whole engine."""

    def test_a_repetition_penalty_depends_on_the_own_text_only(self) -> None:
        made = requests(6, repetition_penalty=1.8, max_tokens=12)
        model = make_model("kraken")
        assert_equal(run(model, together(made)), run(model, one_by_one(made)))
        plain = run(model, together(requests(6, max_tokens=12)))
        assert [o.token_id for o in plain[0] if isinstance(o, TokenOutput)] != [
            o.token_id for o in run(model, together(made))[0] if isinstance(o, TokenOutput)
        ]

    def test_min_tokens_holds_stop_ids_back(self) -> None:
        free = requests(1, temperature=0.0, max_tokens=12)[0]
        model = make_model("kraken")

        def tokens(**sampling: Any) -> list[int]:
            (request,) = requests(1, temperature=0.0, max_tokens=12, **sampling)
            return [o.token_id for o in run(model, lambda e: collect(e, request)) if isinstance(o, TokenOutput)]

        first = tokens()[0]
        assert free.sampling.min_tokens == 0 and tokens(stop_ids=(first,)) == [first]
        late = tokens(stop_ids=(first,), min_tokens=5)
        assert first not in late[:5] and len(late) >= 5


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_cuda_equals_the_cpu(model: Kraken, apart: list[list[Output]], cuda_graphs: bool) -> None:
    on_device = Kraken(model.config)
    on_device.load_state_dict(model.state_dict())
    made = requests(14)
    config = {"device": "cuda", "max_batch_size": 8, "cuda_graphs": cuda_graphs}
    assert_equal(run(on_device.requires_grad_(False).cuda(), together(made), **config), apart)
