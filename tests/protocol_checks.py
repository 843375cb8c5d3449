"""What every engine keeps of the protocol, as coroutines that are given an engine; `test_engine_protocol.py` runs them,
for one engine inside a Ray actor.

An engine holds four requests in its batch and four in its queue, and the model of `make_exchange` or, for the echo
engine, one of the same sizes.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kraken.config import EngineConfig, ModelConfig
from kraken.convert import read_exchange, to_exchange, write_folder
from kraken.engine.engine import TorchEngine
from kraken.engine.protocol import (
    ContextLengthExceeded,
    Engine,
    EngineOverloaded,
    EngineStats,
    PromptOutput,
    Request,
    RequestError,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from kraken.evaluate import collect, parity
from kraken.manifest import finish_artefact
from kraken.model import Kraken
from kraken.tokenizer import Tokenizer
from kraken.trtllm.checkpoint import from_exchange

CONTEXT_LENGTH = 48
PROMPT = (5, 6, 9, 10, 11, 3)
LONG_PROMPT = tuple(range(3, 38))
"""Two blocks of the cache and three tokens."""
CONFIG = EngineConfig(dtype="float32", max_batch_size=4, max_queued_requests=4)
GREEDY = SamplingParams(max_tokens=6, temperature=0.0)


def make_exchange(folder: Path, num_ways: int = 2) -> Path:
    """A random model as an exchange folder with its TensorRT-LLM folder inside, in float32."""
    config = ModelConfig(
        num_layers=2,
        width=16,
        num_heads=2 * num_ways,
        num_ways=num_ways,
        context_length=CONTEXT_LENGTH,
        vocab_size=320,
        bias=True,
    )
    torch.manual_seed(1)
    model = Kraken(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    tokenizer = Tokenizer.train(["the cat sat on the mat " * 8], 264)
    folder.mkdir(exist_ok=True)
    write_folder(folder, config, to_exchange(model), tokenizer)
    finish_artefact(
        folder,
        started_at=time.monotonic(),
        kind="convert",
        fingerprint="tiny-exchange",
        config={},
        parents={},
        metrics={},
        details={"tokenizer_fingerprint": tokenizer.fingerprint},
    )
    from_exchange(folder, folder / "tensorrt_llm", dtype=torch.float32)
    return folder


def request(name: str, prompt: tuple[int, ...] = PROMPT, **fields: Any) -> Request:
    """Greedy and of six tokens, unless `sampling` or `draw` (its fields) say otherwise."""
    sampling = fields.pop("sampling", None) or replace(GREEDY, **fields.pop("draw", {}))
    return Request(id=name, prompt_ids=prompt, sampling=sampling, **fields)


def ids_of(outputs: Iterable[Any]) -> list[int]:
    return [o.token_id for o in outputs if isinstance(o, TokenOutput)]


async def idle(engine: Engine) -> EngineStats:
    """What the engine says once nothing is in flight, or after five seconds."""
    for _ in range(500):
        stats = engine.stats()
        if stats.num_running == stats.num_queued == 0:
            break
        await asyncio.sleep(0.01)
    return stats


async def ids_are_unique_in_flight(engine: Engine) -> None:
    """A second request of the same id is the client's fault; afterwards the id is free, also after an abort."""
    long = request("twice", draw={"max_tokens": 40})
    expected = ids_of(await collect(engine, long))
    stream = engine.generate(long)
    first = await anext(stream)
    with pytest.raises(RequestError, match="id='twice' is in flight already"):
        await collect(engine, long)
    assert ids_of([first, *[output async for output in stream]]) == expected
    aborted = engine.generate(long)
    await anext(aborted)
    engine.abort("twice")
    stream = engine.generate(long)
    first = await anext(stream)
    assert len([output async for output in aborted]) < 39
    assert ids_of([first, *[output async for output in stream]]) == expected, (
        "the end of the aborted one is of this one"
    )


async def limits_are_kept(engine: Engine) -> None:
    num_ids = engine.info.num_ids
    refused: dict[str, Request] = {
        "prompt is empty": request("empty", prompt=()),
        f"token id {num_ids}": request("id", prompt=(1, num_ids)),
        "num_logprobs=-1": request("logprobs", num_logprobs=-1),
        f"stop_ids holds token id {num_ids}": request("stop", draw={"stop_ids": (num_ids,)}),
    }
    for message, bad in refused.items():
        with pytest.raises(RequestError, match=message):
            await collect(engine, bad)
    with pytest.raises(ContextLengthExceeded, match=f"exceed the context of {CONTEXT_LENGTH}"):
        await collect(engine, request("long", draw={"max_tokens": CONTEXT_LENGTH - len(PROMPT) + 1}))
    outputs = await collect(engine, request("full", draw={"max_tokens": CONTEXT_LENGTH - len(PROMPT)}))
    assert [o.finish_reason for o in outputs if isinstance(o, TokenOutput)] == [None] * 41 + ["length"]
    long = (*LONG_PROMPT, *LONG_PROMPT)[: CONTEXT_LENGTH + 1]
    (scored,) = await collect(engine, request("scored", prompt=long, draw={"max_tokens": 0}, prompt_logprobs=True))
    assert isinstance(scored, PromptOutput) and len(scored.logprobs) == CONTEXT_LENGTH + 1


async def the_queue_is_bounded(engine: Engine) -> None:
    many = [collect(engine, request(f"many-{i}", draw={"max_tokens": 30})) for i in range(30)]
    results = await asyncio.gather(*many, return_exceptions=True)
    refused = [result for result in results if isinstance(result, BaseException)]
    assert 0 < len(refused) <= 30 - CONFIG.max_queued_requests
    assert {type(error) for error in refused} == {EngineOverloaded}
    assert {len(result) for result in results if isinstance(result, list)} == {30}


async def leaving_aborts(engine: Engine) -> None:
    before = engine.stats()
    long = request("left", draw={"max_tokens": 40})
    stream = engine.generate(long)
    await anext(stream)
    assert engine.stats().num_running == 1
    await stream.aclose()  # type: ignore[attr-defined]
    task = asyncio.create_task(collect(engine, replace(long, id="cancelled")))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    engine.abort("nobody")
    after = await idle(engine)
    assert (after.num_running, after.num_queued, after.healthy) == (0, 0, True)
    assert 1 <= after.num_aborted - before.num_aborted <= 2 and after.num_finished == before.num_finished


async def a_stop_id_ends_the_completion(engine: Engine) -> None:
    free = ids_of(await collect(engine, request("free")))
    stop = max(i for i, token_id in enumerate(free) if token_id not in free[:i])
    outputs = await collect(engine, request("stopped", draw={"stop_ids": (free[stop], engine.info.eot_id)}))
    assert ids_of(outputs) == free[: stop + 1] and outputs[-1].finish_reason == "stop"  # type: ignore[union-attr]


async def sampling_is_honoured_or_refused_by_name(engine: Engine) -> None:
    (likely,) = ids_of(await collect(engine, request("likely", draw={"max_tokens": 1})))
    draws: dict[str, dict[str, Any]] = {
        "logit_bias": {"logit_bias": ((likely, -100.0),)},
        "presence_penalty": {"presence_penalty": 2.0},
        "frequency_penalty": {"frequency_penalty": 2.0},
        "repetition_penalty": {"repetition_penalty": 2.0},
        "min_tokens": {"stop_ids": (likely,), "min_tokens": 3},
    }
    found: dict[str, list[int]] = {}
    for name, draw in draws.items():
        try:
            found[name] = ids_of(await collect(engine, request(name, draw=draw)))
        except RequestError as error:
            assert name in str(error) and engine.info.name != "torch"
    if engine.info.name != "echo":  # which does not sample
        assert likely not in found.get("logit_bias", [])[:1]
        assert len(found.get("min_tokens", [0] * 3)) >= 3
    assert found and {len(tokens) for name, tokens in found.items() if name != "min_tokens"} == {6}


async def submitting_passes_on_what_generate_yields(engine: Engine) -> None:
    asked = request("submitted", draw={"seed": 1, "temperature": 1.0})
    expected = ids_of(await collect(engine, asked))
    items: list[Any] = []
    has_ended = asyncio.Event()

    def receive(item: Any) -> None:
        items.append(item)
        if item is None or isinstance(item, BaseException):
            has_ended.set()

    abort = engine.submit(asked, receive)
    await asyncio.wait_for(has_ended.wait(), 60)
    assert ids_of(items) == expected and items[-1] is None
    abort()
    items.clear()
    engine.submit(request("left", draw={"max_tokens": 40}), receive)()
    await idle(engine)
    assert len(ids_of(items)) < 40


async def a_seed_repeats(engine: Engine) -> None:
    """Whatever else has been computed of the same prompt, and whatever else runs."""

    async def drawn(name: str, **sampling: Any) -> list[int]:
        draw = {"max_tokens": 12, "temperature": 30.0} | sampling
        return ids_of(await collect(engine, request(name, prompt=LONG_PROMPT, draw=draw)))

    first = await drawn("seed-1", seed=7)
    free = [await drawn(f"free-{i}") for i in range(2)]
    again, other, _ = await asyncio.gather(
        drawn("seed-2", seed=7), drawn("other", seed=8), collect(engine, request("beside"))
    )
    assert again == first
    if engine.info.name != "echo":  # which does not sample
        assert other != first and free[0] != free[1]


async def scores_are_those_of_the_logits(engine: Engine) -> None:
    """Log-probabilities of prompt and tokens, from the logits that the same request brings."""
    asked = request("scores", prompt_logprobs=True, num_logprobs=3, return_logits=True)
    prompt, *tokens = await collect(engine, asked)
    assert isinstance(prompt, PromptOutput) and prompt.logits_TV is not None and len(tokens) == 6
    assert prompt.logits_TV.shape == (len(PROMPT), engine.info.num_ids) and prompt.logits_TV.dtype == np.float32
    assert prompt.logprobs[0] is None and len(prompt.logprobs) == len(PROMPT)
    for following, scored, logits_V in zip(PROMPT[1:], prompt.logprobs[1:], prompt.logits_TV, strict=False):
        require_scored(scored, following, logits_V)
    for token in tokens:
        assert isinstance(token, TokenOutput)
        require_scored(token.logprobs, token.token_id, token.logits_V)
    alone = await collect(engine, replace(asked, id="alone", sampling=replace(GREEDY, max_tokens=0)))
    assert len(alone) == 1 and isinstance(alone[0], PromptOutput)
    np.testing.assert_array_equal(alone[0].logits_TV, prompt.logits_TV[:-1])
    plain = await collect(engine, request("plain"))
    assert [o.logprobs for o in plain if isinstance(o, TokenOutput)] == [None] * 6
    assert await collect(engine, request("nothing", draw={"max_tokens": 0})) == []


def require_scored(scored: TokenLogprobs | None, token_id: int, logits_V: np.ndarray | None) -> None:
    assert scored is not None and logits_V is not None and scored.token_id == token_id
    expected_V = torch.from_numpy(logits_V.copy()).double().log_softmax(-1)
    assert scored.logprob == pytest.approx(float(expected_V[token_id]), abs=1e-4)
    assert [value for _, value in scored.top] == pytest.approx(expected_V.topk(3).values.tolist(), abs=1e-4)
    assert dict(scored.top).get(token_id, scored.logprob) == scored.logprob


async def what_was_done_is_counted(engine: Engine) -> None:
    before = engine.stats()
    await asyncio.gather(*(collect(engine, request(f"counted-{i}")) for i in range(3)))
    after = engine.stats()
    assert after.healthy and after.num_finished - before.num_finished == 3
    assert after.completion_tokens - before.completion_tokens == 18
    assert after.prompt_tokens - before.prompt_tokens == 3 * len(PROMPT)
    assert (after.num_running, after.num_queued) == (0, 0)


CHECKS = {
    check.__name__: check
    for check in (
        ids_are_unique_in_flight,
        limits_are_kept,
        the_queue_is_bounded,
        leaving_aborts,
        a_stop_id_ends_the_completion,
        sampling_is_honoured_or_refused_by_name,
        submitting_passes_on_what_generate_yields,
        a_seed_repeats,
        scores_are_those_of_the_logits,
        what_was_done_is_counted,
    )
}


async def the_numbers_are_ours(engine: Engine, exchange: Path) -> None:
    """The outputs of the PyTorch engine and of the model itself."""
    model_requests = [
        request("greedy"),
        request("scored", num_logprobs=3, prompt_logprobs=True),
        request("scored-only", draw={"max_tokens": 0}, num_logprobs=2, prompt_logprobs=True),
        request("full", prompt=tuple(range(3, 4 + CONTEXT_LENGTH)), draw={"max_tokens": 0}, prompt_logprobs=True),
        request("one-id", prompt=(4,), draw={"max_tokens": 0}, prompt_logprobs=True),
        request("logits", return_logits=True),
        request("nothing", draw={"max_tokens": 0}),
        request("min-p", draw={"temperature": 100.0, "min_p": 1.0}),
    ]
    ours = TorchEngine.from_exchange(exchange, replace(CONFIG, kind="torch", device="cpu"))
    try:
        assert engine.info == replace(ours.info, name=engine.info.name)
        for group in (model_requests[:4], model_requests[4:]):
            found = await asyncio.gather(*(collect(engine, one) for one in group))
            for one, outputs in zip(group, found, strict=True):
                require_close(outputs, await collect(ours, one))
    finally:
        await ours.close()
    model = read_exchange(exchange, torch.float32)
    assert (await parity(engine, model, [list(PROMPT), [7, 8]], num_tokens=4, tolerance=1e-4)).passed


def require_close(found: list[Any], expected: list[Any]) -> None:
    assert [type(o) for o in found] == [type(o) for o in expected]
    for one, other in zip(found, expected, strict=True):
        pairs = zip(one.logprobs or (), other.logprobs or (), strict=True) if isinstance(one, PromptOutput) else []
        logits = (one.logits_TV, other.logits_TV) if isinstance(one, PromptOutput) else (one.logits_V, other.logits_V)
        if isinstance(one, TokenOutput):
            assert (one.token_id, one.finish_reason) == (other.token_id, other.finish_reason)
            pairs = [(one.logprobs, other.logprobs)]
        for a, b in pairs:
            assert (a is None) == (b is None)
            if a is not None:
                assert a.token_id == b.token_id and a.logprob == pytest.approx(b.logprob, abs=1e-4)
                assert [i for i, _ in a.top] == [i for i, _ in b.top]
                assert [v for _, v in a.top] == pytest.approx([v for _, v in b.top], abs=1e-4)
        assert (logits[0] is None) == (logits[1] is None)
        if logits[0] is not None:
            np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)


class EngineActor:
    """The engine of TensorRT-LLM over Ray, with its checks, in a process that finds the stand-in.

    Args:
        bundles: of the placement group that the actor belongs to, one for each rank.
    """

    async def start(self, exchange: Path, bundles: tuple[int, ...]) -> None:
        from ray.util import get_current_placement_group

        from kraken.engine.placement import Placement
        from kraken.trtllm.engine import TensorRTEngine

        self._placement = Placement(group=get_current_placement_group(), bundle_indices=bundles)
        self._exchange = exchange
        self._engine = TensorRTEngine.from_exchange(exchange, CONFIG, self._placement)
        await self._engine.start()

    async def run(self, name: str) -> None:
        """One of `CHECKS`, or of the methods below."""
        await (CHECKS[name](self._engine) if name in CHECKS else getattr(self, name)())

    async def a_request_that_is_never_answered_fails_by_its_id(self) -> None:
        from kraken.engine.protocol import EngineError
        from kraken.trtllm import engine as module

        module.ANSWER_LIMIT_S = 1.0
        rejected = request("rejected", prompt=(8, 9))
        with pytest.raises(EngineError, match="has not answered request 'rejected' for 1 s"):
            await collect(self._engine, rejected)
        assert ids_of(await collect(self._engine, request("accepted"))) and self._engine.stats().healthy

    async def a_constructor_that_blocks_does_not_stop_the_clock(self) -> None:
        import os

        from kraken.engine.protocol import EngineError
        from kraken.trtllm.engine import TensorRTEngine

        os.environ["FAKE_TRTLLM"] = "slow-constructor"
        engine = TensorRTEngine.from_exchange(self._exchange, replace(CONFIG, startup_timeout_s=1.0), self._placement)
        with pytest.raises(EngineError, match="startup_timeout_s=1 "):
            await engine.start()

    async def close(self) -> None:
        await self._engine.close()
        await self._engine.close()
