"""How the CUDA devices of an engine add up: by NCCL, or over peer memory where that works and is faster.

Every rank takes the same decision, from what all have said over the store. For each of a few numbers of tokens the
model's first layers are timed with each method, in a CUDA graph where the engine uses them, so that what is hidden
behind attention does not count; the slowest rank's time does.
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

from kraken.config import Sums
from kraken.engine.distributed.all_reduce import Backend, DeviceGroup
from kraken.engine.distributed.peer_all_reduce import PeerAllReduce, num_buffer_bytes, num_memory_bytes
from kraken.engine.distributed.peer_memory import share_memory
from kraken.engine.distributed.rendezvous import WorkerError

log = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MIN_COPIED_BYTES = 128 * 1024
"""Of a message that copy engines bring. A smaller one is written as fast, and a graph then has fewer nodes to launch,
which the times below do not show."""
NUM_TIMES = 7
"""Of which the shortest counts."""
POLL_S = 0.0005
Layers = Callable[[Tensor], None]
"""Some layers over states [W, T, D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageShapes:
    """What an engine adds up."""

    num_ways: int
    """Ways held by each device."""
    width: int
    max_tokens: int
    num_columns: int
    """Columns of the logits that each device computes."""
    dtype: torch.dtype
    is_kraken: bool


def choose_backend(
    group: DeviceGroup, store: Store, device: torch.device, shapes: MessageShapes, layers: Layers, setting: Sums,
    is_graphed: bool, timeout_s: float,
) -> None:  # fmt: skip
    """Have the group compute its sums in the way that is wanted, or in the fastest; at the same time on every rank.

    Args:
        store: of the ranks alone.
        is_graphed: whether most sums will be in CUDA graphs.
        timeout_s: after which a rank counts as stuck.
    Raises:
        RanksError: peer memory is wanted and cannot be had.
        RuntimeError: a rank is stuck.
    """
    if device.type != "cuda" or setting == "nccl":
        return
    peers, problem = open_peers(group, store, device, shapes, setting, timeout_s)
    if peers is None:
        if setting == "peers":
            raise WorkerError(f"engine.sums=peers does not work here: {problem}; choose auto or nccl")
        if group.rank == 0:
            log.info("sums over %d devices: NCCL, since peer memory cannot be used: %s", group.size, problem)
        return
    backends = _candidates(group, shapes, setting)
    sizes = sizes_up_to(shapes.max_tokens)
    if len(backends) == 1:
        group.use_peers(peers, lambda num_tokens: backends[0])
        if group.rank == 0:
            log.info("sums over %d devices: peer memory", group.size)
        return
    times = {
        backend: [
            _seconds(group, peers, backend, device, shapes, layers, size, is_graphed, timeout_s)
            if backend != "copied" or size * shapes.width * shapes.dtype.itemsize >= MIN_COPIED_BYTES
            else math.inf
            for size in sizes
        ]
        for backend in backends
    }
    answers = _Ranks(group, store).exchange("times", times)
    slowest = {
        backend: [max(values) for values in zip(*(of_rank[backend] for of_rank in answers), strict=True)]
        for backend in backends
    }
    chosen = [min(backends, key=lambda backend: slowest[backend][index]) for index in range(len(sizes))]
    group.use_peers(peers, functools.partial(backend_for, sizes, chosen))
    if group.rank == 0:
        log.info("sums over %d devices: %s", group.size, describe(sizes, chosen, slowest))


def sizes_up_to(most: int) -> list[int]:
    """Powers of two until one is at least `most`, which takes its place."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


def backend_for(sizes: list[int], backends: list[Backend], num_tokens: int) -> Backend:
    """That of the next larger number of tokens that was timed."""
    return backends[min(bisect_left(sizes, num_tokens), len(backends) - 1)]


def describe(sizes: list[int], chosen: list[Backend], times: dict[Backend, list[float]]) -> str:
    """One line: what is used for how many tokens, and what each method took at the ends."""
    ranges = []
    for index, (size, backend) in enumerate(zip(sizes, chosen, strict=True)):
        if index + 1 == len(sizes) or chosen[index + 1] != backend:
            ranges.append(f"{_name(backend)} up to {size} tokens")
    ends = [
        f"{size} tokens "
        + ", ".join(f"{_name(m)} {values[index] * 1e6:.1f}" for m, values in times.items() if values[index] < math.inf)
        for index, size in ((0, sizes[0]), (-1, sizes[-1]))
    ]
    return f"{', '.join(ranges)} (microseconds of some layers: {'; '.join(ends)})"


def _name(backend: Backend) -> str:
    return "NCCL" if backend == "library" else f"peer memory ({backend})"


def _candidates(group: DeviceGroup, shapes: MessageShapes, setting: Sums) -> list[Backend]:
    if not group.reduces:  # only logits are gathered
        return ["direct"]
    backends: list[Backend] = ["library", "direct"] if setting == "auto" else ["direct"]
    return [*backends, "copied"] if shapes.is_kraken and group.overlap == "overlapped" else backends


class _Ranks:
    """What every rank says to all others."""

    def __init__(self, group: DeviceGroup, store: Store):
        self.rank, self.size, self.store = group.rank, group.size, store

    def exchange(self, what: str, value: Any) -> list[Any]:
        """Every rank's value, in their order; nobody goes on before all have spoken."""
        self.store.set(f"sums/{what}/{self.rank}", json.dumps(value))
        return [json.loads(self.store.get(f"sums/{what}/{rank}")) for rank in range(self.size)]


def open_peers(
    group: DeviceGroup, store: Store, device: torch.device, shapes: MessageShapes, setting: Sums, timeout_s: float
) -> tuple[PeerAllReduce | None, str]:
    """Sums over memory that all ranks of the group reach, or why there are none; at the same time on every rank."""
    ranks = _Ranks(group, store)
    own = {
        "problem": _problem(shapes.dtype),
        "host": [socket.gethostname(), BOOT_ID.read_text() if BOOT_ID.exists() else ""],
        "gpu": str(torch.cuda.get_device_properties(device).uuid),
    }
    answers = ranks.exchange("places", own)
    for rank, there in enumerate(answers):
        if there["problem"]:
            return None, f"rank {rank}: {there['problem']}"
    if any(there["host"] != own["host"] for there in answers):
        return None, "the devices are on different hosts"
    if setting == "auto" and len({there["gpu"] for there in answers}) < ranks.size:
        return None, "several ranks share a GPU"
    from kraken.engine.distributed.signals import PeerKernels  # which imports Triton

    peers, problem = None, ""
    try:
        buffer_bytes = num_buffer_bytes(shapes.max_tokens, shapes.width, shapes.num_columns, shapes.dtype)
        num_bytes = num_memory_bytes(ranks.size, buffer_bytes)
        name = f"kraken-{id(ranks.store)}"
        memory = share_memory(ranks.store, ranks.rank, ranks.size, device, num_bytes, name)
        peers = PeerAllReduce(memory, ranks.rank, buffer_bytes, shapes.dtype, PeerKernels)
    except Exception as error:  # of many kinds: drivers, links and containers differ
        problem = f"{type(error).__name__}: {error}"
    problems = ranks.exchange("opened", problem)
    if peers is not None and not any(problems):  # nobody waits for a rank that is not there
        try:
            _require_all_reduce(peers, ranks, device, shapes, timeout_s)
        except Exception as error:
            peers.release()
            problem = f"{type(error).__name__}: {error}"
        problems = ranks.exchange("tried", problem)
    for rank, problem in enumerate(problems):
        if problem:
            return None, f"rank {rank}: {problem.splitlines()[0]}"
    return peers, ""


def _problem(dtype: torch.dtype) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"sums of {dtype} are left to NCCL"
    return ""


def _require_all_reduce(
    peers: PeerAllReduce, ranks: _Ranks, device: torch.device, shapes: MessageShapes, timeout_s: float
) -> None:
    """Raises: RuntimeError: signals do not arrive, or not what was sent."""
    for turn in range(4):  # both slots, twice
        own = torch.full((1, shapes.width), float(ranks.rank + turn), dtype=shapes.dtype, device=device)
        total = peers.all_reduce(own)
        finish(device, timeout_s)
        expected = sum(rank + turn for rank in range(ranks.size))
        if not bool((total == expected).all()):
            raise RuntimeError(f"a sum over peer memory gave {total[0, 0].item()} and not {expected}")
    peers.end_pass()
    finish(device, timeout_s)


def _seconds(
    group: DeviceGroup, peers: PeerAllReduce, backend: Backend, device: torch.device, shapes: MessageShapes,
    layers: Layers, num_tokens: int, is_graphed: bool, timeout_s: float,
) -> float:  # fmt: skip
    """Of the layers with a method."""
    group.use_peers(peers, lambda num_tokens: backend)
    x_WTD = torch.randn(shapes.num_ways, num_tokens, shapes.width, dtype=shapes.dtype, device=device)

    def work() -> None:
        layers(x_WTD)
        group.end_pass()

    try:
        with torch.inference_mode():
            run = graph_of(work, device, timeout_s) if is_graphed else work
            return min(_time_of(run, device, timeout_s) for _ in range(NUM_TIMES))
    except RuntimeError:
        group.abort()
        raise


def graph_of(work: Callable[[], None], device: torch.device, timeout_s: float) -> Callable[[], None]:
    """What replays the work as a CUDA graph; with several ranks, at the same time on all of them."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    finish(device, timeout_s)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    graph.replay()
    return graph.replay


def _time_of(work: Callable[[], object], device: torch.device, timeout_s: float) -> float:
    finish(device, timeout_s)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()  # the ranks come to it at different times, and leave it together
    start.record()
    work()
    end.record()
    finish(device, timeout_s)
    return start.elapsed_time(end) * 1e-3


def finish(device: torch.device, timeout_s: float) -> None:
    """Wait for what the current stream has been told.

    Raises:
        RuntimeError: it took longer, because another rank is stuck.
    """
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    ends_at = time.monotonic() + timeout_s
    while not event.query():
        if time.monotonic() > ends_at:
            raise RuntimeError(f"the devices did not answer each other within {timeout_s:.0f} s")
        time.sleep(POLL_S)
