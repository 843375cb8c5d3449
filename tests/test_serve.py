"""The endpoint as its clients see it: real Ray Serve, the real openai client, plain HTTP, and an engine that echoes."""

import asyncio
import contextlib
import http.client
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from kraken.config import EngineConfig, ServeConfig
from kraken.engine.echo import EchoEngine
from kraken.engine.prompt import encode_prompt
from kraken.engine.protocol import EngineError, EngineStats, Output, Request, RequestError
from kraken.tokenizer import END_OF_TEXT, Tokenizer
from serve.api import MAX_BODY_BYTES
from serve.app import API_KEY_VARIABLE, ServeArgs, bind, build, load_model
from serve.completions import CompletionCall, ServedModel
from serve.protocol import ApiError, CompletionRequest

pytestmark = pytest.mark.ray

MODEL = "echo-model"
KEY = "a-key-for-tests"
CONTEXT_LENGTH = 1024
BATCH_SIZE, QUEUE_LENGTH = 8, 12
DELAY_S = 0.01
PRIVATE = "xyzzyprivate"
"""In many prompts below; must be in no log."""

RAISE_AT_ONCE, RAISE_AFTER_A_TOKEN, RAISE_A_BUG, FALL_ILL, PANIC_AT_ONCE, PANIC_AFTER_A_TOKEN = range(6)


class Panic(BaseException):
    """As the panics of libraries written in Rust: not an `Exception`."""


class FaultyEngine(EchoEngine):
    """Fails as the first id of the prompt says; notes in a file that it was closed."""

    folder: Path
    ill = False

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        fault = request.prompt_ids[0]
        self.ill = self.ill or fault == FALL_ILL
        if fault in (RAISE_AT_ONCE, RAISE_A_BUG):
            raise EngineError("inside") if fault == RAISE_AT_ONCE else KeyError("inside")
        if fault == PANIC_AT_ONCE:
            raise Panic("inside")
        async for output in super().generate(request):
            yield output
            if fault == RAISE_AFTER_A_TOKEN:
                raise EngineError("inside")
            if fault == PANIC_AFTER_A_TOKEN:
                raise Panic("inside")

    def stats(self) -> EngineStats:
        return replace(super().stats(), healthy=not self.ill)

    async def close(self) -> None:
        await super().close()
        (self.folder / "closed").touch()


def load_faulty_model(args: ServeArgs) -> ServedModel:
    model = load_model(args)
    engine = FaultyEngine(model.engine.info, args.echo_token_delay_s, args.engine_config)
    engine.folder = args.exchange
    return replace(model, engine=engine)


@dataclass
class Endpoint:
    """A served application and how to talk to it."""

    port: int
    prefix: str
    tokenizer: Tokenizer
    args: ServeArgs
    key: str = ""

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPConnection:
        """Send a request and wait for nothing."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        defaults = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}", "Connection": "close"}
        connection.request(method, self.prefix + path, content, defaults | headers)
        return connection

    def connect(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        """Send a request and wait for the head of the response; closing that closes the connection."""
        return self.send(method, path, body, **headers).getresponse()

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        with contextlib.closing(self.connect(method, path, body, **headers)) as response:
            return response.status, json.loads(response.read())

    def complete(self, prompt: Any, **fields: Any) -> Any:
        status, body = self.call("POST", "/v1/completions", {"model": MODEL, "prompt": prompt, **fields})
        assert status == 200, body
        return body

    def refused(self, **fields: Any) -> tuple[int, Any]:
        status, body = self.call("POST", "/v1/completions", {"model": MODEL, "prompt": "a", **fields})
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
        return status, body["error"]

    def stream(self, prompt: Any, **fields: Any) -> list[Any]:
        """All frames of a stream; checks that it ended properly."""
        body = {"model": MODEL, "prompt": prompt, "stream": True, **fields}
        with contextlib.closing(self.connect("POST", "/v1/completions", body)) as response:
            assert response.status == 200 and response.headers["Content-Type"].startswith("text/event-stream")
            events = response.read().decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def client(self, **options: Any) -> openai.OpenAI:
        url = f"http://127.0.0.1:{self.port}{self.prefix}/v1"
        return openai.OpenAI(base_url=url, api_key=self.key or "none", max_retries=0, **options)

    def stats(self) -> dict[str, int]:
        stats: dict[str, int] = self.call("GET", "/health")[1]["stats"]
        return stats

    def num_in_flight(self) -> int:
        stats = self.stats()
        return stats["num_running"] + stats["num_queued"]

    def wait_for_in_flight(self, num_requests: int) -> None:
        deadline = time.monotonic() + 2.0
        while (found := self.num_in_flight()) != num_requests:
            assert time.monotonic() < deadline, f"{found} requests are in flight"
            time.sleep(DELAY_S)

    def wait_until_idle(self) -> None:
        self.wait_for_in_flight(0)


@pytest.fixture(scope="module")
def endpoints(
    ray_cluster: str, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Endpoint, Endpoint]]:
    """A sound endpoint, open to all, and a faulty one behind a key."""
    from ray import cloudpickle
    from ray import serve as ray_serve

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # replicas need not find this module
    port = free_port()
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    tokenizer = Tokenizer.train(
        [f"the cat sat on the mat, and the naïve café — 東京 — 🐙 stopped. {PRIVATE} " * 8], 300
    )
    made, targets = [], []
    for name, prefix, key in (("sound", "", ""), ("faulty", "/faulty", KEY)):
        folder = tmp_path_factory.mktemp(name)
        tokenizer.save(folder)
        (folder / "manifest.json").write_text(json.dumps({"fingerprint": f"{name}-fingerprint"}))
        args = ServeArgs(
            exchange=folder,
            engine="echo",
            echo_token_delay_s=DELAY_S,
            engine_config=EngineConfig(max_batch_size=BATCH_SIZE, max_queued_requests=QUEUE_LENGTH),
            serve_config=ServeConfig(model_name=MODEL),
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv(API_KEY_VARIABLE, raising=False)
            if key:
                patch.setenv(API_KEY_VARIABLE, key)
            app = bind(partial(load_faulty_model, args), args.serve_config) if key else build(args)
        targets.append(ray_serve.RunTarget(app, name=name, route_prefix=prefix or "/"))
        made.append(Endpoint(port, prefix, tokenizer, args, key))
    ray_serve.run_many(targets)
    yield made[0], made[1]
    ray_serve.shutdown()


@pytest.fixture
def sound(endpoints: tuple[Endpoint, Endpoint]) -> Endpoint:
    return endpoints[0]


@pytest.fixture
def faulty(endpoints: tuple[Endpoint, Endpoint]) -> Endpoint:
    return endpoints[1]


# ---- completions


def test_openai_client_unary(sound: Endpoint) -> None:
    prompt = f"the cat {PRIVATE} 🐙 "
    num_ids = len(sound.tokenizer.encode(prompt))
    completion = sound.client().completions.create(
        model=MODEL, prompt=prompt, max_tokens=num_ids, n=2, user="me", seed=3
    )
    assert [c.text for c in completion.choices] == [prompt, prompt]
    assert [(c.index, c.finish_reason) for c in completion.choices] == [(0, "length"), (1, "length")]
    assert completion.object == "text_completion" and completion.system_fingerprint == "sound-fingerprint"
    usage = completion.usage
    assert usage and (usage.prompt_tokens, usage.completion_tokens) == (num_ids, 2 * num_ids)
    assert usage.total_tokens == 3 * num_ids


def test_openai_client_stream(sound: Endpoint) -> None:
    prompt = "the 🐙 東京 "
    ids = sound.tokenizer.encode(prompt)
    stream = sound.client().completions.create(
        model=MODEL, prompt=prompt, max_tokens=2 * len(ids), stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == prompt * 2
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert last.choices == [] and last.usage and last.usage.completion_tokens == 2 * len(ids)
    assert all("�" not in chunk.choices[0].text for chunk in chunks)


def test_streaming_begins_before_half_of_the_time(sound: Endpoint) -> None:
    started = time.monotonic()
    stream = sound.client().completions.create(model=MODEL, prompt="the cat", max_tokens=60, stream=True)
    times = [time.monotonic() - started for _ in stream]
    assert times[0] < times[-1] / 2, times


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3},
        {"echo": True},
        {"logprobs": 2},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"echo": True, "logprobs": 3, "n": 2},
        {"stop": ["t o", "zz"], "logprobs": 0, "echo": True},
    ],
    ids=str,
)
def test_a_stream_is_the_unary_response_in_parts(sound: Endpoint, fields: dict[str, Any]) -> None:
    prompts = ["the cat sat on", f"café {PRIVATE} 🐙"]
    whole = sound.complete(prompts, **fields)
    frames = sound.stream(prompts, stream_options={"include_usage": True}, **fields)
    parts = [frame["choices"][0] for frame in frames[:-1]]
    assert all(frame["usage"] is None for frame in frames[:-1])
    assert frames[-1]["usage"] == whole["usage"] and frames[-1]["choices"] == []
    assert [choice["index"] for choice in whole["choices"]] == list(range(2 * fields.get("n", 1)))
    for choice in whole["choices"]:
        own = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        if choice["logprobs"] is None:
            assert all(part["logprobs"] is None for part in own)
        else:
            for name, values in choice["logprobs"].items():
                assert [value for part in own for value in part["logprobs"][name]] == values
    assert "usage" not in sound.stream("a", max_tokens=1)[0]


def test_the_four_spellings_of_a_prompt(sound: Endpoint) -> None:
    text, other = "the cat", "sat on"
    ids, other_ids = sound.tokenizer.encode(text), sound.tokenizer.encode(other)
    for prompt, expected in [
        (text, [text]),
        (ids, [text]),
        ([text, other], [text, other]),
        ([ids, other_ids], [text, other]),
    ]:
        choices = sound.complete(prompt, echo=True, max_tokens=1)["choices"]
        assert [choice["text"] for choice in choices] == [
            e + sound.tokenizer.decode(sound.tokenizer.encode(e)[:1]) for e in expected
        ]


def test_end_of_text_in_a_prompt_and_an_empty_prompt(sound: Endpoint) -> None:
    eot_id = sound.tokenizer.eot_id
    _, tokenized = sound.call("POST", "/tokenize", {"prompt": f"a{END_OF_TEXT}b"})
    assert tokenized["tokens"] == [*sound.tokenizer.encode("a"), eot_id, *sound.tokenizer.encode("b")]
    for prompt in ("", None, END_OF_TEXT, [eot_id]):
        answer = sound.complete(prompt, logprobs=0)  # the echo engine ends it at once: the prompt is the end of a text
        assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (1, 1)
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("", "stop")
        assert answer["choices"][0]["logprobs"]["tokens"] == [END_OF_TEXT]


def test_stop_strings(sound: Endpoint) -> None:
    ids = [sound.tokenizer.ranks[bytes([byte])] for byte in b"the cat sat"]
    answer = sound.complete(ids, max_tokens=50, stop="t s", logprobs=1)
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("the ca", "stop")
    assert choice["logprobs"]["tokens"] == list("the ca")
    assert answer["usage"]["completion_tokens"] == len("the cat s")
    assert sound.complete(ids, max_tokens=50, stop=["zz", "at"])["choices"][0]["text"] == "the c"
    stream = sound.client().completions.create(model=MODEL, prompt=ids, max_tokens=500, stop=["t s"], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "the ca"
    sound.wait_until_idle()


def test_logprobs_have_openais_shape(sound: Endpoint) -> None:
    prompt = "the cat sat"
    choice = sound.complete(prompt, echo=True, logprobs=2, max_tokens=2)["choices"][0]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert "".join(logprobs["tokens"]) == choice["text"]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    for token, value, top in list(
        zip(*(logprobs[k] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True)
    )[1:]:
        assert top[token] == value and 2 <= len(top) <= 3
    only_actual = sound.complete(prompt, logprobs=0, max_tokens=1)["choices"][0]["logprobs"]
    assert list(only_actual["top_logprobs"][0]) == only_actual["tokens"]


def test_tokens_that_are_no_characters_do_not_collide(sound: Endpoint) -> None:
    ids = [sound.tokenizer.ranks[bytes([byte])] for byte in (0xE2, 0x80, 0xE2)]
    logprobs = sound.complete(ids, echo=True, logprobs=5, max_tokens=1)["choices"][0]["logprobs"]
    assert logprobs["tokens"][:2] == ["bytes:\\xe2", "bytes:\\x80"]
    assert all(len(top) >= 5 for top in logprobs["top_logprobs"][1:])


def lm_eval_scores(response: Any, ctxlens: list[int]) -> list[tuple[float, bool]]:
    """As lm-eval's `local-completions` reads a response."""
    scores = []
    for choice, ctxlen in zip(sorted(response["choices"], key=lambda c: int(c["index"])), ctxlens, strict=True):
        values = choice["logprobs"]["token_logprobs"][ctxlen:-1]
        tops = choice["logprobs"]["top_logprobs"][ctxlen:-1]
        scores.append((sum(values), all(v == max(t.values()) for v, t in zip(values, tops, strict=True))))
    return scores


def test_lm_eval_reads_the_scores(sound: Endpoint) -> None:
    num_ids, eot_id = sound.tokenizer.num_ids, sound.tokenizer.eot_id
    # Context, then continuation. The third generates the end of text: without a slot, every slice would be off by one.
    prompts = [[5, 6, 7, 7], [9, 9, 9], [eot_id, 4, 6], [8]]
    ctxlens = [2, 1, 1, 1]
    request = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    response = sound.complete(prompts, **request)
    for prompt, choice in zip(prompts, response["choices"], strict=True):
        assert len(choice["logprobs"]["token_logprobs"]) == len(choice["logprobs"]["top_logprobs"]) == len(prompt) + 1
    ranks = [
        [(b - a) % num_ids for a, b in zip(p[c - 1 :], p[c:], strict=False)]
        for p, c in zip(prompts, ctxlens, strict=True)
    ]
    expected = [-0.6931471824645996 * sum(rank + 1 for rank in own) for own in ranks]
    scores = lm_eval_scores(response, ctxlens)
    assert [score for score, _ in scores] == pytest.approx(expected)
    assert [greedy for _, greedy in scores] == [False, True, False, True]
    longest = sound.complete([[5] * (CONTEXT_LENGTH - 1)], **request)["choices"][0]["logprobs"]
    assert len(longest["token_logprobs"]) == CONTEXT_LENGTH


def test_lm_eval_finds_the_tokenizer(sound: Endpoint) -> None:
    status, info = sound.call("GET", "/tokenizer_info")
    assert status == 200 and info["eos_token"] == info["bos_token"] == END_OF_TEXT and info["chat_template"] is None
    _, eot = sound.call("POST", "/tokenize", {"prompt": info["eos_token"], "add_special_tokens": False})
    assert eot["tokens"] == [sound.tokenizer.eot_id]
    text = f"naïve 🐙 {PRIVATE}"
    _, tokenized = sound.call("POST", "/tokenize", {"prompt": text, "add_special_tokens": False})
    assert tokenized == {
        "tokens": sound.tokenizer.encode(text),
        "count": len(tokenized["tokens"]),
        "max_model_len": 1024,
    }
    assert sound.call("POST", "/detokenize", {"tokens": tokenized["tokens"]}) == (200, {"prompt": text})
    assert sound.call("POST", "/detokenize", {"tokens": [10**6]})[0] == 400
    assert sound.call("POST", "/tokenize", {"prompt": 3})[0] == 400


# ---- errors


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"logit_bias": {"5": 1, "x": 1}}, "logit_bias", "invalid_value"),
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_value"),
        ({"frequency_penalty": -3}, "frequency_penalty", "invalid_value"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options", "invalid_value"),
        ({"messages": []}, "messages", "unknown_parameter"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "unknown_parameter"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"max_tokens": "16"}, "max_tokens", "invalid_type"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_tokens": True}, "max_tokens", "invalid_type"),
        ({"max_tokens": -1}, "max_tokens", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"temperature": 100.1}, "temperature", "invalid_value"),
        ({"temperature": float("nan")}, "temperature", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "invalid_value"),
        ({"top_k": -2}, "top_k", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": QUEUE_LENGTH + 1}, "n", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"logprobs": 6}, "logprobs", "invalid_value"),
        ({"echo": 1}, "echo", "invalid_type"),
        ({"user": 5}, "user", "invalid_type"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"stop": ["a", ""]}, "stop", "invalid_value"),
        ({"stop": list(map(str, range(33)))}, "stop", "invalid_value"),
        ({"stop": 3}, "stop", "invalid_type"),
        ({"prompt": []}, "prompt", "invalid_type"),
        ({"prompt": [1, "a"]}, "prompt", "invalid_type"),
        ({"prompt": [True]}, "prompt", "invalid_type"),
        ({"prompt": [[1], [[2]]]}, "prompt", "invalid_type"),
        ({"prompt": [[1], []]}, "prompt", "invalid_value"),
        ({"prompt": [10**9]}, "prompt", "invalid_value"),
        ({"prompt": [5] * CONTEXT_LENGTH}, "prompt", "context_length_exceeded"),
        ({"prompt": "a", "max_tokens": CONTEXT_LENGTH}, "prompt", "context_length_exceeded"),
        ({"model": 3}, "model", "invalid_type"),
        ({"model": None}, "model", "missing_required_parameter"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_or_not_there_is_refused(sound: Endpoint, fields: dict[str, Any], param: str, code: str) -> None:
    status, error = sound.refused(**fields)
    assert (status, error["param"], error["code"], error["type"]) == (400, param, code, "invalid_request_error")


def test_a_million_blanks_are_a_prompt_like_others(sound: Endpoint) -> None:
    prompt = " " * 1_100_000 + "a"
    status, error = sound.refused(prompt=prompt)
    assert (status, error["param"], error["code"]) == (400, "prompt", "context_length_exceeded")
    status, body = sound.call("POST", "/tokenize", {"prompt": prompt})
    assert status == 200 and body["count"] == len(body["tokens"]) > CONTEXT_LENGTH
    assert sound.tokenizer.decode(body["tokens"]) == prompt


def test_a_prompt_that_cannot_be_encoded_is_the_client_s_error() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    tokenizer = Tokenizer(ranks, r"\s+(?!\S)|\s|\S+", "other")  # a pattern for which long runs of blanks are not cut
    with pytest.raises(RequestError, match="prompt cannot be encoded: tiktoken") as refused:
        encode_prompt(tokenizer, f"a{END_OF_TEXT}" + " " * 1_500_000 + "b")
    error = ApiError.of(refused.value)
    assert (error.status, error.body["error"]["param"]) == (400, "prompt")


def test_neutral_values_and_nulls_are_accepted(sound: Endpoint) -> None:
    neutral = {"suffix": "", "best_of": 2, "n": 2, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0}
    assert len(sound.complete("a", **neutral, stop=[], top_p=0, top_k=3, max_tokens=1)["choices"]) == 2
    names = set(CompletionRequest.model_fields) - {"model", "prompt"}
    assert sound.complete("a", **dict.fromkeys(names))["usage"]["completion_tokens"] == 16


def test_numbers_that_json_can_spell_and_engines_cannot_hold(sound: Endpoint) -> None:
    """Every number of a request, at values beyond int64 and float32: a completion, or an error that names the field."""
    numbers = ("1e-46", "1e-300", "5e-324", "1e400", "-1e400", "NaN", "Infinity", "true", "9223372036854775808")
    numbers = (*numbers, "1180591620717411303424", "1" + "0" * 400, "-1", "1.5")
    annotations = {name: str(field.annotation) for name, field in CompletionRequest.model_fields.items()}
    fields = [name for name, annotation in annotations.items() if re.search(r"\b(int|float)\b", annotation)]
    assert {"max_tokens", "temperature", "top_k", "seed", "logprobs", "best_of", "prompt_logprobs"} <= set(fields)
    for field in fields:
        for number in numbers:
            short = "" if field == "max_tokens" else '"max_tokens": 1, '
            body = f'{{"model": "{MODEL}", "prompt": "a", {short}"{field}": {number}}}'.encode()
            status, answer = sound.call("POST", "/v1/completions", body)
            if status != 200:
                named = (answer["error"]["param"], answer["error"]["code"])
                assert status == 400 and (named[0] in (field, "prompt", "max_tokens") or named[1] == "invalid_json"), (
                    field,
                    number,
                    answer,
                )
    for number in numbers:
        if number not in ("1e-46", "true"):
            for prompt in (f"[{number}]", f"[[{number}]]", f"[5, {number}]"):
                body = f'{{"model": "{MODEL}", "prompt": {prompt}}}'.encode()
                assert sound.call("POST", "/v1/completions", body)[0] == 400, prompt


def test_openai_client_raises_the_right_errors(sound: Endpoint) -> None:
    client = sound.client()
    with pytest.raises(openai.NotFoundError) as not_found:
        client.completions.create(model="other", prompt="a")
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
        client.completions.create(model=MODEL, prompt="a", suffix="b")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    for call in (
        partial(client.chat.completions.create, model=MODEL, messages=[]),
        partial(client.responses.create, model=MODEL, input="a"),
        partial(client.embeddings.create, model=MODEL, input="a"),
    ):
        with pytest.raises(openai.BadRequestError, match="not supported.* /v1/completions") as missing:
            call()
        assert missing.value.code == "unsupported_endpoint"


def test_errors_outside_the_fields(sound: Endpoint) -> None:
    for content in (b"", b"{", b"[1]", b'{"model": "\\ud800"}', b"\xff"):
        status, body = sound.call("POST", "/v1/completions", content)
        assert status == 400 and body["error"]["message"]
    status, body = sound.call("POST", "/v1/completions", b"{}", **{"Content-Type": "text/plain"})
    assert (status, body["error"]["code"]) == (400, "unsupported_content_type")
    for method, path in (
        ("GET", "/v1/nothing"),
        ("POST", "/completions"),
        ("POST", "/v1/completions/"),
        ("GET", "/redoc"),
    ):
        status, body = sound.call(method, path)
        assert (status, body["error"]["code"]) == (404, "unknown_url")
        assert f"{method} {path}. This endpoint has POST /v1/completions, GET /v1/models," in body["error"]["message"]
        assert "/v1/embeddings" not in body["error"]["message"] and "{name" not in body["error"]["message"]
    for method, path, allowed in (("GET", "/v1/completions", "POST"), ("POST", "/v1/models", "GET")):
        with contextlib.closing(sound.connect(method, path)) as response:
            assert (response.status, response.headers["Allow"]) == (405, allowed)
            error = json.loads(response.read())["error"]
        assert error["code"] == "method_not_allowed" and f"{allowed} {path}" in error["message"]
    status, body = sound.call("POST", "/v1/completions", b" " * (MAX_BODY_BYTES + 1))
    assert (status, body["error"]["code"]) == (413, "request_too_large")
    with contextlib.closing(sound.connect("OPTIONS", "/v1/completions", Origin="http://evil.example")) as response:
        assert not [name for name in response.headers if name.lower().startswith("access-control")]


def test_models(sound: Endpoint) -> None:
    client = sound.client()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_health(sound: Endpoint) -> None:
    status, health = sound.call("GET", "/health")
    assert (status, health["status"], health["model"], health["engine"]) == (200, "ok", MODEL, "echo")
    assert health["tokenizer_fingerprint"] == sound.tokenizer.fingerprint
    assert health["exchange_fingerprint"] == "sound-fingerprint"
    assert set(health["stats"]) >= {"num_running", "num_queued", "prompt_tokens", "completion_tokens"}


# ---- clients that leave, queues that are full


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": True, "n": 12}, {}, {"n": 12}], ids=str)
def test_a_client_that_leaves_frees_its_slots(sound: Endpoint, fields: dict[str, Any]) -> None:
    sound.wait_until_idle()
    before, num_choices = sound.stats(), fields.get("n", 1)
    body = {"model": MODEL, "prompt": f"a {PRIVATE}", "max_tokens": 900, **fields}
    if "stream" in fields:
        response = sound.connect("POST", "/v1/completions", body)
        assert response.readline().startswith(b"data: ")
        response.close()
    else:
        connection = sound.send("POST", "/v1/completions", body)
        sound.wait_for_in_flight(num_choices)
        connection.close()
    left = time.monotonic()
    sound.wait_until_idle()
    print(f"idle {1000 * (time.monotonic() - left):.0f} ms after the client left")
    after = sound.stats()
    assert after["num_aborted"] == before["num_aborted"] + num_choices
    assert after["num_finished"] == before["num_finished"]


def test_openai_client_closes_a_stream_early(sound: Endpoint) -> None:
    stream = sound.client().completions.create(model=MODEL, prompt="the cat", max_tokens=900, stream=True)
    next(iter(stream))
    assert sound.num_in_flight() == 1
    stream.close()
    sound.wait_until_idle()


def test_an_overloaded_engine_says_when_to_come_back(sound: Endpoint) -> None:
    sound.wait_until_idle()
    body = {"model": MODEL, "prompt": "a", "max_tokens": 900}
    with (
        contextlib.closing(sound.send("POST", "/v1/completions", body | {"n": QUEUE_LENGTH})),
        contextlib.closing(sound.send("POST", "/v1/completions", body | {"n": BATCH_SIZE})),
    ):
        sound.wait_for_in_flight(BATCH_SIZE + QUEUE_LENGTH)
        with contextlib.closing(sound.connect("POST", "/v1/completions", body)) as response:
            assert (response.status, response.headers["Retry-After"]) == (429, "1")
            assert json.loads(response.read())["error"]["code"] == "engine_overloaded"
        with pytest.raises(openai.RateLimitError):
            sound.client().completions.create(model=MODEL, prompt="a", stream=True)
        assert sound.num_in_flight() == BATCH_SIZE + QUEUE_LENGTH
    sound.wait_until_idle()


# ---- behind a key, with an engine that fails


def test_a_key_is_asked_for(faulty: Endpoint) -> None:
    body = {"model": MODEL, "prompt": "the cat"}
    for header in ("", "Bearer ", "Bearer wrong", f"Basic {KEY}", KEY):
        with contextlib.closing(faulty.connect("POST", "/v1/completions", body, Authorization=header)) as response:
            assert (response.status, response.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert json.loads(response.read())["error"]["code"] == "invalid_api_key"
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/tokenizer_info"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
    ):
        assert faulty.call(method, path, Authorization="")[0] == 401
    assert faulty.call("GET", "/health", Authorization="")[0] == 200
    assert faulty.complete("the cat")["choices"][0]["text"]
    with pytest.raises(openai.AuthenticationError):
        replace(faulty, key="wrong").client().models.list()


def test_an_engine_failure_is_a_500_that_is_not_retried(faulty: Endpoint) -> None:
    for fault in (RAISE_AT_ONCE, RAISE_A_BUG):
        for fields in ({}, {"stream": True}):
            body = {"model": MODEL, "prompt": [fault], **fields}
            with contextlib.closing(faulty.connect("POST", "/v1/completions", body)) as response:
                assert (response.status, response.headers["x-should-retry"]) == (500, "false")
                error = json.loads(response.read())["error"]
            assert error["type"] == "server_error" and "inside" not in error["message"]
    with pytest.raises(openai.InternalServerError):
        replace(faulty).client().with_options(max_retries=5).completions.create(model=MODEL, prompt=[RAISE_AT_ONCE])


def test_a_failure_in_a_stream_is_an_error_frame(faulty: Endpoint) -> None:
    stream = faulty.client().completions.create(model=MODEL, prompt=[RAISE_AFTER_A_TOKEN], stream=True, max_tokens=9)
    with pytest.raises(openai.APIError, match="the engine failed"):
        list(stream)


def test_a_panic_is_an_error_object_and_leaves_other_streams_alone(faulty: Endpoint) -> None:
    num_tokens = 200
    stream = faulty.client().completions.create(model=MODEL, prompt=[9], max_tokens=num_tokens, stream=True)
    chunks = [next(iter(stream))]
    for fields in ({}, {"stream": True}, {"prompt": [[9], [PANIC_AFTER_A_TOKEN]]}):
        body = {"model": MODEL, "prompt": [PANIC_AT_ONCE], **fields}
        with contextlib.closing(faulty.connect("POST", "/v1/completions", body)) as response:
            assert (response.status, response.headers["Content-Type"]) == (500, "application/json")
            error = json.loads(response.read())["error"]
        assert error["type"] == "server_error" and "inside" not in error["message"]
    with pytest.raises(openai.APIError, match="the server failed"):
        list(faulty.client().completions.create(model=MODEL, prompt=[PANIC_AFTER_A_TOKEN], stream=True, max_tokens=9))
    chunks += list(stream)
    assert sum(len(chunk.choices[0].text) for chunk in chunks) == num_tokens
    faulty.wait_until_idle()
    assert faulty.complete("the cat")["choices"][0]["text"]


def test_one_failed_choice_ends_the_others(faulty: Endpoint) -> None:
    status, error = faulty.refused(prompt=[[9], [RAISE_AFTER_A_TOKEN], [8]], max_tokens=900)
    assert (status, error["code"]) == (500, "engine_failed")
    assert faulty.num_in_flight() == 0


@pytest.mark.slow
def test_an_unhealthy_replica_is_replaced(faulty: Endpoint) -> None:
    faulty.complete([FALL_ILL], max_tokens=1)
    status, health = faulty.call("GET", "/health")
    assert (status, health["status"]) == (503, "unhealthy")
    deadline = time.monotonic() + 30
    while faulty.call("GET", "/health")[0] != 200:
        assert time.monotonic() < deadline, "Serve did not replace the replica"
        time.sleep(0.2)


def test_a_replica_that_stops_finishes_its_streams_and_closes_its_engine(faulty: Endpoint) -> None:
    from ray import serve as ray_serve

    closed = faulty.args.exchange / "closed"
    closed.unlink(missing_ok=True)
    num_tokens = 150
    stream = faulty.client().completions.create(model=MODEL, prompt=[9], max_tokens=num_tokens, stream=True)
    chunks = [next(iter(stream))]
    ray_serve.delete("faulty", _blocking=False)
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert sum(len(chunk.choices[0].text) for chunk in chunks) == num_tokens
    deadline = time.monotonic() + 10
    while not closed.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# ---- without Ray


def test_every_choice_draws_with_its_own_seed(tmp_path: Path) -> None:
    Tokenizer.train(["the cat sat on the mat " * 20], 260).save(tmp_path)
    model = load_model(ServeArgs(exchange=tmp_path, engine="echo"))
    seen: list[Request] = []

    class Recorder(EchoEngine):
        def generate(self, request: Request) -> AsyncIterator[Output]:
            seen.append(request)
            return super().generate(request)

    async def complete(**fields: Any) -> None:
        recording = replace(model, engine=Recorder(model.engine.info))
        body = CompletionRequest(model="kraken", **fields)
        call = await CompletionCall.prepare(body, recording)
        await call.collect(call.parts())

    asyncio.run(complete(prompt=["a", "b"], n=2, seed=40, temperature=0.5, top_p=0.9, top_k=7))
    assert [(r.sampling.seed, r.sampling.temperature, r.sampling.top_p, r.sampling.top_k) for r in seen] == [
        (40, 0.5, 0.9, 7),
        (41, 0.5, 0.9, 7),
    ] * 2
    assert len({request.id for request in seen}) == 4
    seen.clear()
    asyncio.run(complete(prompt="a", top_p=0.0))
    assert [(r.sampling.seed, r.sampling.top_p, r.sampling.top_k) for r in seen] == [(None, 1.0, 1)]


def test_arguments_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ServeArgs.model_validate({"exchange": str(tmp_path), "engine": "echo", "serve_config": {"model_name": "m"}})
    assert args.serve_config == ServeConfig(model_name="m")
    wrong: list[dict[str, Any]] = [
        {},
        {"exchange": "x", "engine": "other"},
        {"exchange": "x", "wrong": 1},
        {"exchange": "x", "engine_config": {"wrong": 1}},
        {"exchange": "x", "serve_config": {"port": 0}},
        {"exchange": "x", "echo_token_delay_s": 1.0},
    ]
    for values in wrong:
        with pytest.raises(ValueError):
            ServeArgs.model_validate(values)
    monkeypatch.setenv(API_KEY_VARIABLE, " ")
    with pytest.raises(ValueError, match=API_KEY_VARIABLE):
        build(args)


# ---- last, over everything above


def test_no_prompt_is_in_any_log(sound: Endpoint) -> None:
    import ray

    sound.complete(f"{PRIVATE} once more")
    node = ray._private.worker._global_node
    assert node is not None
    files = [path for path in Path(node.get_session_dir_path(), "logs").rglob("*") if path.is_file()]
    assert any("replica" in path.name for path in files)
    assert [path for path in files if PRIVATE.encode() in path.read_bytes()] == []
