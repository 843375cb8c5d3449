"""One TensorRT-LLM engine in the process that owns it: how it is built, and how a request runs through it.

Both ways of running one use this: `LLM` over MPI in a process of its own (`kraken/trtllm/host.py`), and `AsyncLLM` over
Ray inside a Serve replica (`RayBackend` in `kraken/trtllm/backend.py`). Everything that crosses a process border here
is plain JSON and numpy arrays.
"""

import asyncio
import dataclasses
import functools
import importlib
import secrets
from collections.abc import AsyncGenerator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kraken.config import EngineConfig, from_dict
from kraken.engine.placement import REPLICA_ENVIRONMENT, Placement
from kraken.engine.protocol import EngineError, Request, RequestError, SamplingParams
from kraken.trtllm.fingerprint import require_same_machine

WORKER_EXTENSION = "kraken.trtllm.ray_ext.KrakenWorkerExtension"
STEP_TOKENS = 8192
"""Tokens of a step, TensorRT-LLM's default. A prompt that does not fit beside the tokens of the running requests waits,
and every request behind it waits too."""
LAUNCHERS = ("PMI", "PMIX", "MPI", "OMPI", "SLURM")
"""Prefixes of variables by which a launcher tells a process its rank; workers of another launcher must not see them."""
PLAIN_FIELDS = frozenset({"max_tokens", "temperature", "top_p", "top_k", "seed", "stop_ids"})
"""Fields of our `SamplingParams` that are translated one by one."""
SAME_FIELDS = frozenset({"min_p", "repetition_penalty"})
"""Fields that TensorRT-LLM calls by the same name and means in the same way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What decides how an engine starts."""

    folder: str
    """TensorRT-LLM folder."""
    num_ranks: int
    """GPUs: one per way, or any number for a baseline."""
    context_length: int
    exchange_fingerprint: str
    """Of the exchange folder it was converted from."""
    config: EngineConfig

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Launch":
        """Of `dataclasses.asdict`, which may have been through JSON."""
        return cls(**values | {"config": from_dict(EngineConfig, values["config"])})

    @property
    def dtype(self) -> str:
        """Type of weights and cache in TensorRT-LLM's spelling."""
        return "bfloat16" if self.config.dtype == "auto" else self.config.dtype

    @property
    def cache_tokens(self) -> int:
        """`engine.kv_cache_tokens` in whole blocks."""
        size = self.config.tokens_per_block
        return -(-self.config.kv_cache_tokens // size) * size


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A request in TensorRT-LLM's terms."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: dict[str, Any]
    """Keywords of `tensorrt_llm.SamplingParams`."""
    cache_salt: str | None = None
    """Jobs share cached prompts only with jobs of the same salt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one response of TensorRT-LLM adds to a request."""

    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    """TensorRT-LLM's: stop, length, timeout or cancelled."""
    context_logits_TV: np.ndarray | None = None
    """float32 logits of the prompt's positions, padded vocabulary."""
    logits_TV: np.ndarray | None = None
    """float32 logits from which `token_ids` were drawn, padded vocabulary."""
    timings_s: dict[str, float] = field(default_factory=dict)
    """TensorRT-LLM's own measurements, by their names there; on the last step."""


def make_jobs(request: Request, eot_id: int) -> tuple[Job | None, Job | None]:
    """Translate a request into a job that scores the prompt and a job that generates; None where there is no such work.

    They are two because TensorRT-LLM sends the logits of a prompt again with every token that a job generates.

    Raises:
        RequestError: it asks for what TensorRT-LLM cannot do.
    """
    sampling = request.sampling
    common: dict[str, Any] = {
        # The tokenizer stays out of the engine: ends are given as stop ids, and the id itself is reported.
        "end_id": -1,
        "pad_id": eot_id,
        "include_stop_str_in_output": True,
        "detokenize": False,
        "add_special_tokens": False,
        "return_perf_metrics": True,
    }
    # Of a prompt that is only scored the last token is never fed.
    scored_ids = request.prompt_ids if sampling.max_tokens else request.prompt_ids[:-1]
    scoring = generation = None
    if scored_ids and (request.prompt_logprobs or request.return_logits):
        arguments = common | {"max_tokens": 1, "top_k": 1, "return_context_logits": True}
        # Positions that are found in the cache have no logits, hence a salt of its own.
        scoring = Job(id=request.id, prompt_ids=scored_ids, sampling=arguments, cache_salt=secrets.token_hex(8))
    if sampling.max_tokens:
        arguments = common | {
            "max_tokens": sampling.max_tokens,
            "stop_token_ids": list(sampling.stop_ids) or None,
            "return_generation_logits": request.num_logprobs is not None or request.return_logits,
            # Left out, every request would draw from the same seed.
            "seed": secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**63,
        }
        generation = Job(
            id=request.id,
            prompt_ids=request.prompt_ids,
            sampling=arguments | _drawing(sampling),
            # What is found in the cache was rounded otherwise, so that the same seed could give other tokens.
            cache_salt=None if sampling.seed is None else secrets.token_hex(8),
        )
    return scoring, generation


def _drawing(sampling: SamplingParams) -> dict[str, Any]:
    """How the next token is drawn."""
    arguments: dict[str, Any] = {}
    for spec in dataclasses.fields(sampling):
        value = getattr(sampling, spec.name)
        if spec.name in PLAIN_FIELDS or value == spec.default:
            continue
        if spec.name not in SAME_FIELDS:
            raise RequestError(f"{spec.name} is not available with the TensorRT-LLM engine; leave it out")
        arguments[spec.name] = value
    # Greedy has one spelling that every version understands: top_k=1 and nothing else.
    if sampling.temperature == 0 or sampling.top_k == 1:
        return arguments | {"top_k": 1}
    return arguments | {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}


def llm_arguments(launch: Launch) -> dict[str, Any]:
    """Keywords that `LLM` and `AsyncLLM` are both made with."""
    from kraken.trtllm.compat import CudaGraphConfig, KvCacheConfig, TorchLlmArgs

    config = launch.config
    graphs = None  # which switches them off
    if config.cuda_graphs and config.cuda_graph_sizes:
        graphs = CudaGraphConfig(batch_sizes=sorted(set(config.cuda_graph_sizes)), enable_padding=True)
    elif config.cuda_graphs:
        graphs = CudaGraphConfig(max_batch_size=config.max_batch_size, enable_padding=True)
    optional: dict[str, Any] = {}
    if config.overlap == "blocking":
        optional["model_kwargs"] = {"overlap_all_reduce": False}
    if launch.num_ranks > 1:  # with one rank it would put the worker into the process that streams
        optional["gather_generation_logits"] = True
    if "sampler_type" in TorchLlmArgs.model_fields:
        # The other sampler draws every request from one generator, whatever its seed.
        optional["sampler_type"] = "TRTLLMSampler"
    return {
        **optional,
        "model": launch.folder,
        "skip_tokenizer_init": True,
        "trust_remote_code": True,  # the configuration class of our own folder; workers do so in any case
        "tensor_parallel_size": launch.num_ranks,
        "dtype": launch.dtype,
        "max_batch_size": config.max_batch_size,
        "max_input_len": launch.context_length,  # 1024 unless given
        "max_seq_len": launch.context_length + 1,  # a scored prompt of full length draws one token, never fed
        "max_num_tokens": max(STEP_TOKENS, launch.context_length + config.max_batch_size),
        "max_beam_width": 1,
        "cuda_graph_config": graphs,
        "kv_cache_config": KvCacheConfig(
            enable_block_reuse=config.prefix_reuse,
            tokens_per_block=config.tokens_per_block,
            max_tokens=launch.cache_tokens or None,
        ),
        "return_perf_metrics": True,
    }


def make_llm(launch: Launch) -> Any:
    """`LLM` over MPI; blocks until the ranks are up. For a process that runs nothing else."""
    from kraken.trtllm.compat import LLM, ONESHOT_RANKS

    strategy = "AUTO" if launch.num_ranks in ONESHOT_RANKS else "NCCL"
    return LLM(allreduce_strategy=strategy, **llm_arguments(launch))


async def make_async_llm(launch: Launch, placement: Placement) -> Any:
    """`AsyncLLM` over Ray workers in given bundles; call it on the event loop that will use the engine."""
    from kraken.trtllm.compat import AsyncLLM

    # In a thread: it imports, validates and connects for seconds, during which the loop must answer health checks and
    # notice the time limit. It starts no worker yet.
    make = functools.partial(
        AsyncLLM,
        placement_groups=[placement.group],  # given, so that nobody but its owner removes it
        placement_bundle_indices=[list(placement.bundle_indices)],
        per_worker_gpu_share=1.0,
        ray_worker_extension_cls=WORKER_EXTENSION,
        allreduce_strategy="NCCL",
        num_postprocess_workers=0,
        **llm_arguments(launch),
    )
    llm = await asyncio.to_thread(make)
    try:
        # The ordinary start cannot run where an event loop does.
        await llm.setup_async()
    except BaseException:
        await asyncio.to_thread(llm.shutdown)
        raise
    return llm


def prepare(launch: Launch) -> None:
    """Before an engine is built: the class is registered, and the machine is the one the folder was accepted on.

    Raises:
        ConfigError: the installed version is not supported.
        ArtefactError: the folder was accepted on a machine that differs.
    """
    from kraken.trtllm.compat import installed_version, require_supported_version

    version = require_supported_version(installed_version())
    importlib.import_module("kraken.trtllm.modeling")  # registers the class with TensorRT-LLM
    require_same_machine(Path(launch.folder), launch.num_ranks, launch.dtype, launch.exchange_fingerprint, version)


def clean_environment(environment: MutableMapping[str, str]) -> None:
    """Make a replica's environment one that Ray workers can inherit; to be called before TensorRT-LLM is imported."""
    for name in [name for name in environment if name.startswith(LAUNCHERS)]:
        del environment[name]
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # Ray sets it to nothing where no GPU is reserved
    environment.update(REPLICA_ENVIRONMENT)


class Session:
    """Runs jobs through an `LLM` or `AsyncLLM`. Use it on one event loop.

    Args:
        llm: ready to serve.
    """

    def __init__(self, llm: Any):
        self._llm = llm
        self._aborts: set[asyncio.Future[None]] = set()

    async def steps(self, job: Job) -> AsyncGenerator[Step, None]:
        """Run a job; leaving early aborts it.

        Raises:
            RequestError: TensorRT-LLM refuses the request.
            EngineError: it failed.
        """
        from kraken.trtllm.compat import SamplingParams as TheirSamplingParams

        try:
            result = self._llm.generate_async(
                inputs=list(job.prompt_ids),
                sampling_params=TheirSamplingParams(**job.sampling),
                streaming=True,
                cache_salt=job.cache_salt,
            )
        except ValueError as error:
            raise RequestError(f"TensorRT-LLM refuses the request: {error}") from error
        num_tokens, is_finished = 0, False
        try:
            async for output in result:
                completion = output.outputs[0]
                new_ids = tuple(completion.token_ids[num_tokens:])
                num_tokens += len(new_ids)
                is_finished = bool(output.finished)
                yield Step(
                    token_ids=new_ids,
                    finish_reason=completion.finish_reason,
                    context_logits_TV=_float32(output.context_logits),
                    logits_TV=_last_rows(completion.generation_logits, len(new_ids)),
                    timings_s=_timings_s(output.metrics_dict) if is_finished else {},
                )
        except RuntimeError as error:
            raise EngineError(f"TensorRT-LLM failed: {error}") from error
        finally:
            if not is_finished:
                self._abort(result)

    async def close(self, timeout_s: float) -> None:
        """Shut the engine down; gives up after the time limit, and then something may be left."""
        await asyncio.gather(*self._aborts, return_exceptions=True)
        await asyncio.wait_for(asyncio.to_thread(self._llm.shutdown), timeout_s)

    def _abort(self, result: Any) -> None:
        """Off the event loop: under Ray it waits for the workers' leader."""
        future = asyncio.get_running_loop().run_in_executor(None, result.abort)
        self._aborts.add(future)
        future.add_done_callback(self._aborts.discard)


def _last_rows(logits: Any, num_rows: int) -> np.ndarray | None:
    """The newest rows, whether a response brings all rows or only the new ones."""
    array = _float32(logits)
    if array is None or num_rows == 0:
        return None
    return array.reshape(-1, array.shape[-1])[-num_rows:]


def _float32(tensor: Any) -> np.ndarray | None:
    """A torch tensor of any type and device as numpy."""
    return None if tensor is None else tensor.detach().float().cpu().numpy()


def _timings_s(metrics: dict[Any, Any] | None) -> dict[str, float]:
    """Names as text: they are members of an enumeration whose values are the names."""
    return {str(getattr(name, "value", name)): float(value) for name, value in (metrics or {}).items()}
