"""What /v1/completions offers beyond OpenAI, from the body to the engine and back, without HTTP."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import ValidationError

from kraken.engine.echo import EchoEngine
from kraken.engine.protocol import EngineInfo, Output, Request
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
    fields = {"min_p": 0.25, "repetition_penalty": 1.5, "min_tokens": 3, "stop_token_ids": [7]}
    _, (request,) = complete(model, prompt="a", **fields)
    sampling = request.sampling
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


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"min_p": 1.5}, "min_p"),
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


def test_an_id_that_is_none_is_refused(model: ServedModel) -> None:
    with pytest.raises(ApiError) as caught:
        complete(model, prompt="a", stop_token_ids=[10**6])
    assert (caught.value.status, caught.value.body["error"]["param"]) == (400, "stop_token_ids")
