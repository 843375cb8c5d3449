"""Choose the all-reduce backends of an engine on CUDA devices: NCCL, or peer memory where it works and is faster.

All ranks call this when the model has been loaded, exchange their findings over the store, and come to the same choice.
For some numbers of tokens the model's first layers are timed with each backend, in a CUDA graph if the engine uses
graphs, so that only the part of an all-reduce counts that attention does not hide. The slowest rank's time counts.
"""

import functools
import importlib.util
import json
import logging
import math
import socket
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from kraken.config import AllReduceSetting
from kraken.engine.distributed.device_group import DeviceGroup
from kraken.engine.distributed.peer_all_reduce import (
    Backend,
    P2pStore,
    PeerChannel,
    num_buffer_bytes,
    num_memory_bytes,
)
from kraken.engine.distributed.peer_memory import share_memory
from kraken.engine.distributed.worker_group import WorkerError

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""A file that differs between hosts of one name."""
MIN_COPIED_BYTES = 128 * 1024
"""Smallest message for which copy engines are timed. Below this size a kernel's stores are as fast, and a graph without
copies has two nodes fewer to launch; the timings in this file do not include launches."""
NUM_TIMINGS = 7
"""Timings of each backend, of which the shortest counts."""
POLL_S = 0.0005
Layers = Callable[[Tensor], None]
"""Runs some layers on states [W, T, D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageShapes:
    """The tensors that an engine all-reduces and gathers."""

    num_ways: int
    """Ways of each device."""
    width: int
    max_tokens: int
    num_columns: int
    """Columns of the logits that each device computes."""
    dtype: torch.dtype
    is_kraken: bool


def choose_backend(
    group: DeviceGroup, store: Store, device: torch.device, shapes: MessageShapes, layers: Layers,
    setting: AllReduceSetting, is_graphed: bool, timeout_s: float,
) -> None:  # fmt: skip
    """Have the group use the backends that `engine.all_reduce` asks for. All ranks call this at the same time.

    Args:
        store: shared by the ranks of this engine alone.
        is_graphed: most all-reduces will be in CUDA graphs.
        timeout_s: time after which a rank counts as stuck.
    Raises:
        WorkerError: the setting is `p2p`, and peer memory does not work here.
        RuntimeError: a rank is stuck.
    """
    if device.type != "cuda" or setting == "nccl":
        return
    channel, problem = open_channel(group, store, device, shapes, setting, timeout_s)
    if channel is None:
        if setting == "p2p":
            raise WorkerError(f"engine.all_reduce=p2p does not work here: {problem}; choose auto or nccl")
        if group.rank == 0:
            log.info("all-reduce over %d devices: nccl, since peer memory does not work: %s", group.size, problem)
        return
    backends = _candidates(group, shapes, setting)
    sizes = candidate_sizes(shapes.max_tokens)
    if len(backends) == 1:
        group.use_peers(channel, lambda num_tokens: backends[0])
        if group.rank == 0:
            log.info("all-reduce over %d devices: %s", group.size, backends[0])
        return
    times = {
        backend: [
            _time_layers(group, channel, backend, device, shapes, layers, size, is_graphed, timeout_s)
            if backend != "copy_engine" or size * shapes.width * shapes.dtype.itemsize >= MIN_COPIED_BYTES
            else math.inf
            for size in sizes
        ]
        for backend in backends
    }
    times_by_rank = _Ranks(group, store).all_gather("times", times)
    slowest = {
        backend: [max(values) for values in zip(*(times[backend] for times in times_by_rank), strict=True)]
        for backend in backends
    }
    chosen = [min(backends, key=lambda backend: slowest[backend][index]) for index in range(len(sizes))]
    group.use_peers(channel, functools.partial(backend_for, sizes, chosen))
    if group.rank == 0:
        log.info("all-reduce over %d devices: %s", group.size, describe(sizes, chosen, slowest))


def candidate_sizes(largest: int) -> list[int]:
    """Powers of two below `largest`, and `largest`."""
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(min(2 * sizes[-1], largest))
    return sizes


def backend_for(sizes: list[int], backends: list[Backend], num_tokens: int) -> Backend:
    """The backend that was chosen for the next larger number of tokens."""
    return backends[min(bisect_left(sizes, num_tokens), len(backends) - 1)]


def describe(sizes: list[int], chosen: list[Backend], times: dict[Backend, list[float]]) -> str:
    """The choice in one line, with the times of all backends at the smallest and the largest number of tokens."""
    ranges = []
    for index, (size, backend) in enumerate(zip(sizes, chosen, strict=True)):
        if index + 1 == len(sizes) or chosen[index + 1] != backend:
            ranges.append(f"{backend} up to {size} tokens")
    ends = [
        f"{size} tokens "
        + ", ".join(f"{name} {values[index] * 1e6:.1f}" for name, values in times.items() if values[index] < math.inf)
        for index, size in ((0, sizes[0]), (-1, sizes[-1]))
    ]
    return f"{', '.join(ranges)} (microseconds of the first layers: {'; '.join(ends)})"


def _candidates(group: DeviceGroup, shapes: MessageShapes, setting: AllReduceSetting) -> list[Backend]:
    backends: list[Backend] = ["nccl", "p2p_store"] if setting == "auto" else ["p2p_store"]
    # only all-reduces in flight during attention are copied
    return [*backends, "copy_engine"] if shapes.is_kraken and not group.is_blocking else backends


class _Ranks:
    """Exchanges values between all ranks over the store."""

    def __init__(self, group: DeviceGroup, store: Store):
        self.kernels, self.rank, self.size, self.store = group.kernels, group.rank, group.size, store

    def all_gather(self, name: str, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks. Waits for all of them."""
        self.store.set(f"all_reduce/{name}/{self.rank}", json.dumps(value))
        return [json.loads(self.store.get(f"all_reduce/{name}/{rank}")) for rank in range(self.size)]


def open_channel(
    group: DeviceGroup, store: Store, device: torch.device, shapes: MessageShapes, setting: AllReduceSetting,
    timeout_s: float,
) -> tuple[PeerChannel | None, str]:  # fmt: skip
    """Share memory between all ranks and try it out; or None and the reason why that does not work, on every rank."""
    ranks = _Ranks(group, store)
    place = {
        "problem": _problem(shapes.dtype),
        "host": [socket.gethostname(), BOOT_ID.read_text() if BOOT_ID.exists() else ""],
        "gpu": str(torch.cuda.get_device_properties(device).uuid),
    }
    places = ranks.all_gather("places", place)
    for rank, other in enumerate(places):
        if other["problem"]:
            return None, f"rank {rank}: {other['problem']}"
    if any(other["host"] != place["host"] for other in places):
        return None, "the devices are on different hosts"
    if setting == "auto" and len({other["gpu"] for other in places}) < ranks.size:
        return None, "several ranks share a GPU"
    from kraken.engine.kernels.cuda.peer import PeerKernels  # imports Triton, which only CUDA has

    channel, problem = None, ""
    try:
        buffer_bytes = num_buffer_bytes(shapes.max_tokens, shapes.width, shapes.num_columns, shapes.dtype)
        num_bytes = num_memory_bytes(ranks.size, buffer_bytes)
        memory = share_memory(store, ranks.rank, ranks.size, device, num_bytes, f"kraken-{id(store)}")
        channel = PeerChannel(memory, ranks.rank, buffer_bytes, shapes.dtype, PeerKernels)
    except Exception as error:  # drivers, links and containers fail in many ways
        problem = f"{type(error).__name__}: {error}"
    problems = ranks.all_gather("opened", problem)
    if channel is not None and not any(problems):  # otherwise the ranks would wait for one that has no channel
        try:
            _require_all_reduce(channel, ranks, device, shapes, timeout_s)
        except Exception as error:
            channel.release()
            problem = f"{type(error).__name__}: {error}"
        problems = ranks.all_gather("tried", problem)
    for rank, problem in enumerate(problems):
        if problem:
            return None, f"rank {rank}: {problem.splitlines()[0]}"
    return channel, ""


def _problem(dtype: torch.dtype) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"there are no kernels for {dtype}"
    return ""


def _require_all_reduce(
    channel: PeerChannel, ranks: _Ranks, device: torch.device, shapes: MessageShapes, timeout_s: float
) -> None:
    """Raises: RuntimeError: signals do not arrive, or parts arrive wrong."""
    all_reduce = P2pStore(ranks.kernels, channel)
    for message in range(4):  # every buffer twice
        own = torch.full((1, shapes.width), float(ranks.rank + message), dtype=shapes.dtype, device=device)
        total = all_reduce.all_reduce(own)
        synchronize(device, timeout_s)
        expected = sum(rank + message for rank in range(ranks.size))
        if not bool((total == expected).all()):
            raise RuntimeError(f"an all-reduce over peer memory gave {total[0, 0].item()} instead of {expected}")
    channel.end_pass()
    synchronize(device, timeout_s)


def _time_layers(
    group: DeviceGroup, channel: PeerChannel, backend: Backend, device: torch.device, shapes: MessageShapes,
    layers: Layers, num_tokens: int, is_graphed: bool, timeout_s: float,
) -> float:  # fmt: skip
    """Seconds of the layers with a backend."""
    group.use_peers(channel, lambda num_tokens: backend)
    x_WTD = torch.randn(shapes.num_ways, num_tokens, shapes.width, dtype=shapes.dtype, device=device)

    def work() -> None:
        layers(x_WTD)
        group.end_pass()

    try:
        with torch.inference_mode():
            run = capture_graph(work, device, timeout_s) if is_graphed else work
            return min(_time(run, device, timeout_s) for _ in range(NUM_TIMINGS))
    except RuntimeError:
        group.abort()
        raise


def capture_graph(work: Callable[[], None], device: torch.device, timeout_s: float) -> Callable[[], None]:
    """Capture the work in a CUDA graph; returns its replay. With several ranks, all of them do it at the same time."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    synchronize(device, timeout_s)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    graph.replay()
    return graph.replay


def _time(work: Callable[[], object], device: torch.device, timeout_s: float) -> float:
    """Seconds of the work on the device."""
    synchronize(device, timeout_s)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()  # aligns the ranks: they start it at different times, and finish it together
    start.record()
    work()
    end.record()
    synchronize(device, timeout_s)
    return start.elapsed_time(end) * 1e-3


def synchronize(device: torch.device, timeout_s: float) -> None:
    """Wait for the current stream.

    Raises:
        RuntimeError: it took longer than `timeout_s`, because another rank is stuck.
    """
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    ends_at = time.monotonic() + timeout_s
    while not event.query():
        if time.monotonic() > ends_at:
            raise RuntimeError(f"the devices did not answer each other within {timeout_s:.0f} s")
        time.sleep(POLL_S)
