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
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from protocol_checks import CONFIG, GREEDY, PROMPT, ids_of, make_exchange, request
from trtllm_ranks import ROOT, environment, run_with_fake

from kraken.choose_engine import Choice, choose, choose_for, find_machine, open_engine
from kraken.config import ConfigError, EngineConfig, ServeConfig
from kraken.engine.engine import TorchEngine
from kraken.engine.placement import Machine
from kraken.engine.protocol import (
    EngineError,
    EngineInfo,
    PromptOutput,
    RequestError,
    SamplingParams,
    TokenOutput,
)
from kraken.evaluate import collect
from kraken.manifest import ArtefactError
from kraken.trtllm import frames
from kraken.trtllm.doctor import CHECKS, SERVED, check_mpi
from kraken.trtllm.engine import Capabilities, TensorRTEngine
from kraken.trtllm.fingerprint import RECORD_NAME, require_same_machine
from kraken.trtllm.session import Job, Step, make_jobs
from kraken.trtllm.tree import MARK, end_marked, marked

TENSORRT = replace(CONFIG, kind="tensorrt_llm")


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
    return engine.backend.mark  # type: ignore[attr-defined]


# ---- one engine on a model that counts


def test_streams_full_prompts_and_deaths(exchange: Path) -> None:
    async def run() -> None:
        async with running(exchange, FAKE_TRTLLM="canned,die-on-7,litter", FAKE_TRTLLM_DELAY_S="0.02") as engine:
            await engine.start()
            times = []
            started_at = time.monotonic()
            async for output in engine.generate(request("stream", draw={"max_tokens": 20})):
                times.append(time.monotonic() - started_at)
                assert isinstance(output, TokenOutput) and output.token_id == 4 + len(times) - 1
            assert len(times) == 20 and times[0] < times[-1] / 3

            long = request("long", draw={"max_tokens": 40})
            decoding = [asyncio.create_task(collect(engine, replace(long, id=f"long-{i}"))) for i in range(3)]
            await asyncio.sleep(0.1)
            await collect(engine, request("full", prompt=tuple(range(8, 55)), draw={"max_tokens": 1}))
            assert not any(task.done() for task in decoding), "a prompt of full length waits until nobody decodes"
            await asyncio.gather(*decoding)

            num_sent = 0
            steps = engine.backend.steps

            async def counting(job: Job) -> AsyncGenerator[Step, None]:
                nonlocal num_sent
                async for step in steps(job):
                    num_sent += step.context_logits_TV is not None
                    yield step

            engine.backend.steps = counting  # type: ignore[method-assign]
            scored, *tokens = await collect(engine, request("scored", prompt_logprobs=True))
            assert isinstance(scored, PromptOutput) and len(tokens) == 6
            assert num_sent == 1, "the logits of the prompt were sent with every token"

            with pytest.raises(EngineError, match="a rank died"):
                await collect(engine, request("dies", prompt=(7,)))
            assert ids_of(await collect(engine, request("after"))) == [4, 5, 6, 7, 8, 9]
            assert engine.stats().healthy, "a request that failed alone says nothing of the engine"
            stats = engine.stats()
            assert stats.ttft_ms and stats.reported_ttft_ms and stats.reported_queue_ms is not None

            waiting = asyncio.create_task(collect(engine, replace(long, id="cut")))
            await asyncio.sleep(0.1)
            os.kill(engine.backend._process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
            with pytest.raises(EngineError, match="process has ended"):
                await waiting
            assert not engine.stats().healthy
            assert marked(mark_of(engine)), "ranks and litter outlive their parent, which is why they are looked for"

    asyncio.run(run())
    record = json.loads((exchange / "tensorrt_llm" / RECORD_NAME).read_text())
    assert record["tensorrt_llm"] == "1.2.1" and record["num_ways"] == 2 and record["dtype"] == "float32"
    assert record["exchange_fingerprint"] == "tiny-exchange"


def test_what_the_version_lacks_is_refused(exchange: Path) -> None:
    """Logits that belong to the next token are found out by more than one token alone."""

    async def run() -> None:
        words = "canned,no-context-logits,shared-logits,no-seeds"
        async with running(exchange, FAKE_TRTLLM=words) as engine:
            assert ids_of(await collect(engine, request("plain"))) == [4, 5, 6, 7, 8, 9]
            for match, fields in {
                "prompt_logprobs": {"prompt_logprobs": True},
                "num_logprobs=2": {"num_logprobs": 2},
                "seed=5": {"draw": {"seed": 5, "temperature": 1.0}},
                "min_tokens": {"draw": {"min_tokens": 2}},
            }.items():
                with pytest.raises(RequestError, match=match):
                    await collect(engine, request("asks", **fields))

    asyncio.run(run())


class ScriptedBackend:
    """Answers a job with given steps, and then no more."""

    alive = True

    def __init__(self, *steps: Step):
        self._steps = steps

    async def start(self, timeout_s: float) -> None: ...

    async def steps(self, job: Job) -> AsyncGenerator[Step, None]:
        for step in self._steps:
            yield step
        await asyncio.sleep(600)

    async def close(self) -> None: ...


def scripted(*steps: Step) -> TensorRTEngine:
    info = EngineInfo(name="tensorrt_llm", context_length=48, num_ids=4, eot_id=3, tokenizer_fingerprint="none")
    engine = TensorRTEngine(ScriptedBackend(*steps), info, TENSORRT)
    engine._capabilities = Capabilities(prompt_logits=True, token_logits=True, seeds=True)
    return engine


def test_logits_of_another_token_are_not_believed() -> None:
    logits = {1: np.array([[0.0, 9.0, 0.0, 0.0]], np.float32), 2: np.array([[0.0, 0.0, 9.0, 0.0]], np.float32)}
    right = [Step(token_ids=(i,), logits_TV=logits[i], finish_reason=end) for i, end in ((1, None), (2, "length"))]
    wrong = [right[0], replace(right[1], logits_TV=logits[1])]

    async def run() -> None:
        asked = request("asked", prompt=(1,), draw={"max_tokens": 2}, num_logprobs=1)
        assert ids_of(await collect(scripted(*right), asked)) == [1, 2]
        with pytest.raises(EngineError, match="logits of other tokens"):
            await collect(scripted(*wrong), asked)
        drawn = replace(asked, sampling=SamplingParams(max_tokens=2))
        assert ids_of(await collect(scripted(*wrong), drawn)) == [1, 2], "a drawn token need not be the most likely"

    asyncio.run(run())


def test_only_the_oldest_request_can_be_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may wait for it, for as long as it takes."""
    monkeypatch.setattr("kraken.trtllm.engine.ANSWER_LIMIT_S", 0.2)

    async def run() -> None:
        engine = scripted(Step(token_ids=(1,)))
        found = [collect(engine, request(name, prompt=(1,))) for name in ("first", "second")]
        started_at = time.monotonic()
        errors = await asyncio.gather(*found, return_exceptions=True)
        assert 0.4 < time.monotonic() - started_at < 5
        for name, error in zip(("first", "second"), errors, strict=True):
            assert isinstance(error, EngineError) and f"has not answered request '{name}' for 0.2 s" in str(error)
        await engine.close()

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
    print(engine.backend.mark, flush=True)
    os._exit(9)
asyncio.run(run())
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, env=environment(FAKE_TRTLLM="canned,litter"), capture_output=True, text=True, timeout=120, check=False
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


def test_what_tensorrt_llm_is_told() -> None:
    code = """
import json
from tensorrt_llm.llmapi.llm_args import TorchLlmArgs
from kraken.config import EngineConfig
from kraken.trtllm.probe import probe
from kraken.trtllm.session import Launch, llm_arguments

def told(num_ranks, context_length=8, **settings):
    folder = dict(folder="f", num_ranks=num_ranks, context_length=context_length, exchange_fingerprint="e")
    return llm_arguments(Launch(**folder, config=EngineConfig(**settings)))

found = {"six": told(6, overlap="blocking"), "one": told(1), "long": told(2, 9000, max_batch_size=100)}
del TorchLlmArgs.model_fields["sampler_type"]
print(json.dumps([found, told(2), probe()], default=repr))
"""
    found, newer, probed = json.loads(run_with_fake(code))
    assert probed == {"version": "1.2.1", "problem": "", "num_gpus": torch.cuda.device_count()}
    six = found["six"]
    assert six["max_input_len"] == 8, "1024 unless given"
    assert six["max_num_tokens"] == 8192 and found["long"]["max_num_tokens"] == 9100
    assert six["gather_generation_logits"] and "gather_generation_logits" not in found["one"]
    assert six["sampler_type"] == "TRTLLMSampler" and "sampler_type" not in newer


def test_a_request_becomes_a_job_that_scores_and_one_that_generates() -> None:
    def jobs(sampling: SamplingParams, **fields: Any) -> tuple[Job | None, Job | None]:
        return make_jobs(request("a", sampling=sampling, **fields), eot_id=0)

    assert jobs(SamplingParams(max_tokens=0)) == (None, None)
    scoring, generation = jobs(GREEDY, prompt_logprobs=True)
    assert scoring and scoring.cache_salt, "positions that are found in the cache have no logits"
    assert scoring.sampling["max_tokens"] == 1 and scoring.sampling["return_context_logits"]
    assert generation and generation.cache_salt is None and "return_context_logits" not in generation.sampling
    for job in (scoring, generation):
        assert job.sampling["end_id"] is not None and not job.sampling["detokenize"] and job.prompt_ids == PROMPT
    scoring, generation = jobs(SamplingParams(max_tokens=0), prompt_logprobs=True)
    assert scoring and scoring.prompt_ids == PROMPT[:-1] and generation is None
    greedy, drawn = jobs(GREEDY)[1], jobs(SamplingParams(seed=-3))[1]
    assert greedy and drawn and drawn.cache_salt, "the cache would change the rounding, and so the tokens of a seed"
    assert greedy.sampling["top_k"] == 1 and not greedy.sampling.keys() & {"temperature", "top_p"}
    assert drawn.sampling["top_k"] == 0 and drawn.sampling["top_p"] == 1.0 and 0 <= drawn.sampling["seed"] < 2**63


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
    inner = other / "tensorrt_llm" / "manifest.json"
    inner.write_text(inner.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(ArtefactError, match="another version of this project; delete it and convert again"):
        TensorRTEngine.from_folder(other / "tensorrt_llm", TENSORRT)


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


def test_the_doctor_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.doctor import main

    report = tmp_path / "report.json"
    with pytest.raises(SystemExit, match="2"):
        main(["tensorrt_llm", "--report", str(report)])
    output = capsys.readouterr().out
    assert "TensorRT-LLM: tensorrt_llm is not installed" in output and f"report: {report}" in output
    written = json.loads(report.read_text())
    assert [check["name"] for check in written["checks"]] == list(CHECKS)
    assert {check["outcome"] for check in written["checks"]} == {"not possible here"}
    assert f"0 pass, 0 fail, {len(CHECKS)} not possible here" in output
    assert written["machine"]["version"] is None and written["versions"]["tensorrt_llm"] is None
    with pytest.raises(ConfigError, match="there is no folder"):
        main(["tensorrt_llm", "--report", str(tmp_path / "none" / "report.json")])


def test_the_doctor_compares_signatures_and_misses_a_gpu(tmp_path: Path) -> None:
    write_mpirun(tmp_path, "mpirun (Open MPI) 5.0.7")
    changes = environment(CUDA_VISIBLE_DEVICES="", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    result = run_doctor("tensorrt_llm", "--report", str(tmp_path / "report.json"), **changes)
    assert "TensorRT-LLM: 1.2.1" in result.stdout and "there is no GPU" in result.stdout, result.stderr
    assert re.search(r"signatures +pass +all \d+ symbols", result.stdout), result.stdout
    assert re.search(r"Open MPI +fail", result.stdout) and "to do: serve over Ray" in result.stdout
    assert result.returncode == 1


def test_a_difference_of_signatures_is_found() -> None:
    code = """
from kraken.trtllm.compare_signatures import differences
table = {
    "tensorrt_llm.LLM.generate_async": ["inputs", "nosuch"],
    "tensorrt_llm.LLM.nosuch": [],
    "tensorrt_llm.mapping.Mapping.attributes": ["tp_rank", "nosuch"],
    "tensorrt_llm.llmapi.llm_args.TorchLlmArgs.fields": ["model", "nosuch"],
    "tensorrt_llm.llmapi.KvCacheConfig.__init__": ["max_tokens", "nosuch"],
    "tensorrt_llm._torch.distributed.AllReduceStrategy": ["NCCL", "NOSUCH"],
    "tensorrt_llm._torch.models.modeling_utils.DecoderModel.forward": ["attn_metadata", "**kwargs"],
}
print(*differences(table), sep="\\n")
"""
    assert run_with_fake(code).splitlines() == [
        "tensorrt_llm.LLM.generate_async does not know nosuch",
        "tensorrt_llm.LLM.nosuch is not there",
        "tensorrt_llm.mapping.Mapping.attributes does not know nosuch",
        "tensorrt_llm.llmapi.llm_args.TorchLlmArgs.fields does not know nosuch",
        "tensorrt_llm.llmapi.KvCacheConfig.__init__ does not know nosuch",
        "tensorrt_llm._torch.distributed.AllReduceStrategy does not know NOSUCH",
    ]


@pytest.mark.parametrize(
    ("says", "outcome", "found"),
    [
        ("mpirun (Open MPI) 4.1.6", "pass", "Open MPI) 4.1.6"),
        ("mpirun (Open MPI) 5.0.7", "fail", "Open MPI) 5.0.7"),
        ("HYDRA build details:", "fail", "HYDRA build details:"),
        (None, "fail", "FileNotFoundError"),
    ],
)
def test_images_whose_mpi_cannot_spawn_are_told(
    says: str | None, outcome: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if says is not None:
        write_mpirun(tmp_path, says)
    monkeypatch.setenv("PATH", str(tmp_path))
    check = check_mpi()
    assert check.outcome == outcome and found in check.found and "Open MPI 4" in check.expected
    assert ("MPI_Comm_spawn fails" in check.to_do) == (outcome == "fail")


def write_mpirun(folder: Path, says: str) -> None:
    (folder / "mpirun").write_text(f"#!/bin/sh\necho '{says}'\n")
    (folder / "mpirun").chmod(0o755)


@pytest.mark.slow
def test_the_doctor_examines_a_model(tmp_path: Path) -> None:
    write_mpirun(tmp_path, "mpirun (Open MPI) 4.1.6")
    code = f"""
import dataclasses, json, time
from pathlib import Path
from kraken.engine.placement import Machine
from kraken.trtllm.doctor import Patient, examine, write_report
patient = Patient(num_layers=2, head_size=32, heads_per_way=2, context_length=48, dtype="float32", num_prompt_tokens=24,
                  num_timed=2)
machine = Machine(version="1.2.1", num_gpus=2)
checks = list(examine(machine, Path({str(tmp_path / "models")!r}), patient))
write_report(Path({str(tmp_path / "report.json")!r}), machine, checks, patient, took_s=1.0)
"""
    run_with_fake(code, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    report = json.loads((tmp_path / "report.json").read_text())
    assert {check["outcome"] for check in report["checks"]} == {"pass"}, report["checks"]
    assert {check["name"] for check in report["checks"]} == CHECKS.keys() - {*SERVED}
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert report["machine"]["mpi"] == "mpirun (Open MPI) 4.1.6"
