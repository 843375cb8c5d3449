"""From ids to text: the detokeniser against the definition of a stop string, and the engine's life around it."""

import asyncio
import random

import pytest

from kraken.config import EngineConfig
from kraken.engine.detokenizer import Detokenizer, TextOutput, generate_text
from kraken.engine.echo import EchoEngine
from kraken.engine.protocol import (
    EngineError,
    EngineInfo,
    EngineOverloaded,
    PromptOutput,
    Request,
    RequestError,
    SamplingParams,
    TokenOutput,
)
from kraken.tokenizer import Tokenizer

TRAINING_TEXT = "the cat sat on the mat, and the naïve café — 東京 — 🐙 stopped. " * 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TRAINING_TEXT], 300)


def byte_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per byte: the most borders a text can have."""
    return [tokenizer.ranks[bytes([byte])] for byte in text.encode()]


def pieces(
    tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()
) -> tuple[list[str], list[int], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, stop)
    texts: list[str] = []
    starts: list[int] = []
    for token_id in ids:
        text, new_starts = detokenizer.push(token_id)
        texts.append(text)
        starts += new_starts
        if detokenizer.stopped:
            break
    rest = detokenizer.flush()
    return [*texts, rest.text], [*starts, *rest.starts], detokenizer


def cut_at_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The definition, by characters: the first stop string to be complete ends the text; of several, the longest."""
    for end in range(len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def test_a_character_is_never_split(tokenizer: Tokenizer) -> None:
    text = "naïve 東京 🐙!"
    texts, starts, _ = pieces(tokenizer, byte_ids(tokenizer, text))
    assert [t for t in texts if t] == list(text)
    assert starts == [i for i, c in enumerate(text) for _ in c.encode()]


def test_bytes_that_are_no_text_become_replacement_characters(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.ranks[bytes([b])] for b in b"a\xff\xe2\x82b\xf0\x9f"]
    texts, starts, _ = pieces(tokenizer, ids)
    assert "".join(texts) == tokenizer.decode(ids) == "a��b�"
    assert len(starts) == len(ids)


def test_stop_strings_match_across_token_borders_and_never_come_out(tokenizer: Tokenizer) -> None:
    rng = random.Random(7)
    for _ in range(2000):
        text = "".join(rng.choice("ab東🐙") for _ in range(rng.randrange(1, 14)))
        stop = tuple(
            "".join(rng.choice("ab東🐙") for _ in range(rng.randrange(1, 4))) for _ in range(rng.randrange(1, 4))
        )
        expected, stopped = cut_at_stop(text, stop)
        for ids in (tokenizer.encode(text), byte_ids(tokenizer, text)):
            texts, starts, detokenizer = pieces(tokenizer, ids, stop)
            assert ("".join(texts), detokenizer.stopped) == (expected, stopped), (text, stop)
            assert detokenizer.num_released == len(expected)
            assert starts == sorted(starts)
            if stopped:
                assert all(start < len(expected) for start in starts), "a token behind the cut was released"
            else:
                assert len(starts) == len(ids)


def test_text_is_released_as_soon_as_it_cannot_be_a_stop_string(tokenizer: Tokenizer) -> None:
    texts, _, detokenizer = pieces(tokenizer, byte_ids(tokenizer, "xSTyST"), ("STOP",))
    assert texts == ["x", "", "", "STy", "", "", "ST"]
    assert not detokenizer.stopped


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, ""), (2, "ab"), (3, "abab"), (4, "abab"), (6, "ababab")])
def test_stop_strings_count_after_min_tokens(tokenizer: Tokenizer, min_tokens: int, expected: str) -> None:
    detokenizer = Detokenizer(tokenizer, ("ab",), min_tokens)
    texts = []
    for token_id in byte_ids(tokenizer, "ababab"):
        if not detokenizer.stopped:
            texts.append(detokenizer.push(token_id).text)
    texts.append(detokenizer.flush().text)
    # with 3, the second "ab" has begun before it may count
    assert "".join(texts) == expected and detokenizer.stopped == (expected != "ababab")


# ---- over an engine


def make_engine(tokenizer: Tokenizer, token_delay_s: float = 0.0, config: EngineConfig | None = None) -> EchoEngine:
    info = EngineInfo(
        name="echo",
        context_length=64,
        num_ids=tokenizer.num_ids,
        eot_id=tokenizer.eot_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    return EchoEngine(info, token_delay_s, config)


def request_for(ids: list[int], request_id: str = "r", **sampling: object) -> Request:
    return Request(id=request_id, prompt_ids=tuple(ids), sampling=SamplingParams(**sampling), num_logprobs=2)  # type: ignore[arg-type]


async def text_outputs(engine: EchoEngine, tokenizer: Tokenizer, request: Request, *stop: str) -> list[TextOutput]:
    outputs = [output async for output in generate_text(engine, tokenizer, request, stop)]
    return [output for output in outputs if isinstance(output, TextOutput)]


def test_a_completion_is_the_engines_tokens_as_text(tokenizer: Tokenizer) -> None:
    engine, ids = make_engine(tokenizer), tokenizer.encode("the 🐙 ")
    outputs = asyncio.run(text_outputs(engine, tokenizer, request_for(ids, max_tokens=2 * len(ids))))
    assert "".join(output.text for output in outputs) == "the 🐙 the 🐙 "
    assert [token.token_id for output in outputs for token in output.tokens] == ids * 2
    assert (outputs[-1].finish_reason, outputs[-1].num_tokens) == ("length", 2 * len(ids))
    assert engine.stats().num_finished == 1


def test_a_stop_id_is_counted_and_listed_but_has_no_text(tokenizer: Tokenizer) -> None:
    engine, ids = make_engine(tokenizer), [*tokenizer.encode("the ST"), tokenizer.eot_id]
    request = request_for(ids, max_tokens=30, stop_ids=(tokenizer.eot_id,))
    outputs = asyncio.run(text_outputs(engine, tokenizer, request, "STOP"))
    assert "".join(output.text for output in outputs) == "the ST"
    tokens = [token for output in outputs for token in output.tokens]
    assert [token.token_id for token in tokens] == ids
    assert tokens[-1].start == len("the ST")
    assert (outputs[-1].finish_reason, outputs[-1].num_tokens) == ("stop", len(ids))


def test_a_stop_string_ends_the_engines_request(tokenizer: Tokenizer) -> None:
    engine, ids = make_engine(tokenizer), byte_ids(tokenizer, "ab cd ef")
    outputs = asyncio.run(text_outputs(engine, tokenizer, request_for(ids, max_tokens=40), "cd"))
    assert "".join(output.text for output in outputs) == "ab "
    assert (outputs[-1].finish_reason, outputs[-1].num_tokens) == ("stop", 5)
    stats = engine.stats()
    assert (stats.num_running, stats.num_aborted, stats.completion_tokens) == (0, 1, 5)


def test_a_prompt_that_is_only_scored_has_no_text(tokenizer: Tokenizer) -> None:
    outputs = asyncio.run(text_outputs(make_engine(tokenizer), tokenizer, request_for([5] * 65, max_tokens=0)))
    assert outputs == [TextOutput(text="", tokens=(), num_tokens=0, finish_reason="length")]


def test_an_engine_that_stops_short_is_an_error(tokenizer: Tokenizer) -> None:
    async def abort_behind_its_back() -> None:
        engine = make_engine(tokenizer)
        async for _ in generate_text(engine, tokenizer, request_for([5], max_tokens=9)):
            engine.abort("r")

    with pytest.raises(EngineError, match="after 1 tokens"):
        asyncio.run(abort_behind_its_back())


# ---- the echo engine keeps the protocol


async def engine_outputs(engine: EchoEngine, request: Request) -> list[PromptOutput | TokenOutput]:
    return [output async for output in engine.generate(request)]


def test_echo_logprobs_are_those_of_its_logits(tokenizer: Tokenizer) -> None:
    engine = make_engine(tokenizer)
    request = Request(
        id="r",
        prompt_ids=(7, 9, 9),
        sampling=SamplingParams(max_tokens=4),
        num_logprobs=2,
        prompt_logprobs=True,
        return_logits=True,
    )
    prompt, *tokens = asyncio.run(engine_outputs(engine, request))
    assert isinstance(prompt, PromptOutput) and prompt.logits_TV is not None
    assert prompt.logprobs[0] is None and prompt.logits_TV.shape == (3, tokenizer.num_ids)
    scored = [*zip(prompt.logprobs[1:], prompt.logits_TV[:-1], strict=True)]
    scored += [(t.logprobs, t.logits_V) for t in tokens if isinstance(t, TokenOutput)]
    for logprobs, logits_V in scored:
        assert logprobs is not None and logits_V is not None
        assert logprobs.logprob == logits_V[logprobs.token_id]
        assert [i for i, _ in logprobs.top] == list((-logits_V).argsort()[:2])
        assert [value for _, value in logprobs.top] == sorted(logits_V, reverse=True)[:2]
    assert prompt.logprobs[2] is not None and prompt.logprobs[2].top[0] == (9, prompt.logprobs[2].logprob)
    assert [t.token_id for t in tokens if isinstance(t, TokenOutput)] == [7, 9, 9, 7]


def test_echo_refuses_what_no_engine_can_serve(tokenizer: Tokenizer) -> None:
    for ids in ([], [10**6], [5] * 60):
        with pytest.raises(RequestError):
            asyncio.run(engine_outputs(make_engine(tokenizer), request_for(ids)))


def test_echo_honours_batch_queue_abort_and_close(tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        engine = make_engine(tokenizer, 0.005, EngineConfig(max_batch_size=1, max_queued_requests=2))
        calls = {i: asyncio.create_task(engine_outputs(engine, request_for([5], i, max_tokens=4))) for i in "abc"}
        await asyncio.sleep(0)
        assert (engine.stats().num_running, engine.stats().num_queued) == (1, 2)
        with pytest.raises(EngineOverloaded):
            await engine_outputs(engine, request_for([5], "d"))
        with pytest.raises(RequestError, match="in flight"):
            await engine_outputs(engine, request_for([5], "c"))
        engine.abort("b")  # while it waits
        engine.abort("nobody")
        assert await calls["b"] == []
        assert len(await calls["a"]) == len(await calls["c"]) == 4
        assert (engine.stats().num_finished, engine.stats().num_aborted) == (2, 1)

        calls = {i: asyncio.create_task(engine_outputs(engine, request_for([5], i, max_tokens=50))) for i in "ef"}
        await asyncio.sleep(0.02)
        calls["e"].cancel()
        await asyncio.sleep(0.02)
        assert (engine.stats().num_running, engine.stats().num_queued) == (1, 0)  # f took the place of e
        await engine.close()
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await calls["f"]
        with pytest.raises(EngineError, match="closed"):
            await engine_outputs(engine, request_for([5]))
        assert (engine.stats().num_running, engine.stats().healthy) == (0, False)

    asyncio.run(scenario())
