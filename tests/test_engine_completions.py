"""What /v1/completions offers beyond OpenAI, from the body to the engine and back, without HTTP."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import ValidationError

from kraken.engine.echo import EchoEngine
from kraken.engine.protocol import ContextLengthExceeded, EngineInfo, Output, Request, RequestError
from kraken.tokenizer import Tokenizer
from serve.completions import CompletionCall, ServedModel
from serve.protocol import ApiError, Completion, CompletionRequest, bad_request


class Recorder(EchoEngine):
    """An echo engine that keeps what it was asked."""

    def __init__(self, info: EngineInfo):
        super().__init__(info)
        self.seen: list[Request] = []

    def generate(self, request: Request) -> AsyncIterator[Output]:
        self.seen.append(request)
        return super().generate(request)


@pytest.fixture(scope="module")
def model() -> ServedModel:
    tokenizer = Tokenizer.train(["the cat sat on the mat " * 20], 260)
    info = EngineInfo(
        name="echo",
        context_length=64,
        num_ids=tokenizer.num_ids,
        eot_id=tokenizer.eot_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    return ServedModel(
        name="kraken",
        engine=EchoEngine(info),
        tokenizer=tokenizer,
        exchange_fingerprint=None,
        max_choices=8,
        created=0,
    )


def complete(model: ServedModel, **fields: Any) -> tuple[Completion, list[Request]]:
    engine = Recorder(model.engine.info)

    async def main() -> Completion:
        body = CompletionRequest(model="kraken", **fields)
        call = await CompletionCall.prepare(body, dataclasses.replace(model, engine=engine))
        return await call.collect(call.parts())

    return asyncio.run(main()), engine.seen


def test_every_parameter_reaches_the_engine(model: ServedModel) -> None:
    eot = model.engine.info.eot_id
    fields = {"min_p": 0.25, "repetition_penalty": 1.5, "min_tokens": 3, "stop_token_ids": [7], "presence_penalty": -1}
    fields |= {"frequency_penalty": 0.5, "logit_bias": {"7": -100, "8": 2.5}}
    _, (request,) = complete(model, prompt="a", **fields)
    sampling = request.sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-1, 0.5)
    assert sampling.logit_bias == ((7, -100), (8, 2.5))
    assert (sampling.min_p, sampling.repetition_penalty, sampling.min_tokens) == (0.25, 1.5, 3)
    assert sampling.stop_ids == (eot, 7)
    _, (request,) = complete(model, prompt="a", ignore_eos=True)
    assert request.sampling.stop_ids == ()


def test_the_end_of_text_ends_a_completion_unless_ignored(model: ServedModel) -> None:
    eot = model.engine.info.eot_id
    ended, _ = complete(model, prompt=[eot, 5], max_tokens=4)
    assert (ended.choices[0].finish_reason, ended.usage and ended.usage.completion_tokens) == ("stop", 1)
    ignored, _ = complete(model, prompt=[eot, 5], max_tokens=4, ignore_eos=True)
    assert (ignored.choices[0].finish_reason, ignored.usage and ignored.usage.completion_tokens) == ("length", 4)
    held_back, _ = complete(model, prompt=[eot, 5], max_tokens=4, min_tokens=1)
    assert held_back.usage and held_back.usage.completion_tokens == 3


@pytest.mark.parametrize("logprobs", [None, 0, 4])
def test_prompt_logprobs_are_what_an_echo_reports(model: ServedModel, logprobs: int | None) -> None:
    separate, _ = complete(model, prompt="the cat", max_tokens=3, prompt_logprobs=2, logprobs=logprobs)
    echoed, _ = complete(model, prompt="the cat", max_tokens=3, echo=True, logprobs=2)
    found, whole = separate.choices[0].prompt_logprobs, echoed.choices[0].logprobs
    assert found and whole
    count = len(found.tokens)
    assert count > 1 and found.token_logprobs == whole.token_logprobs[:count]
    assert found.top_logprobs == whole.top_logprobs[:count] and found.text_offset == whole.text_offset[:count]
    own = separate.choices[0].logprobs
    assert (own is None) if logprobs is None else (own is not None and len(own.tokens) == 3)
    assert separate.choices[0].text + "the cat" == echoed.choices[0].text[len("the cat") :] + "the cat"


def test_the_field_is_only_there_when_asked_for(model: ServedModel) -> None:
    plain, _ = complete(model, prompt="a", max_tokens=1)
    assert "prompt_logprobs" not in plain.model_dump()["choices"][0]
    scored, _ = complete(model, prompt="the cat", max_tokens=0, prompt_logprobs=0)
    choice = scored.model_dump(mode="json")["choices"][0]
    assert choice["text"] == "" and len(choice["prompt_logprobs"]["token_logprobs"]) > 1


def frames_of(model: ServedModel, **fields: Any) -> list[Any]:
    """The frames of a stream, without its end mark."""

    *frames, end, nothing = "".join(writes_of(model, **fields)).split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def writes_of(model: ServedModel, **fields: Any) -> list[str]:
    """What a stream writes, each time with one or more frames."""

    async def main() -> list[str]:
        body = CompletionRequest(model="kraken", stream=True, **fields)
        call = await CompletionCall.prepare(body, model)
        parts = call.parts()
        first = await anext(parts)
        return [frame async for frame in call.frames(first, parts)]

    return asyncio.run(main())


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"logprobs": 2, "echo": True}, {"stop": ["t o"]}], ids=str)
def test_tokens_that_come_within_the_interval_share_a_write(model: ServedModel, fields: dict[str, Any]) -> None:
    fields |= {"prompt": "the cat sat on the mat", "max_tokens": 40, "ignore_eos": True}
    whole, _ = complete(model, **fields)
    for interval_s in (0.0, 60.0):
        slow = dataclasses.replace(model, stream_interval_s=interval_s)
        frames = frames_of(slow, **fields, stream_options={"continuous_usage_stats": True})
        for choice in whole.choices:
            parts = [frame["choices"][0] for frame in frames if frame["choices"][0]["index"] == choice.index]
            assert "".join(part["text"] for part in parts) == choice.text
            assert parts[-1]["finish_reason"] == choice.finish_reason
            if choice.logprobs:
                for name, values in choice.logprobs.model_dump().items():
                    assert [value for part in parts for value in part["logprobs"][name]] == values
            # with a long interval the first token is sent at once, and all others together with the last
            assert len(parts) == 2 if interval_s else len(parts) > 2
        num_tokens = {frame["choices"][0]["index"]: frame["usage"]["completion_tokens"] for frame in frames}
        assert whole.usage and sum(num_tokens.values()) == whole.usage.completion_tokens


def test_continuous_usage_counts_in_every_frame(model: ServedModel) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *frames, last = frames_of(model, prompt=[[5, 6], [7]], n=2, max_tokens=4, ignore_eos=True, stream_options=options)
    counts: dict[int, list[int]] = {}
    for frame in frames:
        index, usage = frame["choices"][0]["index"], frame["usage"]
        assert usage["prompt_tokens"] == (2 if index < 2 else 1)
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        counts.setdefault(index, []).append(usage["completion_tokens"])
    assert sorted(counts) == [0, 1, 2, 3]
    assert all(found == sorted(set(found)) and found[-1] == 4 for found in counts.values())
    assert last == last | {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19}}
    without_last = frames_of(model, prompt=[5, 6], max_tokens=4, stream_options={"continuous_usage_stats": True})
    assert [frame["usage"]["completion_tokens"] for frame in without_last] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "body",
    [
        # lm-eval: HumanEval's stop strings and one of its own; a task with nine; a field of Hugging Face's
        {"temperature": 0, "seed": 1234, "stop": ["\nclass", "\ndef", "\n#", "\nif", "\nprint", "<|endoftext|>"]},
        {"temperature": 0, "seed": 1234, "stop": [f"stop {index}" for index in range(9)], "num_beams": 1},
        {"stop": [f"stop {index}" for index in range(32)]},
        # the benchmarks of vLLM and SGLang; LangChain; vLLM's own defaults, written out
        {"repetition_penalty": 1.0, "logprobs": None, "ignore_eos": True},
        {"best_of": 1, "temperature": 0.0, "ignore_eos": True},
        {"temperature": 0.7, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "n": 1, "seed": None},
        {"top_k": -1, "skip_special_tokens": False, "spaces_between_special_tokens": False, "add_special_tokens": True},
        {"include_stop_str_in_output": False, "return_token_ids": False, "use_beam_search": False, "priority": 0},
    ],
    ids=str,
)
def test_bodies_of_known_clients_are_accepted(model: ServedModel, body: dict[str, Any]) -> None:
    completion, _ = complete(model, prompt="the cat", max_tokens=3, **body)
    assert completion.usage and completion.usage.completion_tokens == 3


def test_both_spellings_of_the_limit_are_one(model: ServedModel) -> None:
    for fields in ({"max_completion_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 3}):
        completion, (request,) = complete(model, prompt="the cat", **fields)
        assert completion.choices[0].finish_reason == "length" and request.sampling.max_tokens == 3
    completion, _ = complete(model, prompt="the cat", max_tokens=2, max_completion_tokens=None)
    assert completion.usage and completion.usage.completion_tokens == 2


def test_a_prompt_far_beyond_the_context_is_refused_before_it_is_encoded(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = model.tokenizer.encode
    monkeypatch.setattr(model.tokenizer, "encode", lambda text: encoded.append(len(text)) or encode(text))
    with pytest.raises(ContextLengthExceeded) as caught:
        complete(model, prompt=" " * 1_100_000)
    error = ApiError.of(caught.value)
    assert (error.status, error.body["error"]["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is 64 tokens" in str(error) and "max_length=64" in str(error) and not encoded
    with pytest.raises(ContextLengthExceeded):
        complete(model, prompt="the cat " * 100)
    assert encoded == [800]  # 800 bytes might have been few enough tokens
    scored, _ = complete(model, prompt="a" * 65, max_tokens=0, echo=True)
    assert scored.usage and scored.usage.prompt_tokens == 65


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 1e-38}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"temperature": True}, "temperature"),
        ({"top_p": float("inf")}, "top_p"),
        ({"top_k": 5.0}, "top_k"),
        ({"max_completion_tokens": 3, "max_tokens": 4}, "max_completion_tokens"),
        ({"max_completion_tokens": True, "max_tokens": 1}, "max_completion_tokens"),
        ({"max_completion_tokens": -1}, "max_tokens"),
        ({"skip_special_tokens": 0}, "skip_special_tokens"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ({"return_token_ids": True}, "return_token_ids"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"the": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias"),
        ({"logit_bias": {"5": "1"}}, "logit_bias"),
        ({"logit_bias": {str(token_id): 1 for token_id in range(1025)}}, "logit_bias"),
        ({"num_beams": 2}, "num_beams"),
        ({"num_beams": True}, "num_beams"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"store": True}, "store"),
        ({"stop": [f"{index}" for index in range(33)]}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"prompt_logprobs": 6}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"length_penalty": 1.0}, "length_penalty"),
    ],
)
def test_what_is_wrong_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest(model="kraken", prompt="a", **fields)
    error = bad_request(caught.value)
    assert (error.status, error.body["error"]["param"]) == (400, param)


@pytest.mark.parametrize("fields", [{"stop_token_ids": [10**6]}, {"logit_bias": {"1000000": 1}}], ids=str)
def test_an_id_that_is_none_is_refused(model: ServedModel, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        complete(model, prompt="a", **fields)
    error = ApiError.of(caught.value)
    assert (error.status, error.body["error"]["param"]) == (400, *fields)


def test_a_limit_that_is_not_given_never_exceeds_the_context(model: ServedModel) -> None:
    for num_prompt_tokens, expected in ((5, 16), (48, 16), (49, 15), (63, 1)):
        completion, _ = complete(model, prompt=[5] * num_prompt_tokens)
        assert completion.usage and completion.usage.completion_tokens == expected
    for fields in ({"prompt": [5] * 64}, {"prompt": [5] * 49, "max_tokens": 16}):
        with pytest.raises(ContextLengthExceeded):
            complete(model, **fields)


def test_a_prompt_is_cut_to_its_last_tokens(model: ServedModel) -> None:
    text, ids = "the cat sat on the mat " * 30, model.tokenizer.encode("the cat sat on the mat " * 30)
    for limit, fields, kept in (
        (3, {"max_tokens": 5}, 3),
        (64, {"max_tokens": 0, "echo": True}, 64),
        (-1, {"max_tokens": 5}, 59),
        (-1, {}, 48),
        (1, {"max_tokens": 5}, 1),
    ):
        for prompt in (text, ids):
            _, (request,) = complete(model, prompt=prompt, truncate_prompt_tokens=limit, **fields)
            assert list(request.prompt_ids) == ids[-kept:]
    _, (request,) = complete(model, prompt=[5, 6], truncate_prompt_tokens=9)
    assert request.prompt_ids == (5, 6)
    with pytest.raises(ApiError, match="larger than the context of 64") as caught:
        complete(model, prompt="a", truncate_prompt_tokens=65)
    assert caught.value.body["error"]["param"] == "truncate_prompt_tokens"


@pytest.mark.parametrize(("fields", "text"), [({}, "ab"), ({"skip_special_tokens": False}, "a<|endoftext|>b")])
def test_special_tokens_have_no_text_unless_asked_for(model: ServedModel, fields: dict[str, Any], text: str) -> None:
    ids = [*model.tokenizer.encode("a"), model.engine.info.eot_id, *model.tokenizer.encode("b")]
    found, _ = complete(model, prompt=ids, max_tokens=3, ignore_eos=True, logprobs=0, **fields)
    logprobs = found.choices[0].logprobs
    assert found.choices[0].text == text and logprobs
    assert logprobs.tokens == ["a", "<|endoftext|>", "b"] and logprobs.text_offset == [0, 1, len(text) - 1]


def test_frames_escape_what_some_clients_take_for_an_end_of_line(model: ServedModel) -> None:
    ids = [model.tokenizer.ranks[bytes([byte])] for byte in "\u2028\u2029é".encode()]
    for write in writes_of(model, prompt=ids, max_tokens=8):
        assert len(write.splitlines()) == 2 * write.count("data: ")
    frames = frames_of(model, prompt=ids, max_tokens=8)
    assert "".join(frame["choices"][0]["text"] for frame in frames) == "\u2028\u2029é"
