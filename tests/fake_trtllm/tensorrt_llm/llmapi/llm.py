"""`LLM` and `AsyncLLM` of the stand-in."""

import asyncio
import importlib
import os
import subprocess
import sys
import time
from typing import Any

from tensorrt_llm.llmapi.executor import Executor, Limits
from tensorrt_llm.llmapi.llm_args import KvCacheConfig, has, require_known
from tensorrt_llm.llmapi.result import RequestOutput
from tensorrt_llm.llmapi.sampling_params import SamplingParams

LIMITS = ("max_batch_size", "max_num_tokens", "max_seq_len")


def _is_on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class LLM:
    def __init__(
        self,
        model: str,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ):
        require_known(kwargs)
        if not skip_tokenizer_init:
            raise ValueError("this stand-in has no tokenizers")
        if kwargs.get("num_postprocess_workers"):
            raise ValueError("num_postprocess_workers is not supported in RayExecutor")
        self._model, self._num_ranks, self._dtype, self._arguments = str(model), tensor_parallel_size, dtype, kwargs
        self._executor: Executor | None = None
        if has("dead"):
            raise RuntimeError("Executor worker died during initialization")
        if kwargs.get("orchestrator_type") == "ray":
            if _is_on_event_loop() and type(self) is LLM:
                raise RuntimeError("an event loop is running: the workers were never set up")
        else:
            self._start("mpi")

    def _start(self, orchestrator: str) -> None:
        if has("litter"):
            # What MPI does: a daemon in a session of its own, which nobody waits for.
            sleeper = "import time; time.sleep(600)"
            code = f"import subprocess as s, sys; s.Popen([sys.executable, '-c', {sleeper!r}], start_new_session=True)"
            subprocess.run([sys.executable, "-c", code], check=True)
        if has("hang"):
            time.sleep(600)
        self._executor = Executor(
            self._model,
            self._num_ranks,
            strategy=self._arguments.get("allreduce_strategy", "AUTO"),
            orchestrator=orchestrator,
            limits=self._limits(),
            **(self._arguments.get("model_kwargs") or {}),
        )

    def _limits(self) -> Limits:
        given = {name: self._arguments[name] for name in LIMITS if name in self._arguments}
        cache = self._arguments.get("kv_cache_config") or KvCacheConfig()
        return Limits(**given, enable_block_reuse=cache.enable_block_reuse, tokens_per_block=cache.tokens_per_block)

    def generate_async(
        self,
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        trace_headers: Any = None,
        _postproc_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        assert self._executor is not None, "not set up"
        sampling = sampling_params or SamplingParams()
        if sampling.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        if len(inputs) > self._arguments.get("max_num_tokens", 8192):
            raise ValueError(f"The prompt length {len(inputs)} should not exceed max_num_tokens")
        if len(inputs) > self._arguments.get("max_input_len", 1024):
            raise ValueError(f"The prompt length {len(inputs)} should not exceed max_input_len")
        return self._executor.submit(list(inputs), sampling, self._abort, cache_salt)

    def generate(
        self,
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = True,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        raise NotImplementedError("nobody here calls it")

    async def get_stats_async(self, timeout: float | None = 2) -> list[Any]:
        return []

    def shutdown(self) -> None:
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    def _abort(self, request_id: int) -> None:
        if self._executor is not None:
            self._executor.abort(request_id)


class AsyncLLM(LLM):
    """Over Ray: an actor per rank in the given bundles. The arithmetic stays in this process's own ranks."""

    def __init__(
        self,
        placement_groups: list[Any] | None = None,
        placement_bundle_indices: list[list[int]] | None = None,
        per_worker_gpu_share: float | None = None,
        *args: Any,
        **kwargs: Any,
    ):
        for name in ("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "TLLM_DISABLE_MPI"):
            assert os.environ.get(name) == "1", name
        assert os.environ.get("CUDA_VISIBLE_DEVICES") != "", "the workers would inherit that there are no GPUs"
        assert not [name for name in os.environ if name.startswith(("PMI", "OMPI", "SLURM"))]
        if has("slow-constructor"):
            time.sleep(600)
        self._groups, self._indices = placement_groups, placement_bundle_indices
        extension = kwargs.get("ray_worker_extension_cls", "tensorrt_llm.llmapi.rlhf_utils.WorkerExtension")
        super().__init__(*args, orchestrator_type="ray", **(kwargs | {"ray_worker_extension_cls": extension}))
        self._workers: list[Any] = []

    async def setup_async(self) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        assert _is_on_event_loop()
        assert self._groups and self._indices, "without them the shutdown would remove the replica's own group"
        group, indices = self._groups[0], self._indices[0]
        assert len(indices) == self._num_ranks
        if has("hang"):
            await asyncio.sleep(600)
        worker_class = ray.remote(num_cpus=0)(RayWorkerWrapper)
        self._workers = [
            worker_class.options(
                name=f"trtllm-rank-{rank}-{os.getpid()}",
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=group, placement_group_bundle_index=index
                ),
            ).remote(self._arguments["ray_worker_extension_cls"])
            for rank, index in enumerate(indices)
        ]
        names = await asyncio.gather(*(worker.registered.remote() for worker in self._workers))
        assert all("KrakenForCausalLM" in found for found in names), "the class is not registered in the Ray workers"
        await asyncio.to_thread(self._start, "ray")

    async def release(self, tags: list[str]) -> None:
        raise NotImplementedError

    async def resume(self, tags: list[str]) -> None:
        raise NotImplementedError

    async def collective_rpc(
        self, method: str, args: tuple[Any, ...] = (), kwargs: Any = None, unique_reply_rank: int | None = None
    ) -> list[Any]:
        raise NotImplementedError

    def shutdown(self) -> None:
        import ray

        super().shutdown()
        for worker in self._workers:
            ray.kill(worker)
        self._workers.clear()

    def _abort(self, request_id: int) -> None:
        import ray

        assert not _is_on_event_loop(), "abort waits for the leader, and would stop every stream"
        if self._workers:
            ray.get(self._workers[0].ping.remote())
        super()._abort(request_id)


class RayWorkerWrapper:
    """A rank's actor. It learns of model classes only through its extension class."""

    def __init__(self, extension_class: str):
        from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING

        module, name = extension_class.rsplit(".", 1)
        extension = getattr(importlib.import_module(module), name)
        taken = [attribute for attribute in vars(extension) if not attribute.startswith("__")]
        assert not taken, f"the extension defines {taken}"
        self._names = sorted(MODEL_CLASS_MAPPING)

    def registered(self) -> list[str]:
        return self._names

    def ping(self) -> None:
        pass
