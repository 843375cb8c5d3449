"""The TensorRT-LLM engine over a stand-in: the same tokens as our own engine, and nothing left behind, ever."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trtllm_ranks import ROOT, environment, run_with_fake

from kraken.choose_engine import Choice, choose, choose_for, find_machine, open_engine
from kraken.config import ConfigError, EngineConfig, ModelConfig, ServeConfig
from kraken.convert import to_exchange, write_folder
from kraken.engine.engine import TorchEngine
from kraken.engine.placement import Machine
from kraken.engine.protocol import (
    EngineError,
    EngineOverloaded,
    PromptOutput,
    Request,
    RequestError,
    SamplingParams,
    TokenOutput,
)
from kraken.evaluate import collect, parity
from kraken.manifest import ArtefactError, finish_artefact
from kraken.model import Kraken
from kraken.tokenizer import Tokenizer
from kraken.trtllm import frames
from kraken.trtllm.checkpoint import from_exchange
from kraken.trtllm.engine import TensorRTEngine
from kraken.trtllm.fingerprint import RECORD_NAME, require_same_machine
from kraken.trtllm.session import make_job
from kraken.trtllm.tree import MARK, end_marked, marked

SIGNATURES = json.loads((ROOT / "kraken/trtllm/signatures.json").read_text())
CONTEXT_LENGTH = 48
PROMPT = (5, 6, 9, 10, 11, 3)
TENSORRT = EngineConfig(kind="tensorrt_llm", dtype="float32", max_batch_size=4, max_queued_requests=4)
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


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_exchange(tmp_path_factory.mktemp("exchange"))


@asynccontextmanager
async def running(exchange: Path, config: EngineConfig = TENSORRT, **fake: str) -> AsyncIterator[TensorRTEngine]:
    """The engine in a process tree of its own, on the stand-in; checks that nothing of it survives."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(**fake).items():
            patch.setenv(name, value)
        engine = open_engine(Choice("tensorrt_llm", "asked for"), exchange, config)
        assert isinstance(engine, TensorRTEngine)
        try:
            yield engine
        finally:
            await engine.close()
            assert marked(mark_of(engine)) == []


def mark_of(engine: TensorRTEngine) -> str:
    return engine._backend._mark  # type: ignore[attr-defined]


def request(name: str, prompt: tuple[int, ...] = PROMPT, **fields: Any) -> Request:
    sampling = fields.pop("sampling", None) or SamplingParams(
        **fields.pop("draw", {"max_tokens": 6, "temperature": 0.0})
    )
    return Request(id=name, prompt_ids=prompt, sampling=sampling, **fields)


def ids_of(outputs: list[Any]) -> list[int]:
    return [o.token_id for o in outputs if isinstance(o, TokenOutput)]


# ---- the same numbers


def test_tokens_and_logprobs_equal_our_engine(exchange: Path) -> None:
    model_requests = [
        request("greedy"),
        request("scored", num_logprobs=3, prompt_logprobs=True),
        request("scored-only", draw={"max_tokens": 0}, num_logprobs=2, prompt_logprobs=True),
        request("full", prompt=tuple(range(3, 3 + CONTEXT_LENGTH + 1)), draw={"max_tokens": 0}, prompt_logprobs=True),
        request("one-id", prompt=(4,), draw={"max_tokens": 0}, prompt_logprobs=True),
        request("logits", return_logits=True),
        request("nothing", draw={"max_tokens": 0}),
    ]

    async def run() -> None:
        ours = TorchEngine.from_exchange(exchange, replace(TENSORRT, kind="torch", device="cpu"))
        async with running(exchange) as engine:
            assert engine.info == replace(ours.info, name="tensorrt_llm")
            found = await asyncio.gather(*(collect(engine, r) for r in model_requests))
            for one, outputs in zip(model_requests, found, strict=True):
                require_close(outputs, await collect(ours, one))
            capabilities = engine.capabilities
            assert capabilities and capabilities.prompt_logits and capabilities.token_logits and capabilities.seeds
            report = await parity(engine, _model(exchange), [list(PROMPT), [7, 8]], num_tokens=4, tolerance=1e-4)
            assert report.passed
            stats = engine.stats()
            assert stats.num_finished == len(model_requests) + 2 and stats.healthy and stats.num_running == 0
            assert stats.ttft_ms and stats.reported_ttft_ms and stats.reported_queue_ms is not None
        await ours.close()

    asyncio.run(run())
    record = json.loads((exchange / "tensorrt_llm" / RECORD_NAME).read_text())
    assert record["tensorrt_llm"] == "1.2.1" and record["num_ways"] == 2 and record["dtype"] == "float32"
    assert record["exchange_fingerprint"] == "tiny-exchange"


def _model(exchange: Path) -> Kraken:
    from kraken.convert import read_exchange

    return read_exchange(exchange, torch.float32)


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


# ---- one engine on a model that counts


def test_stream_seeds_stop_abort_and_refusals(exchange: Path) -> None:
    async def run() -> None:
        async with running(exchange, FAKE_TRTLLM="canned,die-on-7,litter", FAKE_TRTLLM_DELAY_S="0.02") as engine:
            await engine.start()
            times = []
            started_at = time.monotonic()
            async for output in engine.generate(request("stream", draw={"max_tokens": 20, "temperature": 0.0})):
                times.append(time.monotonic() - started_at)
                assert isinstance(output, TokenOutput) and output.token_id == 4 + len(times) - 1
            assert len(times) == 20 and times[0] < times[-1] / 3

            stopped = await collect(engine, request("stop", draw={"temperature": 0.0, "stop_ids": (6, 9)}))
            assert ids_of(stopped) == [4, 5, 6] and stopped[-1].finish_reason == "stop"

            draws = [{"max_tokens": 8, "temperature": 30.0, "seed": seed} for seed in (3, 3, 4)]
            same, again, other = [
                ids_of(await collect(engine, request(f"draw-{i}", draw=draw))) for i, draw in enumerate(draws)
            ]
            assert same == again != other
            free = {"max_tokens": 8, "temperature": 30.0}
            unseeded = [ids_of(await collect(engine, request(f"free-{i}", draw=free))) for i in range(2)]
            assert unseeded[0] != unseeded[1], "without a seed every request would draw the same"

            long = request("left", draw={"max_tokens": 30, "temperature": 0.0})
            stream = engine.generate(long)
            await anext(stream)
            assert engine.stats().num_running == 1
            await stream.aclose()
            assert engine.stats().num_running == 0 and engine.stats().num_aborted == 1
            task = asyncio.create_task(collect(engine, replace(long, id="aborted")))
            await asyncio.sleep(0.1)
            engine.abort("aborted")
            assert len(await task) < 30
            engine.abort("aborted")
            engine.abort("nobody")

            many = [asyncio.create_task(collect(engine, replace(long, id=f"many-{i}"))) for i in range(9)]
            refused = [e for e in await asyncio.gather(*many, return_exceptions=True) if isinstance(e, Exception)]
            assert len(refused) == 1 and isinstance(refused[0], EngineOverloaded)

            with pytest.raises(RequestError, match="exceed the context"):
                await collect(engine, request("long", draw={"max_tokens": CONTEXT_LENGTH}))
            with pytest.raises(EngineError, match="a rank died"):
                await collect(engine, request("dies", prompt=(7,)))
            assert ids_of(await collect(engine, request("after", sampling=GREEDY))) == [4, 5, 6, 7, 8, 9]
            assert engine.stats().healthy, "a request that failed alone says nothing of the engine"

            waiting = asyncio.create_task(collect(engine, replace(long, id="cut")))
            await asyncio.sleep(0.1)
            os.kill(engine._backend._process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
            with pytest.raises(EngineError, match="process has ended"):
                await waiting
            assert not engine.stats().healthy
            assert marked(mark_of(engine)), "ranks and litter outlive their parent, which is why they are looked for"

    asyncio.run(run())


def test_what_the_version_lacks_is_refused(exchange: Path) -> None:
    async def run() -> None:
        words = "canned,no-context-logits,no-generation-logits,no-seeds"
        async with running(exchange, FAKE_TRTLLM=words) as engine:
            assert ids_of(await collect(engine, request("plain"))) == [4, 5, 6, 7, 8, 9]
            for match, fields in {
                "prompt_logprobs": {"prompt_logprobs": True},
                "num_logprobs=2": {"num_logprobs": 2},
                "seed=5": {"draw": {"seed": 5}},
            }.items():
                with pytest.raises(RequestError, match=match):
                    await collect(engine, request("asks", **fields))

    asyncio.run(run())


# ---- starting and ending


@pytest.mark.parametrize(
    ("words", "limit_s", "match"),
    [
        ("hang,litter", 7.0, "startup_timeout_s=7"),
        pytest.param("dead", 60.0, "worker died", marks=pytest.mark.slow),
    ],
)
def test_a_failed_start_leaves_nothing(exchange: Path, words: str, limit_s: float, match: str) -> None:
    async def run() -> None:
        async with running(exchange, replace(TENSORRT, startup_timeout_s=limit_s), FAKE_TRTLLM=words) as engine:
            with pytest.raises(EngineError, match=match):
                await collect(engine, request("first"))
            assert marked(mark_of(engine)) == []
            with pytest.raises(EngineError, match="failed before"):
                await collect(engine, request("second"))

    asyncio.run(run())


def test_the_tree_ends_with_its_user(exchange: Path) -> None:
    code = f"""
import asyncio, os
from pathlib import Path
from kraken.config import EngineConfig
from kraken.choose_engine import Choice, open_engine
async def run():
    config = EngineConfig(kind="tensorrt_llm", dtype="float32")
    engine = open_engine(Choice("tensorrt_llm", ""), Path({str(exchange)!r}), config)
    await engine.start()
    print(engine._backend._mark, flush=True)
    os._exit(9)
asyncio.run(run())
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, env=environment(FAKE_TRTLLM="canned,litter"), capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 9, result.stderr
    mark = result.stdout.strip()
    deadline = time.monotonic() + 20
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def test_marked_processes_are_found_wherever_they_went() -> None:
    sleeper = "import time; time.sleep(100)"
    code = f"import subprocess as s, sys; s.Popen([sys.executable, '-c', {sleeper!r}], start_new_session=True)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {MARK: "test-tree"}, check=True)
    assert len(marked("test-tree")) == 1 and marked("test-tre") == []
    assert end_marked("test-tree") == [] and marked("test-tree") == []


def test_frames_bring_back_what_was_sent() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)

    async def run() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(frames.pack({"type": "step", "ids": [1]}, {"a": array, "b": None, "c": array[:0]}))
        reader.feed_data(frames.pack({"type": "end"}))
        reader.feed_eof()
        message, arrays = await frames.read(reader)
        assert message == {"type": "step", "ids": [1]} and arrays.keys() == {"a", "c"}
        assert np.array_equal(arrays["a"], array) and arrays["c"].shape == (0, 3)
        assert await frames.read(reader) == ({"type": "end"}, {})
        with pytest.raises(EOFError):
            await frames.read(reader)

    asyncio.run(run())


# ---- what is said to TensorRT-LLM


def test_only_known_arguments_are_used() -> None:
    code = (
        "import json; from kraken.trtllm.probe import probe; from kraken.trtllm.session import Launch, llm_arguments;"
        "launch = Launch(folder='f', num_ranks=6, context_length=8, eot_id=0, dtype='bfloat16', max_batch_size=4,"
        " exchange_fingerprint='e', overlap=False); print(json.dumps([llm_arguments(launch), probe()], default=repr))"
    )
    arguments, found = json.loads(run_with_fake(code))
    assert found == {"version": "1.2.1", "problem": "", "num_gpus": torch.cuda.device_count()}
    assert arguments.keys() <= set(SIGNATURES["symbols"]["tensorrt_llm.llmapi.llm_args.TorchLlmArgs.fields"])
    assert arguments["max_input_len"] == 8, "1024 unless given"
    assert arguments["max_num_tokens"] <= 9, "start-up runs that many positions"
    known = set(SIGNATURES["symbols"]["tensorrt_llm.SamplingParams.__init__"])
    for sampling in (GREEDY, SamplingParams(seed=-3, stop_ids=(1,)), SamplingParams(max_tokens=0)):
        job = make_job(request("a", sampling=sampling, prompt_logprobs=True), eot_id=0)
        assert job.sampling.keys() <= known
        assert job.sampling["end_id"] is not None and not job.sampling["detokenize"]
        assert job.cache_salt, "positions taken from the cache have no logits"
    assert make_job(request("a", sampling=GREEDY), eot_id=0).cache_salt is None
    greedy, drawn = (make_job(request("a", sampling=s), 0).sampling for s in (GREEDY, SamplingParams(seed=-3)))
    assert greedy["top_k"] == 1 and not greedy.keys() & {"temperature", "top_p"}
    assert drawn["top_k"] == 0 and drawn["top_p"] == 1.0 and 0 <= drawn["seed"] < 2**63


# ---- which engine

GOOD = Machine(version="1.2.1", num_gpus=4)


@pytest.mark.parametrize(
    ("machine", "is_converted", "taken", "reason"),
    [
        (GOOD, True, "tensorrt_llm", "TensorRT-LLM 1.2.1 imports, 4 GPUs for 4 ways"),
        (GOOD, False, "torch", "not converted"),
        (replace(GOOD, num_gpus=3), True, "torch", "3 GPUs are there"),
        (Machine(version=None, problem="libmpi.so.40 is missing"), True, "torch", "libmpi"),
    ],
)
def test_auto_takes_what_is_possible_and_says_why(
    machine: Machine, is_converted: bool, taken: str, reason: str
) -> None:
    choice = choose("auto", 4, is_converted, machine)
    assert choice.kind == taken and reason in str(choice) and "\n" not in str(choice)
    assert choose("torch", 4, is_converted, machine).kind == "torch"
    if taken == "torch":
        with pytest.raises(ConfigError, match=reason):
            choose("tensorrt_llm", 4, is_converted, machine)


def test_this_machine_has_none(exchange: Path) -> None:
    assert find_machine() == Machine(version=None, problem="tensorrt_llm is not installed")
    assert choose_for(exchange, EngineConfig()).kind == "torch"
    with pytest.raises(ConfigError, match="not installed"):
        choose_for(exchange, TENSORRT)
    with pytest.raises(ConfigError, match="engine.device=cpu"):
        EngineConfig(kind="tensorrt_llm", device="cpu")


# ---- which machine


def test_another_machine_is_refused(tmp_path: Path) -> None:
    first = require_same_machine(tmp_path, 4, "bfloat16", "e", "1.2.1")
    assert require_same_machine(tmp_path, 4, "bfloat16", "e", "1.2.1") == first
    with pytest.raises(
        ArtefactError, match=r"tensorrt_llm was 1.2.1 and is 1.3.0; exchange_fingerprint was e and is f"
    ):
        require_same_machine(tmp_path, 4, "bfloat16", "f", "1.3.0")
    (tmp_path / RECORD_NAME).write_text("{}")
    with pytest.raises(ArtefactError, match="damaged"):
        require_same_machine(tmp_path, 4, "bfloat16", "e", "1.2.1")


def test_a_folder_of_another_model_is_refused(exchange: Path, tmp_path: Path) -> None:
    other = make_exchange(tmp_path / "other")
    path = other / "manifest.json"
    path.write_text(path.read_text().replace("tiny-exchange", "another"))
    with pytest.raises(ArtefactError, match="another model"):
        TensorRTEngine.from_exchange(other, TENSORRT)


# ---- in a Serve replica

BUNDLE = {"CPU": 0.2}
MODEL = "on-tensorrt-llm"
REPLICA_MARK = f"replica-of-{os.getpid()}"


@dataclass
class Endpoint:
    port: int
    exchange: Path

    def post(self, **body: Any) -> http.client.HTTPResponse:
        """The head of the response; closing it closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = json.dumps({"model": MODEL, "temperature": 0, **body})
        connection.request(
            "POST", "/v1/completions", content, {"Content-Type": "application/json", "Connection": "close"}
        )
        return connection.getresponse()

    def call(self, **body: Any) -> tuple[int, Any]:
        with contextlib.closing(self.post(**body)) as response:
            return response.status, json.loads(response.read())

    def health(self) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10) as response:
            return json.load(response)

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 10.0
        while self.health()["stats"]["num_running"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture(scope="module")
def endpoint(ray_cluster: str, free_port: Callable[[], int], exchange: Path) -> Iterator[Endpoint]:
    """Bundles without GPUs, since there are none; all else is as in production."""
    from ray import serve as ray_serve

    from serve import app

    port = free_port()
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = app.ServeArgs(
        exchange=exchange, engine="tensorrt_llm", engine_config=TENSORRT, serve_config=ServeConfig(model_name=MODEL)
    )
    with pytest.MonkeyPatch.context() as patch:
        fake = {"FAKE_TRTLLM": "die-on-7", "FAKE_TRTLLM_DELAY_S": "0.01", "SLURM_PROCID": "0", MARK: REPLICA_MARK}
        for name, value in fake.items() | {("PYTHONPATH", environment()["PYTHONPATH"])}:
            patch.setitem(app.REPLICA_ENVIRONMENT, name, value)
        load = partial(app.load_model, args, Choice("tensorrt_llm", "asked for"))
        application = app.bind(load, args.serve_config, [BUNDLE] * 3)
    ray_serve.run(application, name="tensorrt_llm", route_prefix="/")
    yield Endpoint(port, exchange)
    ray_serve.shutdown()


@pytest.mark.slow
@pytest.mark.ray
def test_a_replica_streams_aborts_fails_and_leaves_nothing(endpoint: Endpoint) -> None:
    from ray import serve as ray_serve
    from ray.util import list_named_actors, placement_group_table

    assert endpoint.health()["engine"] == "tensorrt_llm"
    ours = TorchEngine.from_exchange(endpoint.exchange, replace(TENSORRT, kind="torch", device="cpu"))
    asked = request("a", prompt_logprobs=True, num_logprobs=2)

    async def reference() -> list[Any]:
        try:
            return await collect(ours, asked)
        finally:
            await ours.close()

    prompt_output, *tokens = asyncio.run(reference())
    status, body = endpoint.call(prompt=list(PROMPT), max_tokens=6, echo=True, logprobs=2)
    assert status == 200 and body["usage"]["completion_tokens"] == len(tokens)
    expected = [e.logprob for e in prompt_output.logprobs[1:]] + [o.logprobs.logprob for o in tokens]
    assert body["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)

    with contextlib.closing(endpoint.post(prompt=list(PROMPT), max_tokens=6, stream=True)) as response:
        events = response.read().decode().split("\n\n")
    text = "".join(json.loads(e.removeprefix("data: "))["choices"][0]["text"] for e in events[:-2])
    assert events[-2] == "data: [DONE]" and body["choices"][0]["text"].endswith(text)

    before = endpoint.health()["stats"]["num_aborted"]
    response = endpoint.post(prompt=list(PROMPT), max_tokens=40, stream=True)
    response.readline()
    response.close()
    endpoint.wait_until_idle()
    assert endpoint.health()["stats"]["num_aborted"] == before + 1

    status, body = endpoint.call(prompt=[7], max_tokens=2)
    assert status == 500 and body["error"]["code"] == "engine_failed"
    status, body = endpoint.call(prompt=list(PROMPT), max_tokens=4, min_tokens=2)
    assert status == 400 and "min_tokens" in body["error"]["message"]
    assert endpoint.call(prompt=list(PROMPT), max_tokens=2)[0] == 200
    stats = endpoint.health()["stats"]
    assert stats["ttft_ms"] > 0 and stats["reported_ttft_ms"] > 0

    def ranks() -> list[str]:
        return [actor["name"] for actor in list_named_actors(all_namespaces=True) if "trtllm-rank" in actor["name"]]

    assert len(ranks()) == 2 and len(marked(REPLICA_MARK)) >= 5, "replica, its workers, the ranks"
    ray_serve.delete("tensorrt_llm")
    deadline = time.monotonic() + 20.0
    while ranks() or marked(REPLICA_MARK):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    states = [group["state"] for group in placement_group_table().values()]
    assert "CREATED" not in states


# ---- the doctor


def run_doctor(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.doctor", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | changes, capture_output=True, text=True, check=False)


def test_the_doctor_says_what_is_missing() -> None:
    result = run_doctor("tensorrt_llm")
    assert result.returncode == 2 and "TensorRT-LLM: tensorrt_llm is not installed" in result.stdout
    assert result.stdout.count("not possible here") == 9 and "0 pass, 0 fail, 8 not" in result.stdout
    help_text = run_doctor("--help").stdout
    assert "usage" in help_text and "acceptance" not in help_text
    assert run_doctor("nosuch").returncode == 2


def test_the_doctor_compares_signatures_and_misses_a_gpu() -> None:
    result = run_doctor("tensorrt_llm", **environment(CUDA_VISIBLE_DEVICES=""))
    assert "TensorRT-LLM: 1.2.1" in result.stdout and "there is no GPU" in result.stdout
    assert re.search(r"signatures +pass", result.stdout), result.stdout
    assert result.returncode == 2


def test_a_difference_of_signatures_is_found() -> None:
    code = """
from kraken.trtllm.doctor import compare_signatures
table = {
    "tensorrt_llm.LLM.generate_async": ["inputs", "nosuch"],
    "tensorrt_llm.LLM.nosuch": [],
    "tensorrt_llm._torch.moved.Attention.forward": ["position_ids"],
    "tensorrt_llm.mapping.Mapping.attributes": ["tp_rank", "nosuch"],
    "tensorrt_llm.llmapi.llm_args.TorchLlmArgs.fields": ["model", "nosuch"],
    "tensorrt_llm.nosuch.Unused": [],
}
renames = {"tensorrt_llm._torch.moved.Attention": "tensorrt_llm._torch.modules.attention.Attention"}
for difference in compare_signatures(table, renames):
    print(difference.symbol, difference.problem, difference.is_used, sep="|")
"""
    assert run_with_fake(code).splitlines() == [
        "tensorrt_llm.LLM.generate_async|does not know nosuch|True",
        "tensorrt_llm.LLM.nosuch|is not there|True",
        "tensorrt_llm.mapping.Mapping.attributes|does not know nosuch|True",
        "tensorrt_llm.llmapi.llm_args.TorchLlmArgs.fields|does not know nosuch|True",
        "tensorrt_llm.nosuch.Unused|is not there|False",
    ]


@pytest.mark.slow
def test_the_doctor_examines_a_model(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from kraken.engine.placement import Machine
from kraken.trtllm.doctor import Patient, examine
patient = Patient(num_layers=2, head_size=8, heads_per_way=2, context_length=48, dtype="float32", num_prompt_tokens=24,
                  num_timed=2)
for check in examine(Machine(version="1.2.1", num_gpus=2), Path({str(tmp_path)!r}), patient):
    print(check.outcome, check.name, check.detail, sep="|")
"""
    lines = run_with_fake(code).splitlines()
    assert len(lines) == 7 and all(line.startswith("pass|") for line in lines), lines
