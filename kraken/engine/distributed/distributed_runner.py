"""Rank 0 of an engine on several devices: loads the model on all ranks, and has the workers run every step too.

Every rank holds its part of the weights, and the KV cache of its own heads; blocks are numbered alike on all ranks. For
every step rank 0 sends the workers the batch, all ranks run the same forward pass, and rank 0 gets the logits.
"""

import contextlib
import dataclasses
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch._C._distributed_c10d import TCPStore

from kraken.config import ConfigError, EngineConfig
from kraken.engine.batch import ForwardOutput, GraphSizes, StepBatch
from kraken.engine.distributed.control_channel import Kind
from kraken.engine.distributed.partition import Part, weights_of
from kraken.engine.distributed.rendezvous import Rendezvous
from kraken.engine.distributed.setup import RankSetup, WeightSource, device_of, threads_per_rank
from kraken.engine.distributed.worker_group import WorkerError, WorkerGroup
from kraken.engine.model.network import Network
from kraken.engine.model_runner import ModelRunner


class DistributedRunner(ModelRunner):
    """The model runner of rank 0, which has the workers run everything too."""

    def __init__(self, network: Network, num_blocks: int, workers: WorkerGroup, config: EngineConfig):
        super().__init__(network, num_blocks, config.tokens_per_block)
        self._workers, self._config = workers, config
        workers.watch(network.group.abort)

    @property
    def failure(self) -> str:
        return self._workers.failure

    def capture_graphs(self, sizes: GraphSizes) -> None:
        """See `ModelRunner.capture_graphs`.

        Raises:
            WorkerError: a rank failed, this one included, or the capture takes too long.
        """
        with self._with_reason():
            self._begin(self._config.startup_timeout_s)
            super().capture_graphs(sizes)
            self._end()

    def forward(self, batch: StepBatch) -> ForwardOutput:
        """See `ModelRunner.forward`; `join` must follow.

        Raises:
            WorkerError: a rank failed, this one included; no later call succeeds.
        """
        with self._with_reason():
            self._begin(self._config.collective_timeout_s)
            self._workers.send(Kind.STEP, batch.to_bytes())
            return super().forward(batch)

    def join(self) -> None:
        """See `ModelRunner.join`. No kernel may be launched between `forward` and this: CUDA may block the first launch
        of a kernel until the device is idle. If a rank is gone the device never becomes idle, and the blocked launch
        also stops the watching thread, which would have freed the device.

        Raises:
            WorkerError: as `forward`.
        """
        with self._with_reason():
            self._end()

    def _begin(self, timeout_s: float) -> None:
        self._require_healthy()
        if self.is_asynchronous:  # a CUDA device would wait for another one for ever
            self._workers.deadline = time.monotonic() + timeout_s

    def _end(self) -> None:
        if self.is_asynchronous:
            torch.cuda.current_stream(self.network.device).synchronize()
            self._workers.deadline = None
            self._require_healthy()

    @contextlib.contextmanager
    def _with_reason(self) -> Iterator[None]:
        """Turn every error into a `WorkerError` with the reason of the rank that failed first."""
        try:
            yield
        except WorkerError:
            raise
        except Exception as error:
            raise WorkerError(self._workers.failure_after(error)) from error

    def close(self) -> None:
        """End the workers, and leave the group."""
        self.drop_graphs()  # before the watching thread can abort all-reduces that are in them
        self._workers.stop()
        super().close()

    def _require_healthy(self) -> None:
        if self.failure:
            raise WorkerError(self.failure)


@dataclass(frozen=True, slots=True)
class DistributedModel:
    """A model that is loaded on all ranks, but without a KV cache, whose size depends on the memory left now."""

    network: Network
    workers: WorkerGroup

    def make_runner(self, num_blocks: int, config: EngineConfig, graph_sizes: GraphSizes | None) -> DistributedRunner:
        """Make the KV cache on every rank and, on CUDA, capture the graphs.

        Raises:
            WorkerError: a rank lacks the memory, or failed.
        """
        sizes = None if graph_sizes is None else dataclasses.asdict(graph_sizes)
        cache = {"num_blocks": num_blocks, "tokens_per_block": config.tokens_per_block}
        try:
            self.workers.send_json(cache | {"graph_sizes": sizes})
            self.workers.wait_until_ready(config.startup_timeout_s)
            runner = DistributedRunner(self.network, num_blocks, self.workers, config)
            if graph_sizes is not None:
                runner.capture_graphs(graph_sizes)
            return runner
        except BaseException:
            self.workers.kill()
            raise


def load_distributed(
    source: WeightSource,
    num_ids: int,
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    rendezvous: Rendezvous | None,
) -> DistributedModel:
    """Load a model on all ranks at the same time.

    Args:
        rendezvous: where workers join that have their tokens already; None starts the workers on this host.
    Raises:
        ConfigError: the model cannot be divided so, or GPUs are missing.
        WorkerError: a rank did not connect, or failed.
    """
    size = config.num_devices
    part = Part(source.config, 0, size)
    device = device_of(0, size, device.type, on_one_host=rendezvous is None)
    if config.all_reduce != "auto" and device.type == "cpu":
        raise ConfigError(
            f"engine.all_reduce={config.all_reduce} is for CUDA, and this engine runs on a CPU; leave it out"
        )
    if rendezvous is None:
        rendezvous = Rendezvous(size)
        rendezvous.launch(threads_per_rank(config))
    if rendezvous.num_devices != size:
        raise ConfigError(
            f"engine.num_devices={size}, but the rendezvous is for {rendezvous.num_devices} ranks; make them equal"
        )
    workers = rendezvous.wait_for_workers(config.startup_timeout_s)
    try:
        listener = socket.create_server((rendezvous.host, 0))
        setup = RankSetup(
            size=size,
            store_host=rendezvous.host,
            store_port=listener.getsockname()[1],
            model=source.config,
            folder=None if source.folder is None else str(source.folder.resolve()),
            is_sent=source.model is not None,
            num_ids=num_ids,
            device=device.type,
            dtype=str(dtype).removeprefix("torch."),
            quantization=config.quantization,
            num_threads=threads_per_rank(config),
            timeout_s=config.collective_timeout_s,
            is_blocking=config.overlap == "blocking",
            all_reduce=config.all_reduce,
            max_step_tokens=config.max_step_tokens,
            cuda_graphs=config.cuda_graphs,
        )
        timeout = timedelta(seconds=setup.timeout_s)
        store = TCPStore(
            setup.store_host, setup.store_port, None, True, timeout,
            wait_for_workers=False, master_listen_fd=listener.detach(),
        )  # fmt: skip
        workers.send_json(setup.to_json())
        group = setup.join(store, 0, rendezvous.host, device, rendezvous.group_type)
        weights = source.weights(part, dtype, device)
        if source.model is not None:
            assert group.process_group is not None
            for rank in range(1, size):
                for _, weight in sorted(weights_of(source.model, Part(source.config, rank, size)).items()):
                    group.process_group.send(weight, rank)
        network = Network(part, weights, num_ids, group, config.quantization)
        workers.wait_until_ready(config.startup_timeout_s)
        if device.type == "cuda":
            setup.choose_backend(store, network)
            workers.wait_until_ready(config.startup_timeout_s)
    except BaseException as error:
        if isinstance(error, RuntimeError) and not isinstance(error, WorkerError):
            raise WorkerError(_reason_of(workers, error)) from error
        workers.kill()
        raise
    return DistributedModel(network, workers)


def _reason_of(workers: WorkerGroup, error: Exception) -> str:
    """A worker's own reason if there is one. Kills the workers."""
    try:
        workers.wait_until_ready(1.0)
    except WorkerError as reason:
        if "was not ready" not in str(reason):
            return str(reason)
    finally:
        workers.kill()
    return f"the devices do not reach each other: {error}"
