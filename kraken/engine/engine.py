"""The PyTorch engine: continuous batching on one device or several; the embedded default, and the oracle for others.

A thread of its own plans the steps and runs them, one behind the other: the event loop tells it of requests that come
and go, and hands out what a step yields while the next one runs.
"""

import asyncio
import contextlib
import secrets
import threading
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kraken.config import ConfigError, EngineConfig, ModelConfig
from kraken.convert import read_model_config
from kraken.engine.batch import Chunk, ForwardOutput, GraphSizes
from kraken.engine.distributed.device_group import DeviceGroup
from kraken.engine.distributed.distributed_runner import load_distributed
from kraken.engine.distributed.partition import Part
from kraken.engine.distributed.rendezvous import Rendezvous
from kraken.engine.distributed.setup import WeightSource, threads_per_rank
from kraken.engine.distributed.worker_group import WorkerError
from kraken.engine.kernels.cpu.kernels import cpu_kernels
from kraken.engine.kv_cache import BlockPool
from kraken.engine.model.network import Network
from kraken.engine.model.quantized import require_quantizable
from kraken.engine.model_runner import ModelRunner
from kraken.engine.protocol import (
    EngineError,
    EngineInfo,
    EngineOverloaded,
    EngineStats,
    FinishReason,
    Output,
    PromptOutput,
    Request,
    RequestError,
    TokenLogprobs,
    TokenOutput,
    check_request,
)
from kraken.engine.sampler import Draw, chance_of, sample, token_logprobs
from kraken.engine.scheduler import ScheduledTokens, Scheduler, Sequence
from kraken.manifest import Manifest
from kraken.model import Kraken
from kraken.plan import kv_bytes_per_token
from kraken.tokenizer import Tokenizer, require_same_tokenizer

MAX_STEP_LOGITS = 512
"""Prompt positions read out in one step; 100 MB of logits with GPT-2's ids."""
USABLE_MEMORY = 0.9
"""Share of a GPU's free memory that the cache may take; the rest is for activations."""
MAX_FAILED_STEPS = 3
"""Steps in a row without one good request, after which it is the engine that is broken and not the requests."""


@dataclass(eq=False, slots=True)
class _Flight:
    """A request in flight: how it is drawn, and what has come of it."""

    sequence: Sequence
    seed: int
    outputs: asyncio.Queue[Output | EngineError | None]
    seen_ids: set[int] = field(default_factory=set)
    """Kept where there is a repetition penalty."""
    num_generated: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logits: list[np.ndarray] = field(default_factory=list)
    ended: bool = False

    @property
    def request(self) -> Request:
        return self.sequence.request


@dataclass(slots=True)
class _Result:
    """What one step yields."""

    outputs: list[tuple[_Flight, Output]] = field(default_factory=list)
    done: list[_Flight] = field(default_factory=list)
    failed: list[tuple[_Flight, Exception]] = field(default_factory=list)
    stale: list[_Flight] = field(default_factory=list)
    """Sound themselves, but they read what a failed one should have stored."""

    @property
    def has_first(self) -> bool:
        """Whether there is anybody's first output."""
        return any(isinstance(output, PromptOutput) or flight.num_generated == 1 for flight, output in self.outputs)


class TorchEngine:
    """An `Engine`. Its thread starts with the first `generate`, and answers on the event loop of that call.

    Args:
        runner: the model on its device, with `num_blocks` of cache.
        info: what users are told of the model.
        config: sizes of batch, step and queue.
    """

    def __init__(self, runner: ModelRunner, info: EngineInfo, config: EngineConfig, num_blocks: int):
        self._runner = runner
        self._info = info
        self._config = config
        self._scheduler = Scheduler(
            BlockPool(num_blocks, config.tokens_per_block, config.prefix_reuse),
            config.max_batch_size,
            config.max_step_tokens,
            MAX_STEP_LOGITS,
        )
        self._flights: dict[str, _Flight] = {}
        """The event loop's, by the id of the request."""
        self._flight_of: dict[Sequence, _Flight] = {}
        """The thread's, as the scheduler is."""
        self._news: deque[_Flight] = deque()
        """From the event loop to the thread: flights that begin, and those that have ended."""
        self._undelivered: _Result | None = None
        """The thread's: what the last step yields, as long as the event loop has not been told."""
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._num_failed_steps = 0
        self._num_finished = self._num_aborted = self._completion_tokens = 0

    @classmethod
    def from_exchange(cls, folder: Path, config: EngineConfig, rendezvous: Rendezvous | None = None) -> "TorchEngine":
        """Load an exchange folder.

        Args:
            meeting: to which the other ranks of several are invited, where they exist already; None starts them here.
        Raises:
            ArtefactError: the folder is unfinished or damaged, or its tokenizer is not the one it was trained with.
            ConfigError: the cache would not hold one context, or the model cannot be divided among the devices.
            EngineError: another rank did not come, or failed.
        """
        manifest = Manifest.read(folder)
        tokenizer = Tokenizer.load(folder)
        require_same_tokenizer(
            tokenizer.fingerprint, manifest.details["tokenizer_fingerprint"], f"the tokenizer in {folder}", "the model"
        )
        model_config, values = read_model_config(folder)
        info = EngineInfo(
            name="torch",
            context_length=model_config.context_length,
            num_ids=values["num_token_ids"],
            eot_id=values["eos_token_id"],
            tokenizer_fingerprint=tokenizer.fingerprint,
        )
        device, dtype = _device_and_dtype(config)
        return cls._open(WeightSource(config=model_config, folder=folder), info, config, device, dtype, rendezvous)

    @classmethod
    def from_model(
        cls, model: Kraken, info: EngineInfo, config: EngineConfig, rendezvous: Rendezvous | None = None
    ) -> "TorchEngine":
        """Build on a model in memory, on the device and in the type that it has; other ranks are sent their parts.
        Raises as `from_exchange` does.
        """
        source = WeightSource(config=model.config, model=model)
        return cls._open(source, info, config, model.wte.weight.device, model.wte.weight.dtype, rendezvous)

    @classmethod
    def from_shape(
        cls, shape: ModelConfig, info: EngineInfo, config: EngineConfig, rendezvous: Rendezvous | None = None
    ) -> "TorchEngine":
        """Random weights of a shape, for measuring time. Raises as `from_exchange` does."""
        device, dtype = _device_and_dtype(config)
        return cls._open(WeightSource(config=shape), info, config, device, dtype, rendezvous)

    @classmethod
    def _open(
        cls,
        source: WeightSource,
        info: EngineInfo,
        config: EngineConfig,
        device: torch.device,
        dtype: torch.dtype,
        rendezvous: Rendezvous | None,
    ) -> "TorchEngine":
        torch.set_num_threads(threads_per_rank(config))
        if config.quantization == "fp8":
            require_quantizable(source.config, config.num_devices, device, dtype)
        graph_sizes = _graph_sizes(config, source.config) if config.cuda_graphs else None
        if config.num_devices == 1:
            part = Part(source.config)
            weights = source.weights(part, dtype, device)
            network = Network(part, weights, info.num_ids, DeviceGroup(), config.quantization)
            num_blocks = _num_blocks(network, config)
            runner = ModelRunner(network, num_blocks, config.tokens_per_block)
            if graph_sizes is not None:
                runner.record(graph_sizes)
            _release_threads(device, dtype)
            return cls(runner, info, config, num_blocks)
        distributed_model = load_distributed(source, info.num_ids, config, device, dtype, rendezvous)
        try:
            num_blocks = _num_blocks(distributed_model.network, config)
        except ConfigError:
            distributed_model.workers.kill()
            raise
        _release_threads(device, dtype)
        return cls(distributed_model.make_runner(num_blocks, config, graph_sizes), info, config, num_blocks)

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """See `Engine.generate`."""
        check_request(request, self._info)
        self._require_healthy()
        if request.id in self._flights:
            raise RequestError(f"id={request.id!r} is in flight already; give every request its own")
        scores_prompt = request.prompt_logprobs or request.return_logits
        fed = request.prompt_ids if request.sampling.max_tokens else request.prompt_ids[:-1]
        if not fed:  # one token that is only scored: nothing comes before it
            if scores_prompt:
                logits_TV = np.empty((0, self._info.num_ids), dtype=np.float32) if request.return_logits else None
                yield PromptOutput(logprobs=(None,) if request.prompt_logprobs else (), logits_TV=logits_TV)
            self._num_finished += 1
            return
        # a preempted one has its place already
        num_queued = sum(not flight.sequence.was_admitted for flight in self._flights.values())
        if num_queued >= self._config.max_queued_requests:
            raise EngineOverloaded(f"{num_queued} requests are waiting already; try again later")
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._serve, name="kraken-engine", daemon=True)
            self._thread.start()
        flight = self._begin(Sequence(request, array("i", fed), scores_prompt))
        try:
            while (output := await flight.outputs.get()) is not None:
                if isinstance(output, EngineError):
                    raise output
                yield output
        finally:
            # by flight, not by id: the id may belong to a later request by now
            if not flight.ended:
                self.abort(request.id)

    def abort(self, request_id: str) -> None:
        """See `Engine.abort`; the blocks are free before the next step begins."""
        flight = self._flights.get(request_id)
        if flight is not None:
            self._end(flight)
            self._num_aborted += 1
            flight.outputs.put_nowait(None)
            self._tell(flight)

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        return EngineStats(
            num_running=len(scheduler.running),
            num_queued=len(scheduler.waiting) + sum(not flight.ended for flight in [*self._news]),
            num_finished=self._num_finished,
            num_aborted=self._num_aborted,
            prompt_tokens=scheduler.num_prompt_tokens,
            completion_tokens=self._completion_tokens,
            healthy=self._failure is None and not self._runner.failure and not self._closed,
            num_preempted=scheduler.num_preempted,
            reused_tokens=scheduler.num_reused_tokens,
            num_blocks=scheduler.pool.num_blocks,
            num_free_blocks=scheduler.pool.num_free,
        )

    async def close(self) -> None:
        """See `Engine.close`."""
        if self._closed:
            return
        self._closed = True
        self._fail_all(EngineError("it was closed"))
        if self._thread is not None:
            self._wake.set()
            await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._runner.close)

    def _require_healthy(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")
        if self._failure is not None:
            raise EngineError(f"the engine failed before: {self._failure}") from self._failure
        if self._runner.failure:
            raise EngineError(f"the engine failed before: {self._runner.failure}")

    # -- on the event loop -------------------------------------------------------------------------------------------

    def _begin(self, sequence: Sequence) -> _Flight:
        sampling = sequence.request.sampling
        seed = sampling.seed if sampling.seed is not None else secrets.randbits(63)
        flight = _Flight(sequence, seed, asyncio.Queue())
        if sampling.repetition_penalty != 1.0:
            flight.seen_ids.update(sequence.request.prompt_ids)
        self._flights[sequence.request.id] = flight
        self._tell(flight)
        return flight

    def _end(self, flight: _Flight) -> None:
        """The request is nobody's any more; its sequence may still be in the step that runs."""
        flight.ended = True
        del self._flights[flight.request.id]

    def _tell(self, flight: _Flight) -> None:
        self._news.append(flight)
        self._wake.set()

    def _hand_out(self, result: _Result) -> None:
        for flight, output in result.outputs:
            if not flight.ended:
                flight.outputs.put_nowait(output)
                self._completion_tokens += isinstance(output, TokenOutput)
        for flight in result.done:
            if not flight.ended:
                self._end(flight)
                self._num_finished += 1
                flight.outputs.put_nowait(None)
        for flight, error in result.failed:
            if not flight.ended:
                self._end(flight)
                flight.outputs.put_nowait(_error_of("the request failed", error))

    def _fail_all(self, error: BaseException) -> None:
        for flight in [*self._flights.values()]:
            self._end(flight)
            flight.outputs.put_nowait(_error_of("the engine failed", error))

    # -- on the engine's thread --------------------------------------------------------------------------------------

    def _serve(self) -> None:
        torch.set_num_threads(threads_per_rank(self._config))  # OpenMP keeps the number per thread
        failure: Exception | None = None
        try:
            while not self._closed:
                self._take_in()
                step = self._scheduler.schedule()
                if not step:
                    self._deliver()
                    self._wake.wait()
                    self._wake.clear()
                    continue
                result = self._run(step, [self._flight_of[scheduled.sequence] for scheduled in step])
                self._settle(result)
                self._undelivered = result
                # what the event loop then does is done beside the device instead of beside this thread; but whoever
                # waits for a first token has waited enough
                if not self._runner.is_asynchronous or result.has_first:
                    self._deliver()
        except Exception as error:  # whatever it was, nobody may wait for ever
            self._failure = failure = error
        for sequence in [*self._flight_of]:
            self._drop(sequence, invalidate=True)
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody is left to be told
            self._deliver()
            if failure is not None:
                self._call(self._fail_all, failure)

    def _deliver(self) -> None:
        """What the last step yields, to the event loop; of what was delivered before, nothing."""
        if self._undelivered is not None:
            result, self._undelivered = self._undelivered, None
            self._call(self._hand_out, result)

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        """Soon, on the event loop. Raises: RuntimeError: it is closed."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function, argument)

    def _take_in(self) -> None:
        """Whoever has begun is planned for, and whoever has ended since the last step gives its blocks back."""
        while self._news:
            flight = self._news.popleft()
            if flight.ended:
                self._drop(flight.sequence)
            else:
                self._flight_of[flight.sequence] = flight
                self._scheduler.add(flight.sequence)

    def _settle(self, result: _Result) -> None:
        """The blocks of sequences that end are free before anybody hears of it."""
        for flight in result.done:
            self._drop(flight.sequence)
        for flight, _ in result.failed:
            self._drop(flight.sequence, invalidate=True)
        for flight in reversed(result.stale):  # each goes to the front of the queue
            self._scheduler.preempt(flight.sequence, invalidate=True)

    def _drop(self, sequence: Sequence, invalidate: bool = False) -> None:
        """It is not planned for any more; of one that is not, nothing."""
        if self._flight_of.pop(sequence, None) is not None:
            self._scheduler.remove(sequence, invalidate)

    def _run(self, step: list[ScheduledTokens], flights: list[_Flight]) -> _Result:
        """One forward pass, and what follows from it for each request."""
        try:
            # on a CPU nothing is gained by drawing with the pass
            chances = [chance_of(_draw_of(flight)) for flight in flights] if self._runner.is_asynchronous else ()
            forward_output = self._runner.forward([_chunk(scheduled) for scheduled in step], chances)
        except Exception as error:
            if _is_fatal(error):
                raise
            return self._run_apart(step, flights)
        self._deliver()  # of the step before
        self._runner.join()
        self._num_failed_steps = 0
        result = _Result()
        self._finish(step, flights, forward_output, result)
        return result

    def _run_apart(self, step: list[ScheduledTokens], flights: list[_Flight]) -> _Result:
        """A step that failed, request by request, so that only those fail that cannot be computed.

        Raises:
            Exception: steps fail one after the other whatever is in them.
        """
        self._deliver()
        result, invalid_blocks = _Result(), set[int]()
        for scheduled, flight in zip(step, flights, strict=True):
            blocks = scheduled.sequence.table.blocks
            if invalid_blocks.intersection(blocks):
                result.stale.append(flight)
                invalid_blocks.update(blocks)
                continue
            try:
                forward_output = self._runner.forward([_chunk(scheduled)])
                self._runner.join()
            except Exception as error:
                if _is_fatal(error):
                    raise
                result.failed.append((flight, error))
                invalid_blocks.update(blocks)
            else:
                self._finish([scheduled], [flight], forward_output, result)
        has_sound = len(result.failed) + len(result.stale) < len(step)
        self._num_failed_steps = 0 if has_sound else self._num_failed_steps + 1
        if self._num_failed_steps == MAX_FAILED_STEPS:
            raise result.failed[-1][1]
        return result

    def _finish(
        self, step: list[ScheduledTokens], flights: list[_Flight], forward_output: ForwardOutput, result: _Result
    ) -> None:
        """Prompts' scores, then a token for every sequence that is computed to its end."""
        drawn: list[_Flight] = []
        rows: list[int] = []
        end = 0
        for scheduled, flight in zip(step, flights, strict=True):
            start, end = end, end + scheduled.num_logits
            try:
                if flight.sequence.scores_prompt:
                    self._score_prompt(scheduled, flight, forward_output.logits_RV[start:end], result)
            except Exception as error:
                if _is_fatal(error):
                    raise
                result.failed.append((flight, error))
                continue
            if not scheduled.is_last:
                continue
            if flight.request.sampling.max_tokens == 0:
                result.done.append(flight)
            else:
                drawn.append(flight)
                rows.append(end - 1)
        if drawn:
            self._sample_rows(drawn, forward_output.of(rows), result)

    def _score_prompt(self, scheduled: ScheduledTokens, flight: _Flight, logits_TV: Tensor, result: _Result) -> None:
        """Take in the scores of a part of the prompt; after the last part they are an output."""
        request = flight.request
        if scheduled.start == 0:  # also after a preemption
            flight.prompt_logprobs, flight.prompt_logits = [None], []
        following = list(request.prompt_ids[scheduled.start + 1 : scheduled.end + 1])
        if request.prompt_logprobs and following:
            scores = token_logprobs(logits_TV[: len(following)], following, request.num_logprobs or 0)
            flight.prompt_logprobs += scores
        if request.return_logits:
            flight.prompt_logits.append(logits_TV.cpu().numpy())
        if scheduled.is_last:
            flight.sequence.scores_prompt = False
            logits = np.concatenate(flight.prompt_logits) if request.return_logits else None
            logprobs = tuple(flight.prompt_logprobs) if request.prompt_logprobs else ()
            flight.prompt_logits = []
            result.outputs.append((flight, PromptOutput(logprobs=logprobs, logits_TV=logits)))

    def _sample_rows(self, flights: list[_Flight], forward_output: ForwardOutput, result: _Result) -> None:
        """One more token for every flight, by its row; a row that cannot be drawn fails alone."""
        logits_BV = forward_output.logits_RV
        try:
            token_ids = sample(logits_BV, [_draw_of(flight) for flight in flights], forward_output.next_ids_R)
            logprobs = _logprobs(flights, logits_BV, token_ids)
        except Exception as error:
            if _is_fatal(error):
                raise
            if len(flights) == 1:
                result.failed.append((flights[0], error))
                return
            for row, flight in enumerate(flights):
                self._sample_rows([flight], forward_output.of([row]), result)
            return
        for row, (flight, token_id) in enumerate(zip(flights, token_ids, strict=True)):
            if token_id is None:
                num_tokens = len(flight.sequence.token_ids)
                result.failed.append((flight, EngineError(f"the logits after {num_tokens} tokens are not finite")))
                continue
            output = TokenOutput(
                token_id=token_id,
                logprobs=logprobs[row],
                logits_V=logits_BV[row].cpu().numpy() if flight.request.return_logits else None,
                finish_reason=_take(flight, token_id),
            )
            result.outputs.append((flight, output))
            if output.finish_reason is not None:
                result.done.append(flight)


def _take(flight: _Flight, token_id: int) -> FinishReason | None:
    """Append a token to its sequence; says whether it is the last."""
    sampling = flight.request.sampling
    flight.sequence.token_ids.append(token_id)
    flight.num_generated += 1
    if sampling.repetition_penalty != 1.0:
        flight.seen_ids.add(token_id)
    if token_id in sampling.stop_ids:
        return "stop"
    return "length" if flight.num_generated == sampling.max_tokens else None


def _draw_of(flight: _Flight) -> Draw:
    return Draw(flight.request.sampling, flight.seed, flight.num_generated, flight.seen_ids)


def _logprobs(flights: list[_Flight], logits_BV: Tensor, token_ids: list[int | None]) -> list[TokenLogprobs | None]:
    """What each flight asked to know of its token, computed for all that asked at once."""
    result: list[TokenLogprobs | None] = [None] * len(flights)
    asked = {
        row: (token_id, flight.request.num_logprobs)
        for row, (flight, token_id) in enumerate(zip(flights, token_ids, strict=True))
        if flight.request.num_logprobs is not None and token_id is not None
    }
    if not asked:
        return result
    counts = [count or 0 for _, count in asked.values()]
    scores = token_logprobs(logits_BV[[*asked]], [token_id for token_id, _ in asked.values()], max(counts))
    for row, count, score in zip(asked, counts, scores, strict=True):
        result[row] = TokenLogprobs(token_id=score.token_id, logprob=score.logprob, top=score.top[:count])
    return result


def _chunk(scheduled: ScheduledTokens) -> Chunk:
    sequence = scheduled.sequence
    return Chunk(
        sequence.token_ids[scheduled.start : scheduled.end],
        scheduled.start,
        sequence.table.blocks,
        scheduled.num_logits,
    )


def _error_of(what: str, cause: BaseException) -> EngineError:
    error = EngineError(f"{what}: {cause}")
    error.__cause__ = cause
    return error


def _is_fatal(error: Exception) -> bool:
    """Whether a device, its memory or the link to another is at fault, so that nothing else can be trusted to run."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | torch.AcceleratorError | WorkerError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's CPU allocator


def _device_and_dtype(config: EngineConfig) -> tuple[torch.device, torch.dtype]:
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    is_half = cuda or config.quantization != "none"
    name = config.dtype if config.dtype != "auto" else ("bfloat16" if is_half else "float32")
    return torch.device("cuda" if cuda else "cpu"), getattr(torch, name)


def _release_threads(device: torch.device, dtype: torch.dtype) -> None:
    """What this thread has loaded, another one runs."""
    if (kernels := cpu_kernels(device, dtype)) is not None:
        kernels.release_threads()


def _graph_sizes(config: EngineConfig, model: ModelConfig) -> GraphSizes:
    return GraphSizes(
        max_batch_size=config.max_batch_size,
        max_prompt_tokens=min(config.max_step_tokens, model.context_length),
        max_blocks=-(-model.context_length // config.tokens_per_block),
        chosen=config.cuda_graph_sizes,
    )


def _num_blocks(network: Network, config: EngineConfig) -> int:
    """Blocks of the cache, on every device."""
    shape = network.config
    tokens = config.kv_cache_tokens
    if not tokens:
        # a whole number of blocks for every context, or the last request of a full batch would not fit
        blocks_per_context = -(-shape.context_length // config.tokens_per_block)
        tokens = config.max_batch_size * (blocks_per_context + 1) * config.tokens_per_block
        if network.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(network.device)
            bytes_per_token = kv_bytes_per_token(shape, network.dtype.itemsize) // network.part.size
            tokens = min(tokens, int(free * USABLE_MEMORY) // bytes_per_token)
    num_blocks = tokens // config.tokens_per_block
    if num_blocks * config.tokens_per_block < shape.context_length:
        raise ConfigError(
            f"engine.kv_cache_tokens={config.kv_cache_tokens} leaves room for {num_blocks * config.tokens_per_block} "
            f"tokens, but one context has {shape.context_length}; raise it, or leave it at 0"
        )
    return num_blocks
