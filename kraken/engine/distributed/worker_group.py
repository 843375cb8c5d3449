"""One model on several devices, a process each: the leader runs the scheduler, the others run what it says.

Every rank holds its part of the weights, and of the cache the keys and values of its own heads; blocks are the same
everywhere. For every step the leader tells the others its chunks, all run the same forward pass, and the leader gets
the logits.

`python -m kraken.engine.distributed.worker_group` is a follower that the leader starts; one that exists already calls
`follow`.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import Store, TCPStore

from kraken.config import ConfigError, EngineConfig, ModelConfig
from kraken.engine.batch import Chance, Chunk, ForwardOutput, GraphSizes
from kraken.engine.distributed.all_reduce import DeviceGroup, join_group
from kraken.engine.distributed.choose_backend import MessageShapes, choose_backend
from kraken.engine.distributed.control_channel import Connection, ConnectionLost, Kind, pack_step, unpack_step
from kraken.engine.distributed.partition import Part, Weights, empty_weights, random_weights, read_weights, weights_of
from kraken.engine.distributed.rendezvous import JoinToken, Rendezvous, WorkerError, WorkerGroup, connect
from kraken.engine.model.network import Network
from kraken.engine.model_runner import ModelRunner
from kraken.model import Kraken


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSource:
    """Where an engine's weights come from: an exchange folder that every rank reads, a model in the leader's memory, of
    which it sends each rank its part, or where neither is given, random numbers for measuring time.
    """

    config: ModelConfig
    folder: Path | None = None
    model: Kraken | None = None

    def weights(self, part: Part, dtype: torch.dtype, device: torch.device) -> Weights:
        """The leader's."""
        if self.folder is not None:
            return read_weights(self.folder, part, dtype, device)
        return random_weights(part, dtype, device) if self.model is None else weights_of(self.model, part)


class DistributedRunner(ModelRunner):
    """The leader's runner, which has the other ranks run everything too."""

    def __init__(self, network: Network, num_blocks: int, workers: WorkerGroup, config: EngineConfig):
        super().__init__(network, num_blocks, config.tokens_per_block)
        self._workers, self._config = workers, config
        workers.watch(network.group.abort)

    @property
    def failure(self) -> str:
        return self._workers.failure

    def record(self, sizes: GraphSizes) -> None:
        """See `ModelRunner.record`.

        Raises:
            RanksError: a rank failed, this one included, or the recording takes too long.
        """
        with self._with_reason():
            self._begin(self._config.startup_timeout_s)
            super().record(sizes)
            self._end()

    def forward(self, chunks: Sequence[Chunk], chances: Sequence[Chance] = ()) -> ForwardOutput:
        """See `ModelRunner.forward`; `join` must follow.

        Raises:
            RanksError: a rank failed, this one included; from then on nothing runs.
        """
        with self._with_reason():
            self._begin(self._config.collective_timeout_s)
            self._workers.send(Kind.STEP, pack_step(chunks))
            return super().forward(chunks, chances)

    def join(self) -> None:
        """See `ModelRunner.join`: what is launched for the first time may have to be loaded, which may wait for the
        whole device, and hold whoever would release it from a rank that is gone.

        Raises:
            RanksError: as `forward`.
        """
        with self._with_reason():
            self._end()

    def _begin(self, timeout_s: float) -> None:
        """What all ranks compute at the same time."""
        self._require_healthy()
        if self.is_asynchronous:  # a device waits for another for ever
            self._workers.deadline = time.monotonic() + timeout_s

    def _end(self) -> None:
        if self.is_asynchronous:
            torch.cuda.current_stream(self.network.device).synchronize()
            self._workers.deadline = None
            self._require_healthy()

    @contextlib.contextmanager
    def _with_reason(self) -> Iterator[None]:
        try:
            yield
        except WorkerError:
            raise
        except Exception as error:
            raise WorkerError(self._workers.failure_after(error)) from error

    def close(self) -> None:
        """End the other ranks."""
        self.drop_graphs()  # whoever watches may be breaking off sums that are in them
        self._workers.stop()
        super().close()

    def _require_healthy(self) -> None:
        if self.failure:
            raise WorkerError(self.failure)


@dataclass(frozen=True, slots=True)
class DistributedModel:
    """Everything but the cache of an engine on several devices, whose size depends on what memory is left now."""

    network: Network
    workers: WorkerGroup

    def open(self, num_blocks: int, config: EngineConfig, graph_sizes: GraphSizes | None) -> DistributedRunner:
        """Make every rank's cache, and on CUDA record their graphs.

        Raises:
            RanksError: one of them lacks the memory, or failed.
        """
        sizes = None if graph_sizes is None else dataclasses.asdict(graph_sizes)
        cache = {"num_blocks": num_blocks, "tokens_per_block": config.tokens_per_block}
        try:
            self.workers.send_json(cache | {"graph_sizes": sizes})
            self.workers.wait_until_ready(config.startup_timeout_s)
            runner = DistributedRunner(self.network, num_blocks, self.workers, config)
            if graph_sizes is not None:
                runner.record(graph_sizes)
            return runner
        except BaseException:
            self.workers.end()
            raise


def load_distributed(
    source: WeightSource,
    num_ids: int,
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    rendezvous: Rendezvous | None,
) -> DistributedModel:
    """Meet the other ranks and load the weights, everybody at once.

    Args:
        meeting: to which the other ranks are invited already; None starts them here.
    Raises:
        ConfigError: the model cannot be divided so, or GPUs are missing.
        RanksError: a rank did not come, or failed.
    """
    size = config.num_devices
    part = Part(source.config, 0, size)
    device = device_of(0, size, device.type, are_all_here=rendezvous is None)
    num_threads = threads_per_rank(config)
    if config.sums != "auto" and device.type == "cpu":
        raise ConfigError(f"engine.sums={config.sums} is for CUDA, and this engine runs on a CPU; leave it out")
    if rendezvous is None:
        rendezvous = Rendezvous(size)
        rendezvous.launch(num_threads)
    if rendezvous.num_devices != size:
        raise ConfigError(
            f"engine.num_devices={size}, but {rendezvous.num_devices} ranks were invited; make them equal"
        )
    workers = rendezvous.wait_for_workers(config.startup_timeout_s)
    try:
        listener = socket.create_server((rendezvous.host, 0))
        port = listener.getsockname()[1]
        timeout = timedelta(seconds=config.collective_timeout_s)
        store = TCPStore(
            rendezvous.host, port, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        setup = {
            "size": size,
            "store_host": rendezvous.host,
            "store_port": port,
            "model": dataclasses.asdict(source.config),
            "folder": None if source.folder is None else str(source.folder.resolve()),
            "is_sent": source.model is not None,
            "num_ids": num_ids,
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "quantization": config.quantization,
            "num_threads": num_threads,
            "timeout_s": config.collective_timeout_s,
            "overlap": config.overlap,
            "sums": config.sums,
            "max_step_tokens": config.max_step_tokens,
            "cuda_graphs": config.cuda_graphs,
        }
        workers.send_json(setup)
        group = _join(store, part, rendezvous.host, device, setup)
        weights = source.weights(part, dtype, device)
        if source.model is not None:
            for rank in range(1, size):
                for _, weight in sorted(weights_of(source.model, Part(source.config, rank, size)).items()):
                    group.send(weight, rank)
        network = Network(part, weights, num_ids, group, config.quantization)
        workers.wait_until_ready(config.startup_timeout_s)
        if device.type == "cuda":
            _choose_backend(store, network, setup)
            workers.wait_until_ready(config.startup_timeout_s)
    except BaseException as error:
        if isinstance(error, RuntimeError) and not isinstance(error, WorkerError):
            raise WorkerError(_reason_of(workers, error)) from error
        workers.end()
        raise
    return DistributedModel(network, workers)


def run_worker(join_token: JoinToken) -> None:
    """Be a rank of an engine until the leader ends it.

    Raises:
        ConnectionLost: the leader is gone.
        Exception: whatever failed here; the leader has been told.
    """
    connection = connect(join_token)
    group, runner = DeviceGroup(), None
    try:
        network, store, setup = _prepare(connection, join_token.rank)
        group = network.group
        if network.device.type == "cuda":
            _choose_backend(store, network, setup)
            connection.send_json({"done": True})
        cache = connection.receive_json()
        runner = ModelRunner(network, cache["num_blocks"], cache["tokens_per_block"])
        connection.send_json({"done": True})
        if cache["graph_sizes"] is not None:
            runner.record(GraphSizes(**cache["graph_sizes"]))
        while (frame := connection.receive(spins=runner.is_asynchronous))[0] is Kind.STEP:
            runner.forward(unpack_step(frame[1]))
    except ConnectionLost:
        if runner is not None:
            runner.drop_graphs()  # or NCCL would wait for them
        group.abort()  # its device may wait for the leader's
        raise
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send_json({"error": f"{type(error).__name__}: {error}"})
        raise
    finally:
        connection.close()
        if runner is not None:
            runner.close()


def _prepare(connection: Connection, rank: int) -> tuple[Network, Store, dict[str, Any]]:
    """The group and the weights, as the leader says."""
    setup = connection.receive_json()
    torch.set_num_threads(setup["num_threads"])
    part = Part(ModelConfig(**setup["model"]), rank, setup["size"])
    device = device_of(rank, part.size, setup["device"], are_all_here=False)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = getattr(torch, setup["dtype"])
    store = TCPStore(setup["store_host"], setup["store_port"], None, False, timedelta(seconds=setup["timeout_s"]))
    group = _join(store, part, connection.local_address, device, setup)
    if setup["is_sent"]:
        weights = empty_weights(part, dtype, device)
        for _, weight in sorted(weights.items()):
            group.receive(weight, 0)
    elif setup["folder"] is not None:
        weights = read_weights(Path(setup["folder"]), part, dtype, device)
    else:
        weights = random_weights(part, dtype, device)
    network = Network(part, weights, setup["num_ids"], group, setup["quantization"])
    connection.send_json({"done": True})
    return network, store, setup


def _join(store: Store, part: Part, address: str, device: torch.device, setup: dict[str, Any]) -> DeviceGroup:
    leaves_room = part.config.architecture == "kraken" and setup["overlap"] == "overlapped"
    message_bytes = setup["max_step_tokens"] * part.config.width * getattr(torch, setup["dtype"]).itemsize
    timeout_s, overlap = setup["timeout_s"], setup["overlap"]
    return join_group(store, part.rank, part.size, address, device, timeout_s, overlap, leaves_room, message_bytes)


def _choose_backend(store: Store, network: Network, setup: dict[str, Any]) -> None:
    """On CUDA, at the same time on every rank; see `choose_sums`."""
    part = network.part
    shapes = MessageShapes(
        num_ways=len(part.ways),
        width=part.config.width,
        max_tokens=setup["max_step_tokens"],
        num_columns=len(part.head_rows(setup["num_ids"])),
        dtype=network.dtype,
        is_kraken=part.config.architecture == "kraken",
    )
    choose_backend(
        network.group, store, network.device, shapes, network.first_layers,
        setup["sums"], setup["cuda_graphs"], setup["timeout_s"],
    )  # fmt: skip


def _reason_of(workers: WorkerGroup, error: Exception) -> str:
    """A rank's own words where it has some."""
    try:
        workers.wait_until_ready(1.0)
    except WorkerError as reason:
        if "was not ready" not in str(reason):
            return str(reason)
    finally:
        workers.end()
    return f"the devices do not reach each other: {error}"


def device_of(rank: int, size: int, kind: str, are_all_here: bool) -> torch.device:
    """The device of a rank: its own GPU of this host's, or the only one that its process sees.

    Raises:
        ConfigError: GPUs are missing.
    """
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if are_all_here and count < size:
        raise ConfigError(
            f"engine.num_devices={size}, but this process sees {count} GPUs; lower it, or choose engine.device=cpu"
        )
    return torch.device("cuda", rank if count >= size else 0)


def threads_per_rank(config: EngineConfig) -> int:
    """CPU threads of each rank."""
    return max(1, (config.num_threads or len(os.sched_getaffinity(0))) // config.num_devices)


def main() -> None:
    """A follower that the leader started: its invitation is a line of stdin, and the end of stdin is the leader's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the leader, who then ends us
    join_token = JoinToken.from_json(sys.stdin.readline())
    threading.Thread(target=_end_with_the_leader, daemon=True).start()
    status = 0
    try:
        run_worker(join_token)
    except Exception:  # the leader says it
        status = 1
    os._exit(status)  # whatever a process group still waits for


def _end_with_the_leader() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
