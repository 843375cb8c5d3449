"""The TensorRT-LLM engine: the `Engine` protocol over a running TensorRT-LLM.

TensorRT-LLM batches, caches and samples; this engine translates, measures and keeps watch. Log-probabilities are made
here from the logits, by the code that the PyTorch engine uses, so that both mean the same: temperature 1, no
truncation, padding ids left out. What the installed version cannot do is found out by trying it at the start, and
refused from then on.
"""

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from kraken.config import ConfigError, EngineConfig
from kraken.engine.inbox import submit_by_generate
from kraken.engine.placement import TENSORRT_LLM_FOLDER, Placement
from kraken.engine.protocol import (
    EngineError,
    EngineInfo,
    EngineOverloaded,
    EngineStats,
    FinishReason,
    Item,
    Output,
    PromptOutput,
    Request,
    RequestError,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
    check_request,
)
from kraken.engine.sampler import token_logprobs
from kraken.manifest import ArtefactError, Manifest
from kraken.tokenizer import Tokenizer, require_same_tokenizer
from kraken.trtllm.backend import Backend, ProcessBackend, RayBackend
from kraken.trtllm.proof import require_proven
from kraken.trtllm.session import Job, Launch, Step, make_job

PROBE_TIMEOUT_S = 60.0
STALL_LIMIT_S = 120.0
"""Requests in flight and not one token for this long: a rank hangs, and the engine says that it is unhealthy."""
NUM_TIMINGS = 1000
"""Newest requests over which the reported medians are taken."""
NUM_PROBE_TOKENS = 8
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRTStats(EngineStats):
    """Medians over the newest requests, in ms; None before the first."""

    ttft_ms: float | None
    """Time to first token as measured here: from the request's arrival to its first token."""
    reported_ttft_ms: float | None
    """The same by TensorRT-LLM's own clock."""
    reported_queue_ms: float | None
    """Time in TensorRT-LLM's queue, by its own clock."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the installed version does, as found by trying."""

    prompt_logits: bool
    token_logits: bool
    seeds: bool

    def require(self, request: Request) -> None:
        """Raises:
        RequestError: the request needs something else.
        """
        missing = "is not available: the installed TensorRT-LLM"
        if (request.prompt_logprobs or request.return_logits) and not self.prompt_logits:
            raise RequestError(f"prompt_logprobs {missing} returns no logits of the prompt; leave it out")
        if (request.num_logprobs is not None or request.return_logits) and not self.token_logits:
            raise RequestError(f"num_logprobs={request.num_logprobs} {missing} returns no logits; leave it out")
        if request.sampling.seed is not None and not self.seeds:
            raise RequestError(f"seed={request.sampling.seed} {missing} draws without regard to it; leave it out")


@dataclass(eq=False, slots=True)
class _Flight:
    """A request in flight."""

    request: Request
    arrived_at: float
    outputs: asyncio.Queue[Output | Exception | None] = field(default_factory=asyncio.Queue)
    has_token: bool = False
    task: asyncio.Task[None] | None = None


class TensorRTEngine:
    """An `Engine`. It starts with `start()`, or with its first request.

    Args:
        backend: how TensorRT-LLM runs; owned by the engine from here on.
        info: what users are told of the model.
        config: sizes of batch and queue, and the limit for the start.
    """

    def __init__(self, backend: Backend, info: EngineInfo, config: EngineConfig):
        self._backend = backend
        self._info = info
        self._config = config
        self._flights: dict[str, _Flight] = {}
        self._starting = asyncio.Lock()
        self._capabilities: Capabilities | None = None
        self._failure: Exception | None = None
        self._closed = False
        self._check: asyncio.Task[None] | None = None
        self._last_step_at = time.monotonic()
        self._num_finished = self._num_aborted = self._prompt_tokens = self._completion_tokens = 0
        self._ttfts_s: deque[float] = deque(maxlen=NUM_TIMINGS)
        self._reported_ttfts_s: deque[float] = deque(maxlen=NUM_TIMINGS)
        self._reported_queues_s: deque[float] = deque(maxlen=NUM_TIMINGS)

    @classmethod
    def from_exchange(
        cls, exchange: Path, config: EngineConfig, placement: Placement | None = None
    ) -> "TensorRTEngine":
        """An engine for the TensorRT-LLM folder inside an exchange folder; see `choose.open_engine`.

        Raises:
            ArtefactError: a folder is unfinished or damaged, or one was not made from the other.
        """
        folder = exchange / TENSORRT_LLM_FOLDER
        manifest, parent = Manifest.read(folder), Manifest.read(exchange)
        if parent.fingerprint not in manifest.parents.values():
            raise ArtefactError(
                f"{folder} was converted from another model than {exchange} holds ({parent.fingerprint[:16]}); "
                "delete it and convert again"
            )
        return cls.from_folder(folder, config, placement)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        config: EngineConfig,
        placement: Placement | None = None,
        *,
        num_ranks: int | None = None,
        overlap: bool = True,
    ) -> "TensorRTEngine":
        """An engine for a TensorRT-LLM folder.

        Args:
            num_ranks: GPUs of a baseline, whose layers any number can share; a Kraken has one per way.
            overlap: whether all-reduces run beside the attention; False to measure what that is worth.

        Raises:
            ArtefactError: the folder is unfinished or damaged, or its padded heads change the logits.
            ConfigError: TensorRT-LLM cannot honour one of the settings.
        """
        if config.refused_by_tensorrt_llm:
            raise ConfigError(f"{config.refused_by_tensorrt_llm} with TensorRT-LLM; leave it out")
        manifest, tokenizer = Manifest.read(folder), Tokenizer.load(folder)
        require_proven(manifest)
        if recorded := manifest.details.get("tokenizer_fingerprint"):
            require_same_tokenizer(tokenizer.fingerprint, recorded, f"the tokenizer in {folder}", "the model")
        values: dict[str, Any] = json.loads((folder / "config.json").read_text())
        info = EngineInfo(
            name="tensorrt_llm",
            context_length=values["max_position_embeddings"],
            num_ids=values["num_token_ids"],
            eot_id=values["eos_token_id"],
            tokenizer_fingerprint=tokenizer.fingerprint,
        )
        launch = Launch(
            folder=str(folder),
            num_ranks=num_ranks or values["kraken_width"],
            context_length=info.context_length,
            eot_id=info.eot_id,
            dtype="bfloat16" if config.dtype == "auto" else config.dtype,
            max_batch_size=config.max_batch_size,
            exchange_fingerprint=next(iter(manifest.parents.values()), manifest.fingerprint),
            overlap=overlap and config.overlap == "overlapped",
            prefix_reuse=config.prefix_reuse,
            tokens_per_block=config.tokens_per_block,
            kv_cache_tokens=_cache_tokens(config, info.context_length),
            cuda_graphs=config.cuda_graphs,
            cuda_graph_sizes=config.cuda_graph_sizes,
        )
        backend = ProcessBackend(launch) if placement is None else RayBackend(launch, placement)
        return cls(backend, info, config)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def capabilities(self) -> Capabilities | None:
        """None before the start."""
        return self._capabilities

    async def start(self) -> None:
        """Be ready; once is enough, and the first request does it too.

        Raises:
            EngineError: TensorRT-LLM did not start within its limit, or failed; nothing of it is left.
        """
        async with self._starting:
            self._require_healthy()
            if self._capabilities is not None:
                return
            try:
                await self._backend.start(self._config.startup_timeout_s)
                self._capabilities = await asyncio.wait_for(self._try_out(), self._config.startup_timeout_s)
            except BaseException as error:
                reason = (
                    f"its first requests took longer than engine.startup_timeout_s={self._config.startup_timeout_s:g}"
                )
                known = (
                    error if isinstance(error, EngineError) else EngineError(f"TensorRT-LLM failed: {error or reason}")
                )
                self._failure = known
                with contextlib.suppress(EngineError):
                    await self._backend.close()
                if isinstance(error, Exception):
                    raise known from error
                raise

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """See `Engine.generate`."""
        check_request(request, self._info)
        job = make_job(request, self._info.eot_id)
        self._require_healthy()
        arrived_at = time.monotonic()
        if self._capabilities is None:
            await self.start()
        assert self._capabilities is not None
        self._capabilities.require(request)
        if request.id in self._flights:
            raise EngineError(f"request id {request.id} is already in flight; give every request its own")
        if len(self._flights) >= self._config.max_batch_size + self._config.max_queued_requests:
            raise EngineOverloaded(f"{self._config.max_queued_requests} requests are waiting already; try again later")
        if not self._flights:
            self._last_step_at = time.monotonic()
        flight = self._flights[request.id] = _Flight(request, arrived_at)
        self._prompt_tokens += len(request.prompt_ids)
        flight.task = asyncio.create_task(self._run(flight, job))
        try:
            while (output := await flight.outputs.get()) is not None:
                if isinstance(output, Exception):
                    raise output
                yield output
        finally:
            self.abort(request.id)

    def submit(self, request: Request, receive: Callable[[Item], None]) -> Callable[[], None]:
        """See `Engine.submit`."""
        return submit_by_generate(self, request, receive)

    def abort(self, request_id: str) -> None:
        """See `Engine.abort`."""
        flight = self._flights.pop(request_id, None)
        if flight is not None:
            self._num_aborted += 1
            assert flight.task is not None
            flight.task.cancel()  # leaves the backend's steps, which aborts the job
            flight.outputs.put_nowait(None)

    def stats(self) -> TensorRTStats:
        num_running = sum(flight.has_token for flight in self._flights.values())
        is_stalled = bool(self._flights) and time.monotonic() - self._last_step_at > STALL_LIMIT_S
        is_lost = self._capabilities is not None and not self._backend.alive
        return TensorRTStats(
            num_running=num_running,
            num_queued=len(self._flights) - num_running,
            num_finished=self._num_finished,
            num_aborted=self._num_aborted,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            healthy=self._failure is None and not self._closed and not is_stalled and not is_lost,
            ttft_ms=_median_ms(self._ttfts_s),
            reported_ttft_ms=_median_ms(self._reported_ttfts_s),
            reported_queue_ms=_median_ms(self._reported_queues_s),
        )

    async def close(self) -> None:
        """See `Engine.close`."""
        if self._closed:
            return
        self._closed = True
        tasks = [flight.task for flight in self._flights.values() if flight.task is not None]
        if self._check is not None:
            tasks.append(self._check)
        for flight in self._flights.values():
            flight.outputs.put_nowait(EngineError("the engine was closed"))
        self._flights.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._backend.close()

    def _require_healthy(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")
        if self._failure is not None:
            raise EngineError(f"the engine failed before: {self._failure}") from self._failure

    # -- one request -------------------------------------------------------------------------------------------------

    async def _run(self, flight: _Flight, job: Job) -> None:
        """Move one request's outputs to whoever waits for them."""
        end: Exception | None = None
        try:
            async with aclosing(self._outputs(flight, job)) as outputs:
                async for output in outputs:
                    flight.outputs.put_nowait(output)
            self._num_finished += 1
        except RequestError as error:
            end = error
        except Exception as error:
            end = error if isinstance(error, EngineError) else EngineError(f"TensorRT-LLM failed: {error}")
            self._check_health()
        self._flights.pop(flight.request.id, None)
        flight.outputs.put_nowait(end)

    async def _outputs(self, flight: _Flight, job: Job) -> AsyncGenerator[Output, None]:
        request = flight.request
        awaits_prompt = request.prompt_logprobs or request.return_logits
        scores_only = request.sampling.max_tokens == 0
        if not job.prompt_ids or (scores_only and not awaits_prompt):  # nothing to compute
            if awaits_prompt:
                yield self._prompt_output(request, np.empty((0, self._info.num_ids), np.float32))
            return
        held: list[TokenOutput] = []  # tokens that came before the logits of the prompt
        num_tokens, is_over = 0, False
        async with aclosing(self._backend.steps(job)) as steps:
            async for step in steps:
                self._note(flight, step)
                if awaits_prompt and step.context_logits_TV is not None:
                    yield self._prompt_output(request, step.context_logits_TV)
                    awaits_prompt = False
                if scores_only:
                    continue
                for output in self._token_outputs(request, step, num_tokens):
                    num_tokens += 1
                    self._completion_tokens += 1
                    is_over = output.finish_reason is not None
                    held.append(output)
                    if is_over:
                        break
                if not awaits_prompt:
                    for output in held:
                        yield output
                    held.clear()
                    if is_over:
                        return
        if awaits_prompt:
            raise EngineError("TensorRT-LLM returned no logits of the prompt; leave prompt log-probabilities out")
        if not scores_only:
            raise EngineError(f"TensorRT-LLM ended the request after {num_tokens} tokens without a reason")

    def _note(self, flight: _Flight, step: Step) -> None:
        """Measure."""
        now = self._last_step_at = time.monotonic()
        if step.token_ids and not flight.has_token:
            flight.has_token = True
            self._ttfts_s.append(now - flight.arrived_at)
        if "ttft" in step.timings_s:
            self._reported_ttfts_s.append(step.timings_s["ttft"])
        if "request_queue_time" in step.timings_s:
            self._reported_queues_s.append(step.timings_s["request_queue_time"])

    def _token_outputs(self, request: Request, step: Step, num_before: int) -> Iterator[TokenOutput]:
        """The tokens of a step; the one that ends the request says so."""
        sampling, token_ids = request.sampling, step.token_ids
        if step.finish_reason in ("cancelled", "timeout"):
            raise EngineError(f"TensorRT-LLM ended the request by itself: {step.finish_reason}")
        padding = next((i for i in token_ids if i >= self._info.num_ids), None)
        if padding is not None:
            raise EngineError(f"TensorRT-LLM produced the padding id {padding}; ids end with {self._info.num_ids - 1}")
        logits_TV = step.logits_TV[:, : self._info.num_ids] if step.logits_TV is not None else None
        scored: Sequence[TokenLogprobs | None] = [None] * len(token_ids)
        if token_ids and (request.num_logprobs is not None or request.return_logits):
            if logits_TV is None or len(logits_TV) != len(token_ids):
                raise EngineError("TensorRT-LLM returned tokens without their logits")
            if request.num_logprobs is not None:
                scored = token_logprobs(torch.from_numpy(logits_TV.copy()), list(token_ids), request.num_logprobs)
        for index, token_id in enumerate(token_ids):
            is_last_of_step = index + 1 == len(token_ids)
            finish_reason: FinishReason | None = None
            if token_id in sampling.stop_ids:
                finish_reason = "stop"
            elif num_before + index + 1 == sampling.max_tokens or (is_last_of_step and step.finish_reason == "length"):
                finish_reason = "length"
            yield TokenOutput(
                token_id=token_id,
                logprobs=scored[index],
                logits_V=logits_TV[index] if request.return_logits and logits_TV is not None else None,
                finish_reason=finish_reason,
            )
        if step.finish_reason == "stop" and (not token_ids or token_ids[-1] not in sampling.stop_ids):
            if len(sampling.stop_ids) != 1:
                raise EngineError("TensorRT-LLM stopped without saying at which id")
            yield TokenOutput(token_id=sampling.stop_ids[0], finish_reason="stop")

    def _prompt_output(self, request: Request, logits_TV: np.ndarray) -> PromptOutput:
        num_fed = len(request.prompt_ids) - (request.sampling.max_tokens == 0)
        if len(logits_TV) != num_fed:
            raise EngineError(f"TensorRT-LLM returned logits of {len(logits_TV)} positions for {num_fed}")
        logits_TV = logits_TV[:, : self._info.num_ids]
        following = list(request.prompt_ids[1:])
        logprobs: tuple[TokenLogprobs | None, ...] = ()
        if request.prompt_logprobs:
            rows = torch.from_numpy(logits_TV[: len(following)].copy())
            logprobs = (None, *(token_logprobs(rows, following, request.num_logprobs or 0) if following else ()))
        return PromptOutput(logprobs=logprobs, logits_TV=logits_TV if request.return_logits else None)

    # -- finding out -------------------------------------------------------------------------------------------------

    async def _try_out(self) -> Capabilities:
        """Run a few small requests and look at what comes back."""
        num_tokens = min(NUM_PROBE_TOKENS, self._info.context_length - 2)
        asked = Request(id="try-logits", prompt_ids=(self._info.eot_id,) * 2, sampling=GREEDY, return_logits=True)
        steps = await self._collect(make_job(asked, self._info.eot_id))
        num_rows = max((len(s.context_logits_TV) for s in steps if s.context_logits_TV is not None), default=0)
        drawn = [await self._draw(seed, num_tokens) for seed in (1, 1, 2)]
        return Capabilities(
            prompt_logits=num_rows == len(asked.prompt_ids),
            token_logits=all(s.logits_TV is not None for s in steps if s.token_ids),
            seeds=drawn[0] == drawn[1] != drawn[2],
        )

    async def _draw(self, seed: int, num_tokens: int) -> list[int]:
        """Tokens at the highest temperature, where every id is about as likely, so that only the seed decides."""
        sampling = SamplingParams(max_tokens=num_tokens, temperature=100.0, seed=seed)
        request = Request(id=f"try-seed-{seed}", prompt_ids=(self._info.eot_id,), sampling=sampling)
        steps = await self._collect(make_job(request, self._info.eot_id))
        return [token_id for step in steps for token_id in step.token_ids]

    async def _collect(self, job: Job) -> list[Step]:
        return [step async for step in self._backend.steps(job)]

    def _check_health(self) -> None:
        """After a failure: is it the request, or the engine? A small request tells."""
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        request = Request(id=f"probe-{time.monotonic_ns()}", prompt_ids=(self._info.eot_id,), sampling=GREEDY)
        try:
            await asyncio.wait_for(self._collect(make_job(request, self._info.eot_id)), PROBE_TIMEOUT_S)
        except Exception as error:
            self._failure = error if str(error) else EngineError("TensorRT-LLM does not answer")


def _cache_tokens(config: EngineConfig, context_length: int) -> int:
    """`kv_cache_tokens` in whole blocks.

    Raises:
        ConfigError: it does not hold one context, so that a request would wait for ever.
    """
    if config.kv_cache_tokens and config.kv_cache_tokens < context_length:
        raise ConfigError(
            f"engine.kv_cache_tokens={config.kv_cache_tokens} does not hold one context of {context_length} tokens; "
            "raise it, or leave it out"
        )
    return -(-config.kv_cache_tokens // config.tokens_per_block) * config.tokens_per_block


def _reason(error: BaseException) -> str:
    """Many errors of a time limit say nothing by themselves."""
    return f"TensorRT-LLM failed: {type(error).__name__}{f': {error}' if str(error) else ''}"


def _median_ms(values_s: deque[float]) -> float | None:
    return round(median(values_s) * 1e3, 3) if values_s else None
