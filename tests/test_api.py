"""The HTTP API in this process: what it says of itself, its metrics, its log, its pages, and that they agree."""

import asyncio
import dataclasses
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
import tiny
from prometheus_client.parser import text_string_to_metric_families

import kraken
from kraken.config import ConfigError, EngineConfig
from kraken.engine.echo import EchoEngine
from kraken.engine.engine import TorchEngine
from kraken.engine.protocol import Engine, EngineInfo
from kraken.model import Kraken
from kraken.tokenizer import Tokenizer
from serve.api import Api
from serve.api_key import ApiKey, ApiKeyDigest, KeyRing
from serve.chat_template import ChatTemplate
from serve.completions import ServedModel
from serve.protocol import ApiError

T = TypeVar("T")
ROOT = Path(__file__).parent.parent
MODEL, PRIVATE = "kraken", "xyzzyprivate"
KEY = "a-key-for-tests"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"the cat sat on the mat, {PRIVATE} and so forth, quickly " * 20], 290)


def served(engine: Engine, tokenizer: Tokenizer) -> ServedModel:
    return ServedModel(
        name=MODEL, engine=engine, tokenizer=tokenizer, exchange_fingerprint="f", max_choices=8, created=1
    )


def info_of(tokenizer: Tokenizer, name: str, context_length: int) -> EngineInfo:
    return EngineInfo(
        name=name,
        context_length=context_length,
        num_ids=tokenizer.num_ids,
        eot_id=tokenizer.eot_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )


def echo_model(tokenizer: Tokenizer, token_delay_s: float = 0.0, **config: Any) -> ServedModel:
    engine = EchoEngine(info_of(tokenizer, "echo", 64), token_delay_s, EngineConfig(**config))
    return served(engine, tokenizer)


def torch_model(tokenizer: Tokenizer, **config: Any) -> ServedModel:
    model = Kraken(tiny.config().model)
    model.init_weights(seed=0)
    info = info_of(tokenizer, "torch", model.config.context_length)
    engine = TorchEngine.from_model(model, info, EngineConfig(device="cpu", dtype="float32", **config))
    return served(engine, tokenizer)


@asynccontextmanager
async def client_of(model: ServedModel, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=Api(model, **options).app())
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
            yield client
    finally:
        await model.engine.close()


def use(model: ServedModel, work: Callable[[httpx.AsyncClient], Awaitable[T]], **options: Any) -> T:
    async def main() -> T:
        async with client_of(model, **options) as client:
            return await work(client)

    return asyncio.run(main())


async def complete(client: httpx.AsyncClient, prompt: Any, **fields: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": MODEL, "prompt": prompt, **fields})


def samples(text: str) -> dict[str, float]:
    """Series as `name{label=value}`, without the labels of every series -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name not in ("model_name", "replica")}
            found[sample.name + (json.dumps(labels, sort_keys=True) if labels else "")] = sample.value
    return found


# ---- what it says of itself


def test_models_and_version(tokenizer: Tokenizer) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        card = (await client.get(f"/v1/models/{MODEL}")).json()
        assert card == {
            "id": MODEL, "object": "model", "created": 1, "owned_by": "kraken", "root": MODEL,
            "max_model_len": 64, "context_length": 64,
        }  # fmt: skip
        assert (await client.get("/v1/models")).json()["data"] == [card]
        assert (await client.get("/v1/models/other")).status_code == 404
        assert (await client.get("/version")).json() == {"version": kraken.__version__}

    use(echo_model(tokenizer), work)


def test_the_description_names_every_url_and_every_field(tokenizer: Tokenizer) -> None:
    from serve.api import OPERATIONS
    from serve.protocol import CompletionRequest

    async def work(client: httpx.AsyncClient) -> None:
        described = (await client.get("/openapi.json")).json()
        urls = {(method.upper(), url) for url, methods in described["paths"].items() for method in methods}
        assert urls == {(operation.method, operation.url) for operation in OPERATIONS}
        for method, url in urls:
            answer = await client.request(method, url.replace("{model}", MODEL), json={} if method == "POST" else None)
            assert str(answer.status_code) in described["paths"][url][method.lower()]["responses"]
        schema = described["components"]["schemas"]["CompletionRequest"]
        assert set(schema["properties"]) == set(CompletionRequest.model_fields)
        assert schema["required"] == ["model"] and schema["additionalProperties"] is False
        page = await client.get("/docs")
        assert page.headers["content-type"].startswith("text/html") and "<script" not in page.text
        for name in CompletionRequest.model_fields:
            assert f"<code>{name}</code>" in page.text

    use(echo_model(tokenizer), work)


def test_pages_load_nothing_from_elsewhere(tokenizer: Tokenizer) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for url in ("/", "/docs"):
            page = await client.get(url)
            policy = page.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "connect-src 'self'" in policy
            assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", page.text)
            assert not re.findall(r"""\s(?:on\w+|style)=""", page.text), "the policy forbids handlers and styles there"

    use(echo_model(tokenizer), work)


def test_health_says_why_not(tokenizer: Tokenizer) -> None:
    model = torch_model(tokenizer)

    async def work(client: httpx.AsyncClient) -> None:
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()["status"], answer.json()["reason"]) == (200, "ok", None)
        await model.engine.close()
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()["reason"]) == (503, "it was closed")
        answer = await complete(client, "a")
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")

    use(model, work)


# ---- chat

TEMPLATE = """{% for message in messages %}{{ message.role[0] }}:{{ message.content }}
{% endfor %}{% if messages[-1].role == "assistant" %}{{ raise_exception("the last turn must not be the assistant's") }}
{% endif %}a:"""


def test_a_chat_is_the_completion_of_the_rendered_prompt(tokenizer: Tokenizer) -> None:
    model = dataclasses.replace(torch_model(tokenizer), chat_template=ChatTemplate(TEMPLATE))
    messages = [
        {"role": "system", "content": "so"},
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]},
    ]
    prompt = "s:so\nu:the cat\na:"

    async def work(client: httpx.AsyncClient) -> None:
        openai_client = openai.AsyncOpenAI(base_url="http://endpoint/v1", api_key="k", http_client=client)
        fields: dict[str, Any] = {"seed": 3, "n": 2, "max_tokens": 4}
        plain = (await complete(client, prompt, logprobs=2, **fields)).json()
        chat = await openai_client.chat.completions.create(
            model=MODEL, messages=messages, logprobs=True, top_logprobs=2, **fields
        )
        assert chat.object == "chat.completion"
        assert chat.usage and chat.usage.prompt_tokens == plain["usage"]["prompt_tokens"]
        for ours, theirs in zip(chat.choices, plain["choices"], strict=True):
            assert ours.message.content == theirs["text"] and ours.finish_reason == theirs["finish_reason"]
            assert ours.logprobs and ours.logprobs.content
            assert [token.token for token in ours.logprobs.content] == theirs["logprobs"]["tokens"]
            for token, top in zip(ours.logprobs.content, theirs["logprobs"]["top_logprobs"], strict=True):
                assert {other.token: other.logprob for other in token.top_logprobs} == top
                assert token.bytes and tokenizer.ranks[bytes(token.bytes)] >= 0
        stream = await openai_client.chat.completions.create(
            model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}, **fields
        )
        texts, last = {0: "", 1: ""}, None
        async for chunk in stream:
            last = chunk
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert list(texts.values()) == [choice["text"] for choice in plain["choices"]]
        assert last and last.usage and last.usage.completion_tokens == plain["usage"]["completion_tokens"]
        whole = await openai_client.chat.completions.create(
            model=MODEL, messages=messages, extra_body={"ignore_eos": True}
        )
        length = model.engine.info.context_length
        assert whole.usage and whole.usage.total_tokens == length and whole.choices[0].finish_reason == "length"
        for wrong, param in (
            ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
            ({"messages": []}, "messages"),
            ({"messages": messages, "top_logprobs": 2}, "top_logprobs"),
            ({"messages": messages, "max_tokens": 0}, "max_tokens"),
            ({"messages": messages, "tools": [{}]}, "tools"),
            ({"messages": messages, "echo": True}, "echo"),
        ):
            answer = await client.post("/v1/chat/completions", json={"model": MODEL, **wrong})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
        assert "/v1/chat/completions" in (await client.get("/openapi.json")).json()["paths"]
        assert (await client.get("/tokenizer_info")).json()["chat_template"] == TEMPLATE

    use(model, work)


def test_a_base_model_says_that_it_has_no_template(tokenizer: Tokenizer) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
        answer = await client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert "base model without a chat template; use /v1/completions" in answer.json()["error"]["message"]

    use(echo_model(tokenizer), work)


def test_a_folder_carries_its_template_in_one_of_two_files(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}?"}))
    found = ChatTemplate.load(tmp_path)
    assert found and found.render([{"role": "user", "content": "a"}]) == "a?"
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    found = ChatTemplate.load(tmp_path)
    assert found and found.source == TEMPLATE
    with pytest.raises(ConfigError, match="no valid Jinja"):
        ChatTemplate("{% for %}")
    with pytest.raises(ApiError, match="refuses these messages"):
        ChatTemplate("{{ messages.append(1) }}").render([])


# ---- metrics and log


def test_metrics_are_what_a_client_counts(tokenizer: Tokenizer) -> None:
    """Counters against the usage that the responses report, and sums against times that the client takes."""

    async def work(client: httpx.AsyncClient) -> None:
        loop, started = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        calls: list[dict[str, Any]] = [
            {"prompt": "the cat sat on the mat, the cat sat", "max_tokens": 9},
            {"prompt": "the cat sat on the mat, the cat sat", "max_tokens": 9},
            {"prompt": ["the cat", "sat on"], "n": 2, "max_tokens": 3, "ignore_eos": True},
            {"prompt": "the mat", "max_tokens": 5, "stream": True, "stream_options": {"include_usage": True}},
            {"prompt": "the mat", "max_tokens": 0, "echo": True, "logprobs": 1},
        ]
        usages, num_choices = [], 0
        for fields in calls:
            answer = await complete(client, **fields)
            assert answer.status_code == 200
            if fields.get("stream"):
                body = json.loads(answer.text.split("\n\n")[-3].removeprefix("data: "))
            else:
                body = answer.json()
            usages.append(body["usage"])
            num_choices += 4 if "n" in fields else 1
        assert (await complete(client, [10**9])).status_code == 400
        assert (await client.post("/v1/completions", json={"model": "other"})).status_code == 404
        assert (await client.get("/nothing")).status_code == 404
        elapsed_s = loop.time() - started
        text = (await client.get("/metrics")).text
        found = samples(text)
        num_completion_tokens = sum(usage["completion_tokens"] for usage in usages)
        assert found["kraken:generation_tokens_total"] == num_completion_tokens
        assert found["kraken:prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in usages)
        cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
        assert found["kraken:prefix_cache_hits_total"] == cached > 0
        assert found["kraken:prefix_cache_queries_total"] == found["kraken:prompt_tokens_total"]
        assert found["kraken:time_to_first_token_seconds_count"] == num_choices - 1  # one is only scored
        num_later = num_completion_tokens - (num_choices - 1)
        assert found["kraken:inter_token_latency_seconds_count"] == num_later
        assert found["kraken:request_queue_time_seconds_count"] == num_choices
        assert found["kraken:e2e_request_latency_seconds_count"] == 4
        in_requests_s = found["kraken:e2e_request_latency_seconds_sum"]
        assert 0 < found["kraken:request_queue_time_seconds_sum"] < in_requests_s < elapsed_s
        ended = {name: value for name, value in found.items() if name.startswith("kraken:request_success_total")}
        assert sum(ended.values()) == num_choices
        assert found['kraken:request_errors_total{"code": "invalid_value"}'] == 1
        assert found['kraken:request_errors_total{"code": "model_not_found"}'] == 1
        assert found['kraken:http_requests_total{"handler": "/v1/completions", "method": "POST", "status": "200"}'] == 5
        assert found['kraken:http_requests_total{"handler": "unknown", "method": "GET", "status": "404"}'] == 1
        assert found["kraken:num_requests_running"] == found["kraken:kv_blocks_used"] == 0
        assert found["kraken:kv_blocks"] > 0 and found["kraken:engine_healthy"] == 1
        assert 'model_name="kraken",replica="r1"' in text
        dashboard = json.loads((ROOT / "docs/grafana_dashboard.json").read_text())
        queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        scraped = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
        asked = {name for query in queries for name in re.findall(r"kraken:\w+", query)}
        assert len(queries) > 10 and asked <= scraped, asked - scraped

    use(torch_model(tokenizer, tokens_per_block=4), work, replica="r1")


def test_what_runs_and_what_is_aborted_is_seen(tokenizer: Tokenizer) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        calls = [asyncio.create_task(complete(client, "the", max_tokens=40)) for _ in range(3)]
        await asyncio.sleep(0.05)
        found = samples((await client.get("/metrics")).text)
        assert (found["kraken:num_requests_running"], found["kraken:num_requests_waiting"]) == (1, 2)
        refused = [await complete(client, "the", max_tokens=40) for _ in range(1)]
        assert [answer.status_code for answer in refused] == [429]
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(0.05)
        found = samples((await client.get("/metrics")).text)
        assert (found["kraken:num_requests_running"], found["kraken:num_requests_waiting"]) == (0, 0)
        assert found['kraken:request_success_total{"finished_reason": "abort"}'] == 3
        assert found['kraken:request_errors_total{"code": "engine_overloaded"}'] == 1
        assert found['kraken:http_requests_total{"handler": "/v1/completions", "method": "POST", "status": "499"}'] == 3

    use(echo_model(tokenizer, 0.02, max_batch_size=1, max_queued_requests=2), work)


def test_the_log_has_one_line_per_request_and_no_text(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    async def work(client: httpx.AsyncClient) -> dict[str, Any]:
        headers = {"x-request-id": "mine-1", "traceparent": TRACEPARENT}
        body = {"model": MODEL, "prompt": f"the {PRIVATE}", "max_tokens": 3}
        answer = await client.post("/v1/completions", json=body, headers=headers)
        usage: dict[str, Any] = answer.json()["usage"]
        refused = await complete(client, PRIVATE, temperature=-1)
        assert refused.status_code == 400 and re.fullmatch("[0-9a-f]{32}", refused.headers["x-request-id"])
        await client.get("/v1/nothing", headers={"traceparent": TRACEPARENT.replace("4", "g")})
        return usage

    with caplog.at_level(logging.INFO, "kraken.requests"):
        usage = use(torch_model(tokenizer), work)
    lines = [record.message for record in caplog.records if record.name == "kraken.requests"]
    first, second, third = map(json.loads, lines)
    assert (first["request_id"], first["trace_id"]) == ("mine-1", TRACEPARENT.split("-")[1])
    assert (first["status"], first["reason"], first["model"], first["route"]) == (
        200,
        "length",
        MODEL,
        "/v1/completions",
    )
    assert first["prompt_tokens"] == usage["prompt_tokens"] and first["completion_tokens"] == 3
    assert 0 <= first["queue_ms"] <= first["ttft_ms"] <= first["duration_ms"]
    assert (second["status"], second["reason"], second["ttft_ms"]) == (400, "invalid_value", None)
    assert (third["status"], third["reason"], third["route"], third["trace_id"]) == (404, "unknown_url", "", None)
    assert PRIVATE not in caplog.text


def header(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_a_key_of_the_file_has_a_name_and_a_limit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(ApiKeyDigest.of(ApiKey("of-ann"), "ann", requests_per_minute=2).line() + "\n")

    async def work(client: httpx.AsyncClient) -> None:
        for key, statuses in (("of-ann", [200, 200, 429]), (KEY, [200] * 4), ("of-bob", [401])):
            answers = [await client.get("/v1/models", headers=header(key)) for _ in statuses]
            assert [answer.status_code for answer in answers] == statuses
            if statuses[-1] == 429:
                assert 1 <= int(answers[-1].headers["retry-after"]) <= 30
                assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"

    use(echo_model(tokenizer), work, keys=KeyRing(ApiKeyDigest.of(ApiKey(KEY)), str(file)))


def test_what_is_guarded(tokenizer: Tokenizer) -> None:
    from serve.api import OPERATIONS

    async def work(client: httpx.AsyncClient) -> None:
        for operation in OPERATIONS:
            url = operation.url.replace("{model}", MODEL)
            answer = await client.request(operation.method, url)
            assert (answer.status_code == 401) is not operation.is_open
            answer = await client.request(operation.method, url, headers={"Authorization": f"Bearer {KEY}"})
            assert answer.status_code in (200, 400)
        stranger, client_with_key = await client.get("/health"), await client.get("/health", headers=header(KEY))
        assert stranger.json() == {"status": "ok"} and client_with_key.json()["engine"] == "echo"
        assert (await client.get("/health", headers=header("wrong"))).json() == {"status": "ok"}

    use(echo_model(tokenizer), work, keys=KeyRing(ApiKeyDigest.of(ApiKey(KEY))))
