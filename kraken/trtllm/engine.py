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
from kraken.trtllm.checkpoint import FORMAT
from kraken.trtllm.proof import require_proven
from kraken.trtllm.session import Job, Launch, Step, make_jobs

PROBE_TIMEOUT_S = 60.0
STALL_LIMIT_S = 120.0
"""Requests in flight and not one token for this long: a rank hangs, and the engine says that it is unhealthy."""
ANSWER_LIMIT_S = 60.0
"""The oldest request in flight waits for no other one, so that without a token for this long nobody works at it: Ray
workers do not say that they have rejected a request."""
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
    waits_since: float = field(default_factory=time.monotonic)
    """Its last step, or the moment since when no older request is in flight."""
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
        self._flights: dict[str, _Flight] = {}  # in the order in which TensorRT-LLM was given their jobs
        self._starting = asyncio.Lock()
        self._capabilities: Capabilities | None = None
        self._failure: Exception | None = None
        self._closed = False
        self._check: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
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
    ) -> "TensorRTEngine":
        """An engine for a TensorRT-LLM folder.

        Args:
            num_ranks: GPUs of a baseline, whose layers any number can share; a Kraken has one per way.

        Raises:
            ArtefactError: the folder is unfinished or damaged, or its padded heads change the logits.
            ConfigError: TensorRT-LLM cannot honour one of the settings.
        """
        if config.refused_by_tensorrt_llm:
            raise ConfigError(f"{config.refused_by_tensorrt_llm} with TensorRT-LLM; leave it out")
        manifest, tokenizer = Manifest.read(folder), Tokenizer.load(folder)
        if manifest.config.get("format") != FORMAT:
            raise ArtefactError(f"{folder} was written by another version of this project; delete it and convert again")
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
        if config.kv_cache_tokens and config.kv_cache_tokens < info.context_length:
            raise ConfigError(
                f"engine.kv_cache_tokens={config.kv_cache_tokens} does not hold one context of {info.context_length} "
                "tokens, so that a request would wait for ever; raise it, or leave it out"
            )
        launch = Launch(
            folder=str(folder),
            num_ranks=num_ranks or values["num_ways"],
            context_length=info.context_length,
            exchange_fingerprint=next(iter(manifest.parents.values()), manifest.fingerprint),
            config=config,
        )
        backend = ProcessBackend(launch) if placement is None else RayBackend(launch, placement)
        return cls(backend, info, config)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def backend(self) -> Backend:
        return self._backend

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
                limit_s = self._config.startup_timeout_s
                reason = str(error) or f"its first requests took longer than engine.startup_timeout_s={limit_s:g}"
                known = error if isinstance(error, EngineError) else EngineError(f"TensorRT-LLM failed: {reason}")
                self._failure = known
                with contextlib.suppress(EngineError):
                    await self._backend.close()
                if isinstance(error, Exception):
                    raise known from error
                raise

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """See `Engine.generate`."""
        check_request(request, self._info)
        jobs = make_jobs(request, self._info.eot_id)
        self._require_healthy()
        arrived_at = time.monotonic()
        if self._capabilities is None:
            await self.start()
        assert self._capabilities is not None
        self._capabilities.require(request)
        if request.id in self._flights:
            raise RequestError(f"id={request.id!r} is in flight already; give every request its own")
        if len(self._flights) >= self._config.max_batch_size + self._config.max_queued_requests:
            raise EngineOverloaded(f"{self._config.max_queued_requests} requests are waiting already; try again later")
        if not self._flights:
            self._last_step_at = time.monotonic()
        flight = self._flights[request.id] = _Flight(request, arrived_at)
        self._prompt_tokens += len(request.prompt_ids)
        flight.task = asyncio.create_task(self._run(flight, *jobs))
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._watch_oldest())
        try:
            while (output := await flight.outputs.get()) is not None:
                if isinstance(output, Exception):
                    raise output
                yield output
        finally:
            # by flight and not by id, which may belong to a later request by now
            if self._flights.get(request.id) is flight:
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
        tasks += [task for task in (self._check, self._watch) if task is not None]
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

    async def _run(self, flight: _Flight, scoring: Job | None, generation: Job | None) -> None:
        """Move one request's outputs to whoever waits for them."""
        end: Exception | None = None
        try:
            async with aclosing(self._outputs(flight, scoring, generation)) as outputs:
                async for output in outputs:
                    flight.outputs.put_nowait(output)
            self._num_finished += 1
        except RequestError as error:
            end = error
        except Exception as error:
            end = error if isinstance(error, EngineError) else EngineError(f"TensorRT-LLM failed: {error}")
            self._check_health()
        self._end(flight, end)

    def _end(self, flight: _Flight, end: Exception | None) -> None:
        if self._flights.get(flight.request.id) is flight:
            del self._flights[flight.request.id]
        flight.outputs.put_nowait(end)

    async def _outputs(
        self, flight: _Flight, scoring: Job | None, generation: Job | None
    ) -> AsyncGenerator[Output, None]:
        request = flight.request
        if request.prompt_logprobs or request.return_logits:
            logits_TV = np.empty((0, self._info.num_ids), np.float32)  # nothing precedes an only token
            if scoring is not None:
                steps = [step async for step in self._steps(flight, scoring)]
                found = [step.context_logits_TV for step in steps if step.context_logits_TV is not None]
                if not found:
                    raise EngineError("TensorRT-LLM returned no logits of the prompt; leave prompt_logprobs out")
                logits_TV = found[0]
                # its second job waits behind those of the requests that have come meanwhile
                self._flights[request.id] = self._flights.pop(request.id)
            yield self._prompt_output(request, logits_TV)
        if generation is None:
            return
        num_tokens = 0
        async with aclosing(self._steps(flight, generation)) as running:
            async for step in running:
                self._note(flight, step)
                for output in self._token_outputs(request, step, num_tokens):
                    num_tokens += 1
                    self._completion_tokens += 1
                    yield output
                    if output.finish_reason is not None:
                        return
        raise EngineError(f"TensorRT-LLM ended the request after {num_tokens} tokens without a reason")

    async def _steps(self, flight: _Flight, job: Job) -> AsyncGenerator[Step, None]:
        async with aclosing(self._backend.steps(job)) as steps:
            async for step in steps:
                self._last_step_at = flight.waits_since = time.monotonic()
                yield step

    async def _watch_oldest(self) -> None:
        """End a request that nobody works at, while there are any."""
        oldest: _Flight | None = None
        while self._flights:
            first = next(iter(self._flights.values()))
            if first is not oldest:
                oldest = first
                oldest.waits_since = max(oldest.waits_since, time.monotonic())
            elif time.monotonic() - oldest.waits_since > ANSWER_LIMIT_S:
                assert oldest.task is not None
                oldest.task.cancel()
                problem = f"TensorRT-LLM has not answered request {oldest.request.id!r} for {ANSWER_LIMIT_S:g} s"
                self._end(oldest, EngineError(f"{problem}; it may have rejected it, see the logs of its workers"))
                self._check_health()
            await asyncio.sleep(ANSWER_LIMIT_S / 20)

    def _note(self, flight: _Flight, step: Step) -> None:
        """Measure."""
        if step.token_ids and not flight.has_token:
            flight.has_token = True
            self._ttfts_s.append(time.monotonic() - flight.arrived_at)
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
            if _takes_the_largest(sampling) and not are_of(logits_TV, token_ids):
                raise EngineError("TensorRT-LLM returned logits of other tokens than its own; leave num_logprobs out")
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
        """Run a few small requests together, and look at what comes back.

        One token would not do: the logits of older versions are overwritten by those of the next token.
        """
        num_tokens = min(NUM_PROBE_TOKENS, self._info.context_length - 2)
        greedy = SamplingParams(max_tokens=num_tokens, temperature=0.0)
        # At the highest temperature every id is about as likely, so that only the seed decides.
        drawn = [SamplingParams(max_tokens=num_tokens, temperature=100.0, seed=seed) for seed in (1, 1, 2)]
        requests = [
            Request(id=f"try-{i}", prompt_ids=(self._info.eot_id,) * 2, sampling=sampling, return_logits=i == 0)
            for i, sampling in enumerate([greedy, *drawn])
        ]
        jobs = [make_jobs(request, self._info.eot_id) for request in requests]
        scoring, steps, *seeded = await asyncio.gather(
            *(self._collect(job) for pair in jobs for job in pair if job is not None)
        )
        num_rows = max((len(s.context_logits_TV) for s in scoring if s.context_logits_TV is not None), default=0)
        tokens = [tuple(token_id for step in each for token_id in step.token_ids) for each in seeded]
        return Capabilities(
            prompt_logits=num_rows == len(requests[0].prompt_ids),
            token_logits=all(
                s.logits_TV is not None and are_of(s.logits_TV, s.token_ids) for s in steps if s.token_ids
            ),
            seeds=tokens[0] == tokens[1] != tokens[2],
        )

    async def _collect(self, job: Job | None) -> list[Step]:
        return [] if job is None else [step async for step in self._backend.steps(job)]

    def _check_health(self) -> None:
        """After a failure: is it the request, or the engine? A small request tells."""
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        request = Request(id=f"probe-{time.monotonic_ns()}", prompt_ids=(self._info.eot_id,), sampling=GREEDY)
        try:
            _, job = make_jobs(request, self._info.eot_id)
            await asyncio.wait_for(self._collect(job), PROBE_TIMEOUT_S)
        except Exception as error:
            self._failure = error if str(error) else EngineError("TensorRT-LLM does not answer")


def are_of(logits_TV: np.ndarray, token_ids: Sequence[int]) -> bool:
    """Whether each token has the largest of its logits, as greedily chosen tokens do; two bytes may hold ties."""
    if len(logits_TV) != len(token_ids):
        return False
    return all(row[token_id] == row.max() for row, token_id in zip(logits_TV, token_ids, strict=True))


def _takes_the_largest(sampling: SamplingParams) -> bool:
    return (sampling.temperature == 0 or sampling.top_k == 1) and sampling.repetition_penalty == 1


def _median_ms(values_s: deque[float]) -> float | None:
    return round(median(values_s) * 1e3, 3) if values_s else None
