"""What an all-reduce costs a layer: Kraken's first layers on several devices, with every backend, against none.

    python -m benchmarks.layers --sizes 1.3B 6.7B --device cuda --dtype bfloat16          # GPUs of one host
    python -m benchmarks.layers --sizes 25M --prompts 128 --rounds 5                      # two CPU processes over gloo
    python -m benchmarks.layers --sizes tiny --prompts 32 --rounds 1 --layers 3           # does it run?

Each device is a process with random weights of a few layers, of the shapes of `benchmarks.ttft`. On CUDA each way is a
graph, replayed twice in a row; all ways take turns, and the ranks begin each turn together. Where `benchmarks.ttft` has
whole requests, this has nothing but layers, and takes a minute.

The last line is JSON: rows of size, prompt, microseconds of one layer for each way (medians, of the slowest rank, since
without all-reduces no rank waits for it), and `exposed`, for each overlapped way its time above none over that of
`blocking_nccl` above none. The ways:

    none                        no all-reduces, so that the result is WRONG
    blocking_nccl               NCCL or gloo, waited for; on CUDA NCCL may take every multiprocessor here
    nccl                        the same in flight while attention computes, NCCL on few multiprocessors
    p2p_store, copy_engine      over the memory of peers, see `docs/latency.md`
"""

import argparse
import dataclasses
import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from benchmarks.ttft import SIZES, shapes
from benchmarks.without_all_reduce import GroupWithoutAllReduce
from kraken.engine.distributed.choose_backend import MessageShapes, capture_graph, open_channel
from kraken.engine.distributed.device_group import DeviceGroup, join_group
from kraken.engine.distributed.partition import Part, random_weights
from kraken.engine.distributed.peer_all_reduce import Backend
from kraken.engine.kernels.choose import choose_kernels
from kraken.engine.model.network import Network

PEER_WAYS = ("p2p_store", "copy_engine")
WAYS: dict[str, tuple[str, Backend]] = {
    "none": ("none", "nccl"),
    "blocking_nccl": ("blocking", "nccl"),
    "nccl": ("overlapped", "nccl"),
    "p2p_store": ("overlapped", "p2p_store"),
    "copy_engine": ("overlapped", "copy_engine"),
}
"""Name -> mode and backend."""
TIMEOUT_S = 120.0


class Rank:
    """One device's layers of a size, and what they take."""

    def __init__(self, rank: int, args: argparse.Namespace, store: Store, size: str, turns: Any):
        self._args, self._rank, self._turns = args, rank, turns
        dtype = getattr(torch, args.dtype)
        self._device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
        shape = dataclasses.replace(
            shapes(size, args.devices, max(args.prompts), args.vocabulary)["kraken"], num_layers=args.layers
        )
        self.part = Part(shape, rank, args.devices)
        message_bytes = max(args.prompts) * shape.width * dtype.itemsize

        def group(mode: str) -> DeviceGroup:
            own, is_blocking = PrefixStore(f"{size}/{mode}", store), mode == "blocking"
            return join_group(
                choose_kernels(self._device, dtype), own, rank, args.devices, "127.0.0.1", self._device, TIMEOUT_S,
                is_blocking, leaves_room=mode == "overlapped", message_bytes=message_bytes,
                group_type=GroupWithoutAllReduce if mode == "none" else DeviceGroup,
            )  # fmt: skip

        def network(mode: str) -> Network:
            weights = random_weights(self.part, dtype, self._device)
            return Network(self.part, weights, args.vocabulary, group(mode), args.quantization)

        self._networks = {mode: network(mode) for mode in dict.fromkeys(mode for mode, _ in WAYS.values())}
        self._channel = None
        if args.device == "cuda":
            messages = MessageShapes(
                num_ways=len(self.part.ways),
                width=shape.width,
                max_tokens=max(args.prompts),
                num_columns=len(self.part.head_rows(args.vocabulary)),
                dtype=dtype,
                is_kraken=True,
            )
            own = PrefixStore(f"{size}/peers", store)
            overlapped = self._networks["overlapped"].group
            self._channel, problem = open_channel(overlapped, own, self._device, messages, "auto", TIMEOUT_S)
            if self._channel is None and rank == 0:
                print(f"peer memory does not work: {problem}", flush=True)

    def microseconds(self, prompt_tokens: int) -> dict[str, float]:
        """Way -> of one layer."""
        dtype = getattr(torch, self._args.dtype)
        x_WTD = torch.randn(len(self.part.ways), prompt_tokens, self.part.config.width, dtype=dtype).to(self._device)
        with torch.inference_mode():
            runs = {name: self._run(name, x_WTD) for name in WAYS if self._channel is not None or name not in PEER_WAYS}
            times: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(self._args.rounds + 1):
                for name, run in runs.items():
                    self._meet()
                    seconds = self._seconds(run)
                    if turn > 0:  # the first one warms up
                        times[name].append(seconds * 1e6 / self._args.layers)
        return {name: statistics.median(found) for name, found in times.items()}

    def close(self) -> None:
        """Nobody leaves while another still computes."""
        self._meet()
        for network in self._networks.values():
            network.group.close()

    def _run(self, name: str, x_WTD: torch.Tensor) -> Callable[[], None]:
        mode, backend = WAYS[name]
        network = self._networks[mode]
        if self._channel is not None and mode == "overlapped":
            network.group.use_peers(self._channel, lambda num_tokens: backend)

        def work() -> None:
            network.first_layers(x_WTD, self._args.layers)
            network.group.end_pass()

        return capture_graph(work, self._device, TIMEOUT_S) if self._args.device == "cuda" else work

    def _seconds(self, run: Callable[[], None]) -> float:
        if self._args.device == "cpu":
            started_at = time.perf_counter()
            run()
            return time.perf_counter() - started_at
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()  # aligns the ranks: they start it at different times, and finish it together
        start.record()
        run()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 2 * 1e-3

    def _meet(self) -> None:
        """Wait for the other ranks without a system call, so that all go on within a microsecond."""
        if self._args.device == "cuda":
            torch.cuda.synchronize()
        self._turns[self._rank] += 1
        while min(self._turns) < self._turns[self._rank]:
            if self._args.device == "cpu":  # whose cores compute
                time.sleep(0)


def measure(rank: int, port: int, args: argparse.Namespace, turns: Any, answers: Any) -> None:
    """One rank; the first answers with the rows."""
    torch.set_num_threads(1)
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    store = TCPStore("127.0.0.1", port, None, rank == 0, timedelta(seconds=TIMEOUT_S), wait_for_workers=False)
    rows = []
    for size in args.sizes:
        ours = Rank(rank, args, store, size, turns)
        for prompt_tokens in args.prompts:
            found = slowest(store, f"{size}/{prompt_tokens}", rank, args.devices, ours.microseconds(prompt_tokens))
            rows.append(row_of(size, ours.part.config.width, prompt_tokens, found))
            if rank == 0:
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        ours.close()
        del ours
    if rank == 0:
        answers.put(rows)


def slowest(store: Store, case: str, rank: int, num_ranks: int, ours: dict[str, float]) -> dict[str, float]:
    """Of each way, the time of the rank that takes longest."""
    store.set(f"times/{case}/{rank}", json.dumps(ours))
    said = [json.loads(store.get(f"times/{case}/{other}")) for other in range(num_ranks)]
    return {name: max(times[name] for times in said) for name in ours}


def row_of(size: str, width: int, prompt_tokens: int, found: dict[str, float]) -> dict[str, Any]:
    waiting = found["blocking_nccl"] - found["none"]
    exposed = {
        name: round((found[name] - found["none"]) / waiting, 3) if waiting > 0 else None
        for name, (mode, _) in WAYS.items()
        if mode == "overlapped" and name in found
    }
    times = {name: round(value, 2) for name, value in found.items()}
    return {"size": size, "width": width, "prompt_tokens": prompt_tokens, "us_per_layer": times, "exposed": exposed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["25M"])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--layers", type=int, default=12, help="of each model (12)")
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantization", choices=("none", "fp8"), default="none", help="of the linears (none)")
    parser.add_argument("--rounds", type=int, default=25)
    args = parser.parse_args()
    if args.layers < 2:
        parser.error("--layers must be 2 or more: the first layer reads no others")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    turns, answers = context.RawArray("l", args.devices), context.Queue()
    ranks = [context.Process(target=measure, args=(rank, port, args, turns, answers)) for rank in range(args.devices)]
    for process in ranks:
        process.start()
    try:
        while answers.empty():
            if any(process.exitcode for process in ranks):
                raise SystemExit("a rank failed; its error is above")
            time.sleep(0.2)
        rows = answers.get()
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(json.dumps({"device": name, "devices": args.devices, "dtype": args.dtype, "rows": rows}))


if __name__ == "__main__":
    main()
