"""The acceptance test on a machine that has TensorRT-LLM: is it as this code assumes, does it compute what we compute?

`jobs/doctor.py` is its command line; `pipelines/doctor.py` adds what needs Ray Serve.
"""

import asyncio
import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from kraken.config import ConfigError, EngineConfig, ModelConfig
from kraken.engine.placement import TENSORRT_LLM_FOLDER, Machine
from kraken.engine.protocol import EngineError, Request, RequestError, SamplingParams, TokenOutput
from kraken.manifest import ArtefactError
from kraken.trtllm.compat import signatures

Outcome = Literal["pass", "fail", "not possible here"]
NUM_WAYS = (8, 4, 2)
"""Numbers of ways to build, the largest that fits."""
TEXT = "the quick brown fox jumps over the lazy dog, again and again; " * 16
TOLERANCE = 2.0**-5
"""Of the largest logit: how far bfloat16 may lead from float32."""
NUM_TOKENS = 16
"""Generated for every comparison."""
START_TIMEOUT_S = 240.0

SIGNATURES = ("signatures", "Open MPI")
# times first, since an engine reports medians over all its requests
OVERLAPPED = (
    "TTFT overlapped",
    "logits, head size 128",
    "environment of the ranks",
    "min_p",
    "seeds",
    "logits under load",
)
BLOCKING = ("TTFT blocking", "side stream in CUDA graphs")
LARGE_HEADS = ("logits, head size 256",)
STANDARD = ("TTFT standard baseline",)
SERVED = ("Ray Serve: start", "Ray Serve: same tokens", "Ray Serve: TTFT", "Ray Serve: clean-up")
CHECKS: dict[str, tuple[str, str]] = {
    "signatures": (
        "every symbol of kraken/trtllm/signatures.json, with the parameters listed there",
        "use the image of docker/tensorrt_llm.Dockerfile; for another version correct compat.MODULES and the callers",
    ),
    "Open MPI": (
        "Open MPI 4, by whose MPI_Comm_spawn the ranks start",
        "serve over Ray, which needs no MPI, or use the image of docker/tensorrt_llm.Dockerfile: images from 1.3.0rc27 "
        "on have Open MPI 5, whose MPI_Comm_spawn fails",
    ),
    "conversion": ("folders whose padded heads change no logit", "report it: this needs no TensorRT-LLM"),
    "logits, head size 128": (
        "log-probabilities and greedy tokens of this project's model in float32, to the rounding of the type",
        "do not serve with TensorRT-LLM; report the numbers",
    ),
    "environment of the ranks": (
        "every rank inherits PYTHONPATH, by which it finds the model, and the mark by which it is ended",
        "install this project in the image (pip install -e .), and end what is left by hand",
    ),
    "min_p": ("min_p=1 at temperature 100 gives the greedy tokens", "take min_p out of SAME_FIELDS in session.py"),
    "seeds": ("equal seeds give equal tokens beside other requests", "requests with a seed are refused; report it"),
    "logits under load": (
        "in a full batch every greedy token is the most likely one of its own logits",
        "leave num_logprobs out of requests; report it: a race of TensorRT-LLM's streaming",
    ),
    "TTFT overlapped": ("a time", "see the error"),
    "side stream in CUDA graphs": (
        "the logits of decoding with all-reduces on a side stream are those with all-reduces that are waited for",
        "serve with engine.overlap=blocking; report the numbers",
    ),
    "TTFT blocking": ("a time; overlapping is of use where it is longer than the overlapped one", "see the error"),
    "logits, head size 256": ("as with head size 128", "convert models whose heads are at most 128 channels"),
    "TTFT standard baseline": ("a time, of a standard Transformer of about as many parameters", "see the error"),
    "clean-up": ("no process of the engines is left", "end the processes by hand"),
    "Ray Serve: start": ("a replica whose placement group has a GPU for each rank", "see the replica's log of Ray"),
    "Ray Serve: same tokens": ("the greedy text of this project's model in float32", "see 'logits, head size 128'"),
    "Ray Serve: TTFT": ("a time, over HTTP and in the engine", "see the error"),
    "Ray Serve: clean-up": ("every GPU is free again", "end the replica's workers by hand (ray list actors)"),
}
"""Check -> what is expected, and what to do where something else is found."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    outcome: Outcome
    expected: str
    found: str
    to_do: str = ""


def judge(name: str, is_good: bool, found: str) -> Check:
    expected, to_do = CHECKS[name]
    return Check(name, "pass", expected, found) if is_good else Check(name, "fail", expected, found, to_do)


def not_possible(name: str, reason: str) -> Check:
    return Check(name, "not possible here", CHECKS[name][0], reason, "run the doctor where it is possible")


@dataclass(frozen=True, kw_only=True, slots=True)
class Patient:
    """What is built and measured; the defaults suit a GPU."""

    num_layers: int = 12
    head_size: int = 128
    heads_per_way: int = 8
    context_length: int = 1024
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    num_prompt_tokens: int = 512
    num_timed: int = 20

    def kraken(self, num_ways: int) -> ModelConfig:
        """A Kraken with a way per GPU."""
        return self._shape("kraken", num_ways, self.heads_per_way, num_ways, self.head_size)

    def large_heads(self, num_ways: int) -> ModelConfig:
        """The same with half as many heads of twice the size."""
        return self._shape("kraken", num_ways, max(1, self.heads_per_way // 2), num_ways, 2 * self.head_size)

    def standard(self, num_ways: int) -> ModelConfig:
        """A standard Transformer of about as many parameters, whose heads the same GPUs can share."""
        num_heads = max(1, round(self.heads_per_way * num_ways**0.5 / num_ways)) * num_ways
        return self._shape("standard", 1, num_heads, 1, self.head_size)

    def _shape(self, architecture: Any, num_ways: int, heads_per_way: int, factor: int, head_size: int) -> ModelConfig:
        return ModelConfig(
            architecture=architecture,
            num_layers=self.num_layers,
            width=heads_per_way * head_size,
            num_heads=heads_per_way * factor,
            num_ways=num_ways,
            context_length=self.context_length,
            vocab_size=320,
            bias=True,
        )


# The report


def write_report(path: Path, machine: Machine, checks: Sequence[Check], patient: Patient, took_s: float) -> None:
    """Everything that somebody needs who was not there, as JSON."""
    versions = {name: _version(name) for name in ("tensorrt_llm", "torch", "transformers", "ray", "kraken-pipeline")}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    report = {
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "took_s": round(took_s, 1),
        "machine": dataclasses.asdict(machine) | {"gpus": _output(query).splitlines(), "mpi": _output(MPI_VERSION)},
        "versions": versions | {"python": platform.python_version()},
        "model": dataclasses.asdict(patient),
        "checks": [dataclasses.asdict(check) for check in checks],
    }
    path.write_text(json.dumps(report, indent=2) + "\n")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"


# The package


def check_signatures(python: str = sys.executable) -> Check:
    """Compare the table with the package, in a process of its own."""
    environment = os.environ | {"TLLM_DISABLE_MPI": "1"}
    command = [python, "-m", "kraken.trtllm.compare_signatures"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    try:
        differing: list[str] = json.loads(result.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        return judge("signatures", False, f"they cannot be read: {last[:200]}")
    return judge("signatures", not differing, "; ".join(differing) or f"all {len(signatures())} symbols")


MPI_VERSION = ("mpirun", "--version")


def check_mpi() -> Check:
    text = _output(MPI_VERSION)
    version = re.search(r"Open MPI\D*(\d+)[.\d]*", text)
    found = version[0] if version else (text.splitlines() or ["nothing"])[0][:200]
    return judge("Open MPI", version is not None and int(version[1]) < 5, found)


# The models


def examine(machine: Machine, folder: Path, patient: Patient) -> Iterator[Check]:
    """Everything but Ray Serve, one check after the other.

    Args:
        folder: an empty one, for models; the first is left in `folder / "kraken"`.
    """
    if machine.version is not None:
        yield check_signatures()
        yield check_mpi()
    if reason := why_impossible(machine):
        done = SERVED if machine.version is None else (*SIGNATURES, *SERVED)
        yield from (not_possible(name, reason) for name in CHECKS if name not in done)
        return
    num_ways = next(ways for ways in NUM_WAYS if ways <= (machine.num_gpus or 0))
    started_at = time.monotonic()
    try:
        for name in ("kraken", "large_heads", "standard"):
            make_exchange(folder / name, getattr(patient, name)(num_ways), patient.dtype)
    except (ConfigError, ArtefactError) as error:
        yield judge("conversion", False, str(error))
        return
    yield judge("conversion", True, f"three folders of {num_ways} ways, {time.monotonic() - started_at:.1f} s")
    bench = Bench(folder, patient, num_ways)
    for names, examination in (
        (OVERLAPPED, bench.overlapped),
        (BLOCKING, bench.blocking),
        (LARGE_HEADS, bench.large_heads),
        (STANDARD, bench.standard),
    ):
        if bench.starts:
            yield from _run(names, examination)
        else:  # the others would take as long to fail
            yield from (not_possible(name, "an engine did not start") for name in names)
    yield judge("clean-up", not bench.left, "; ".join(bench.left) or "none")


def why_impossible(machine: Machine) -> str:
    """Why no model can run on this machine; empty where one can."""
    if machine.version is None:
        return machine.problem
    if not machine.num_gpus:
        return "there is no GPU"
    return "there is one GPU, and a Kraken has at least two ways" if machine.num_gpus < min(NUM_WAYS) else ""


def _run(names: Sequence[str], examination: Callable[[list[Check]], Coroutine[Any, Any, None]]) -> Iterator[Check]:
    """Checks of one engine; where it fails, the check that was to come fails and those behind it are not possible."""
    checks: list[Check] = []
    try:
        asyncio.run(examination(checks))
    except (EngineError, RequestError, ConfigError, ArtefactError) as error:
        checks.append(judge(names[len(checks)], False, str(error)))
    yield from checks
    yield from (not_possible(name, "the engine failed before") for name in names[len(checks) :])


def make_exchange(folder: Path, config: ModelConfig, dtype: str) -> None:
    """A random model as an exchange folder, with its TensorRT-LLM folder inside."""
    import torch

    from kraken.convert import to_exchange, write_folder
    from kraken.manifest import finish_artefact
    from kraken.model import Kraken
    from kraken.tokenizer import Tokenizer
    from kraken.trtllm.checkpoint import from_exchange

    started_at = time.monotonic()
    stored = torch.float32 if dtype == "float32" else torch.bfloat16
    model = Kraken(config).requires_grad_(False)
    model.init_weights(seed=0)
    model.to(stored).float()  # rounded, so that both engines hold the same numbers
    tokenizer = Tokenizer.train([TEXT], 264)
    folder.mkdir(parents=True)
    write_folder(folder, config, to_exchange(model), tokenizer)
    finish_artefact(
        folder,
        started_at=started_at,
        kind="convert",
        fingerprint=f"doctor-{folder.name}-{config.num_ways}",
        config=dataclasses.asdict(config),
        parents={},
        metrics={},
        details={"tokenizer_fingerprint": tokenizer.fingerprint},
    )
    from_exchange(folder, folder / TENSORRT_LLM_FOLDER, dtype=stored)


class Bench:
    """The engines that are examined, one after the other, and what later ones need of earlier ones.

    Args:
        folder: holds the exchange folders.
    """

    def __init__(self, folder: Path, patient: Patient, num_ways: int):
        self._folder, self._patient, self._num_ways = folder, patient, num_ways
        self._largest_logit = 1.0
        self._decoded: list[np.ndarray] = []
        self._overlapped_ms = 0.0
        self.starts = True
        """False once an engine did not start."""
        self.left: list[str] = []
        """What engines left behind, in words."""

    async def overlapped(self, checks: list[Check]) -> None:
        async with self._engine("kraken") as engine:
            self._overlapped_ms, found = await self._time(engine)
            checks.append(judge("TTFT overlapped", True, found))
            checks.append(await self._same_logits("logits, head size 128", engine, "kraken"))
            checks.append(_check_environments(engine.backend.environments(), self._num_ways))
            checks.append(await self._min_p(engine))
            checks.append(await self._seeds(engine))
            self._decoded = [await self._decode(engine, f"decode-{number}") for number in range(3)]
            checks.append(await self._load(engine))

    async def blocking(self, checks: list[Check]) -> None:
        async with self._engine("kraken", overlap=False) as engine:
            checks.append(judge("TTFT blocking", True, (await self._time(engine))[1]))
            expected = await self._decode(engine, "decode")
            differing = max((_difference(found, expected) for found in self._decoded), default=float("inf"))
            repeated = max((_difference(found, self._decoded[0]) for found in self._decoded), default=float("inf"))
            limit = self._tolerance()
            found = f"they differ by {differing:.2e} (at most {limit:.2e}), between runs by {repeated:.2e}"
            checks.append(judge("side stream in CUDA graphs", max(differing, repeated) <= limit, found))

    async def large_heads(self, checks: list[Check]) -> None:
        async with self._engine("large_heads") as engine:
            checks.append(await self._same_logits("logits, head size 256", engine, "large_heads"))

    async def standard(self, checks: list[Check]) -> None:
        async with self._engine("standard") as engine:
            checks.append(judge("TTFT standard baseline", True, (await self._time(engine))[1]))

    @asynccontextmanager
    async def _engine(self, name: str, overlap: bool = True) -> AsyncIterator[Any]:
        from kraken.trtllm.engine import TensorRTEngine

        config = EngineConfig(
            kind="tensorrt_llm",
            dtype=self._patient.dtype,
            overlap="overlapped" if overlap else "blocking",
            startup_timeout_s=START_TIMEOUT_S,
        )
        folder = self._folder / name / TENSORRT_LLM_FOLDER
        engine = TensorRTEngine.from_folder(folder, config, num_ranks=self._num_ways)
        try:
            self.starts = False
            await engine.start()
            self.starts = True
            yield engine
        finally:
            try:
                await engine.close()
            except EngineError as error:
                self.left.append(str(error))

    def _tolerance(self) -> float:
        return (1e-3 if self._patient.dtype == "float32" else TOLERANCE) * self._largest_logit

    def _prompt(self, start: int, num_tokens: int | None = None, stride: int = 3) -> tuple[int, ...]:
        """Prompts of different starts or strides share no block, so that none is found in the cache."""
        return tuple((start + stride * i) % 256 for i in range(num_tokens or self._patient.num_prompt_tokens))

    async def _same_logits(self, name: str, engine: Any, exchange: str) -> Check:
        """Of prompts and generated tokens, against our model in float32."""
        import torch

        from kraken.convert import read_exchange
        from kraken.evaluate import parity

        model = read_exchange(self._folder / exchange, torch.float32)
        length = self._patient.num_prompt_tokens
        prompts = [list(self._prompt(start, n)) for start, n in ((1, length), (2, length // 2), (3, 1))]
        with torch.inference_mode():
            self._largest_logit = float(model(torch.tensor(prompts[:1])).abs().max())
        report = await parity(engine, model, prompts, NUM_TOKENS, self._tolerance())
        found = (
            f"log-probabilities differ by {report.max_abs_diff:.2e} (at most {self._tolerance():.2e}), "
            f"{report.num_different} of {report.num_tokens} tokens; {engine.capabilities}"
        )
        return judge(name, report.passed, found)

    async def _min_p(self, engine: Any) -> Check:
        prompt = self._prompt(5, 16)
        greedy, drawn = [
            await _tokens(engine, f"min-p-{number}", prompt, sampling)
            for number, sampling in enumerate(
                (
                    SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0),
                    SamplingParams(max_tokens=NUM_TOKENS, temperature=100.0, min_p=1.0),
                )
            )
        ]
        same = sum(a == b for a, b in zip(greedy, drawn, strict=False))
        return judge("min_p", greedy == drawn, f"{same} of {NUM_TOKENS} tokens are the greedy ones")

    async def _seeds(self, engine: Any) -> Check:
        if not engine.capabilities.seeds:
            return judge("seeds", False, "at the start equal seeds gave other tokens")
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=10.0, seed=1)
        alone = await _tokens(engine, "seed-alone", self._prompt(6), sampling)
        others = [
            _tokens(engine, f"beside-{number}", self._prompt(number), SamplingParams(max_tokens=NUM_TOKENS))
            for number in range(7)
        ]
        again, *_ = await asyncio.gather(_tokens(engine, "seed-again", self._prompt(6), sampling), *others)
        return judge("seeds", alone == again, "equal tokens" if alone == again else f"{alone} alone, {again} beside 7")

    async def _load(self, engine: Any) -> Check:
        """The engine compares every greedy token with its logits itself."""
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
        num_requests = EngineConfig().max_batch_size
        found = await asyncio.gather(
            *(
                _tokens(engine, f"load-{number}", self._prompt(number), sampling, num_logprobs=0)
                for number in range(num_requests)
            )
        )
        num_found = sum(map(len, found))
        told = f"{num_found} tokens of {num_requests} requests at once"
        return judge("logits under load", num_found == num_requests * NUM_TOKENS, told)

    async def _decode(self, engine: Any, name: str) -> np.ndarray:
        """Logits [T, V] of greedy tokens; the seed keeps the prompt out of the cache, which would change rounding."""
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, seed=1)
        request = Request(id=name, prompt_ids=self._prompt(7), sampling=sampling, return_logits=True)
        outputs = [output async for output in engine.generate(request)]
        rows = [output.logits_V for output in outputs if isinstance(output, TokenOutput)]
        return np.stack([logits_V for logits_V in rows if logits_V is not None])

    async def _time(self, engine: Any) -> tuple[float, str]:
        """Median time to first token of one request at a time in ms, and in words; TensorRT-LLM's own clock, too."""
        times_ms = []
        for number in range(self._patient.num_timed + 3):
            sampling = SamplingParams(max_tokens=1, temperature=0.0)
            prompt_ids = self._prompt(number, stride=5 + 2 * (number // 256))
            request = Request(id=f"timed-{number}", prompt_ids=prompt_ids, sampling=sampling)
            started_at = time.perf_counter()
            async for _output in engine.generate(request):
                times_ms.append((time.perf_counter() - started_at) * 1e3)
        ours_ms, theirs_ms = median(times_ms[3:]), engine.stats().reported_ttft_ms
        clock = "no clock of its own" if theirs_ms is None else f"{theirs_ms:.2f} ms by its own clock"
        ratio = f", {ours_ms / self._overlapped_ms:.3f} times the overlapped" if self._overlapped_ms else ""
        size = f"{self._num_ways} GPUs, {self._patient.num_prompt_tokens} tokens"
        # of 1.2.1 with the step for which it holds the first token back, see docs/tensorrt_llm.md
        return ours_ms, f"{ours_ms:.2f} ms median of one-token requests ({clock}){ratio}; {size}"


def _check_environments(environments: Sequence[dict[str, str]], num_ranks: int) -> Check:
    from kraken.trtllm.backend import ROOT

    num_good = sum(str(ROOT) in found.get("PYTHONPATH", "").split(os.pathsep) for found in environments)
    found = f"{len(environments)} processes with the mark, {num_good} of them with {ROOT} in PYTHONPATH"
    # besides the ranks there is the process that owns them
    return judge("environment of the ranks", num_ranks < len(environments) == num_good, found)


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest, up to the first position at which they would choose other tokens."""
    differing = (found.argmax(-1) != expected.argmax(-1)).nonzero()[0]
    end = int(differing[0]) + 1 if len(differing) else len(expected)
    return float(np.abs(found[:end] - expected[:end]).max())


async def _tokens(
    engine: Any, name: str, prompt_ids: tuple[int, ...], sampling: SamplingParams, num_logprobs: int | None = None
) -> list[int]:
    request = Request(id=name, prompt_ids=prompt_ids, sampling=sampling, num_logprobs=num_logprobs)
    return [output.token_id async for output in engine.generate(request) if isinstance(output, TokenOutput)]
