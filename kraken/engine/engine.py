"""The PyTorch engine: continuous batching on one device or several. The default engine of serving and evaluation, and
the reference for the others.

`TorchEngine` is its asynchronous face: it checks and registers requests on the event loop, and streams their outputs.
`EngineCore` computes them on a thread of its own, one step after the other.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kraken.config import ConfigError, EngineConfig, ModelConfig
from kraken.convert import read_model_config
from kraken.engine.batch import GraphSizes
from kraken.engine.core import EngineCore, StepOutputs
from kraken.engine.distributed.device_group import DeviceGroup
from kraken.engine.distributed.distributed_runner import load_distributed
from kraken.engine.distributed.partition import Part
from kraken.engine.distributed.rendezvous import Rendezvous
from kraken.engine.distributed.setup import WeightSource, threads_per_rank
from kraken.engine.inbox import stream
from kraken.engine.kernels.choose import choose_kernels
from kraken.engine.kv_cache import BlockPool
from kraken.engine.model.network import Network
from kraken.engine.model.quantized import require_quantizable
from kraken.engine.model_runner import ModelRunner
from kraken.engine.protocol import (
    EngineError,
    EngineInfo,
    EngineOverloaded,
    EngineStats,
    Item,
    Output,
    PromptOutput,
    Request,
    RequestError,
    TokenOutput,
    check_request,
)
from kraken.engine.request_state import RequestState
from kraken.engine.scheduler import Scheduler
from kraken.manifest import Manifest
from kraken.model import Kraken
from kraken.plan.cost import kv_bytes_per_token
from kraken.tokenizer import Tokenizer, require_same_tokenizer

MAX_STEP_LOGITS = 512
"""Most prompt positions of a step whose logits are computed; 100 MB of logits with GPT-2's ids."""
USABLE_MEMORY = 0.9
"""Share of a GPU's free memory that the KV cache may take; the rest is for activations."""


class TorchEngine:
    """An `Engine`. Its thread starts with the first `generate`, and answers on the event loop of that call.

    Args:
        runner: the model on its device, with `num_blocks` blocks of KV cache.
        info: what `info` returns.
        config: sizes of batch, step and queue.
    """

    def __init__(self, runner: ModelRunner, info: EngineInfo, config: EngineConfig, num_blocks: int):
        pool = BlockPool(num_blocks, config.tokens_per_block, config.prefix_reuse)
        self._scheduler = Scheduler(pool, config.max_batch_size, config.max_step_tokens, MAX_STEP_LOGITS)
        self._core = EngineCore(runner, self._scheduler, lambda outputs: self._call_soon(self._deliver, outputs))
        self._runner = runner
        self._info = info
        self._config = config
        self._states: dict[str, RequestState] = {}  # by the request's id; the event loop's
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        self._is_closed = False
        self._num_finished = self._num_aborted = self._completion_tokens = 0

    @classmethod
    def from_exchange(cls, folder: Path, config: EngineConfig, rendezvous: Rendezvous | None = None) -> "TorchEngine":
        """Load an exchange folder.

        Args:
            rendezvous: how the ranks of several devices find each other if they exist already; None starts them here.
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
        """Use a model in memory, on its device and in its type; the other ranks are sent their parts of it. Raises as
        `from_exchange` does.
        """
        source = WeightSource(config=model.config, model=model)
        return cls._open(source, info, config, model.wte.weight.device, model.wte.weight.dtype, rendezvous)

    @classmethod
    def from_shape(
        cls, shape: ModelConfig, info: EngineInfo, config: EngineConfig, rendezvous: Rendezvous | None = None
    ) -> "TorchEngine":
        """Use random weights of a shape, for measuring time. Raises as `from_exchange` does."""
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
            group = DeviceGroup(choose_kernels(device, dtype))
            network = Network(part, weights, info.num_ids, group, config.quantization)
            num_blocks = _num_blocks(network, config)
            runner = ModelRunner(network, num_blocks, config.tokens_per_block)
            if graph_sizes is not None:
                runner.capture_graphs(graph_sizes)
            network.kernels.release_threads()
            return cls(runner, info, config, num_blocks)
        distributed_model = load_distributed(source, info.num_ids, config, device, dtype, rendezvous)
        try:
            num_blocks = _num_blocks(distributed_model.network, config)
        except ConfigError:
            distributed_model.workers.kill()
            raise
        distributed_model.network.kernels.release_threads()
        return cls(distributed_model.make_runner(num_blocks, config, graph_sizes), info, config, num_blocks)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def generate(self, request: Request) -> AsyncIterator[Output]:
        """See `Engine.generate`."""
        return stream(self, request)

    def submit(self, request: Request, receive: Callable[[Item], None]) -> Callable[[], None]:
        """See `Engine.submit`."""
        check_request(request, self._info)
        self._require_healthy()
        if request.id in self._states:
            raise RequestError(f"id={request.id!r} is in flight already; give every request its own")
        if request.sampling.max_tokens == 0 and len(request.prompt_ids) == 1:  # nothing precedes the only token
            if request.prompt_logprobs or request.return_logits:
                logits_TV = np.empty((0, self._info.num_ids), dtype=np.float32) if request.return_logits else None
                receive(PromptOutput(logprobs=(None,) if request.prompt_logprobs else (), logits_TV=logits_TV))
            self._num_finished += 1
            receive(None)
            return lambda: None
        num_queued = sum(not state.was_admitted for state in self._states.values())
        if num_queued >= self._config.max_queued_requests:
            raise EngineOverloaded(f"{num_queued} requests are waiting already; try again later")
        state = self._register(request, receive)
        return lambda: self._abort(state)  # by state and not by id, which may belong to a later request by then

    def abort(self, request_id: str) -> None:
        """See `Engine.abort`. The blocks are free before the next step begins."""
        state = self._states.get(request_id)
        if state is not None:
            self._abort(state)

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        failure = "it was closed" if self._is_closed else str(self._failure or self._runner.failure or "")
        return EngineStats(
            num_running=len(scheduler.running),
            num_queued=len(scheduler.waiting) + sum(not state.is_deregistered for state in [*self._core.inbox]),
            num_finished=self._num_finished,
            num_aborted=self._num_aborted,
            prompt_tokens=scheduler.num_prompt_tokens,
            completion_tokens=self._completion_tokens,
            healthy=self._failure is None and not self._runner.failure and not self._is_closed,
            failure=failure,
            num_preempted=scheduler.num_preempted,
            reused_tokens=scheduler.num_reused_tokens,
            num_blocks=scheduler.pool.num_blocks,
            num_free_blocks=scheduler.pool.num_free,
        )

    async def close(self) -> None:
        """See `Engine.close`."""
        if self._is_closed:
            return
        self._is_closed = True
        self._fail_all(EngineError("it was closed"))
        self._core.stop()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._runner.close)

    def _require_healthy(self) -> None:
        if self._is_closed:
            raise EngineError("the engine is closed")
        if self._failure is not None:
            raise EngineError(f"the engine failed before: {self._failure}") from self._failure
        if self._runner.failure:
            raise EngineError(f"the engine failed before: {self._runner.failure}")

    # -- on the event loop -------------------------------------------------------------------------------------------

    def _register(self, request: Request, receive: Callable[[Item], None]) -> RequestState:
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._run_core, name="kraken-engine", daemon=True)
            self._thread.start()
        state = self._states[request.id] = RequestState(request, receive)
        self._core.notify(state)
        return state

    def _abort(self, state: RequestState) -> None:
        """No-op for a request that has ended."""
        if not state.is_deregistered:
            self._deregister(state, None)
            self._num_aborted += 1
            self._core.notify(state)

    def _deregister(self, state: RequestState, last: EngineError | None) -> None:
        """End the request's stream, with an error or without. Its tokens may still be part of the step in flight."""
        state.is_deregistered = True
        del self._states[state.request.id]
        state.receive(last)

    def _deliver(self, results: StepOutputs) -> None:
        """Pass a step's outputs to the streams of requests that have not been aborted meanwhile."""
        for state, output in results.outputs:
            if not state.is_deregistered:
                state.receive(output)
                self._completion_tokens += isinstance(output, TokenOutput)
        for state in results.finished:
            if not state.is_deregistered:
                self._deregister(state, None)
                self._num_finished += 1
        for state, error in results.failed:
            if not state.is_deregistered:
                self._deregister(state, _error_of("the request failed", error))

    def _fail_all(self, error: BaseException) -> None:
        for state in [*self._states.values()]:
            self._deregister(state, _error_of("the engine failed", error))

    # -- on the engine's thread --------------------------------------------------------------------------------------

    def _run_core(self) -> None:
        torch.set_num_threads(threads_per_rank(self._config))  # OpenMP keeps the number per thread
        try:
            self._core.run()
        except Exception as error:  # of any kind: no client may wait for ever
            self._failure = error
            with contextlib.suppress(RuntimeError):  # the event loop is closed, so that no client waits
                self._call_soon(self._fail_all, error)

    def _call_soon(self, function: Callable[[Any], None], argument: Any) -> None:
        """Call a function on the event loop. Raises: RuntimeError: the loop is closed."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function, argument)


def _error_of(what: str, cause: BaseException) -> EngineError:
    error = EngineError(f"{what}: {cause}")
    error.__cause__ = cause
    return error


def _device_and_dtype(config: EngineConfig) -> tuple[torch.device, torch.dtype]:
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    is_half = cuda or config.quantization != "none"
    name = config.dtype if config.dtype != "auto" else ("bfloat16" if is_half else "float32")
    return torch.device("cuda" if cuda else "cpu"), getattr(torch, name)


def _graph_sizes(config: EngineConfig, model: ModelConfig) -> GraphSizes:
    return GraphSizes(
        max_batch_size=config.max_batch_size,
        max_prompt_tokens=min(config.max_step_tokens, model.context_length),
        max_blocks=-(-model.context_length // config.tokens_per_block),
        chosen=config.cuda_graph_sizes,
    )


def _num_blocks(network: Network, config: EngineConfig) -> int:
    """Number of the KV cache's blocks; the same on every rank."""
    shape = network.config
    tokens = config.kv_cache_tokens
    if not tokens:
        # each context is rounded up to blocks, otherwise the last request of a full batch would not fit
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
