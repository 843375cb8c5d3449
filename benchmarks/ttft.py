"""Time to first token (TTFT) and per output token (TPOT) on several devices: Kraken, standard, parallel Transformer.

    python -m benchmarks.ttft --sizes 25M --prompts 128 512                       # two CPU processes over gloo
    python -m benchmarks.ttft --device cuda --dtype bfloat16 --sizes 1.3B 6.7B 13B --figure ttft.png    # GPUs over NCCL
    python -m benchmarks.ttft --device cuda --dtype bfloat16 --sizes 65B --apart      # one model in memory at a time
    python -m benchmarks.ttft --sizes tiny --prompts 32 --rounds 1                # does it run?

Random weights of the shapes of GPT-2 and GPT-3; Kraken has as many ways as there are devices, the same layers, and a
width that makes its parameters equal. Batch 1. All contestants of a size take turns (with `--apart` one after the
other, each with all its rounds); times are medians. `docs/latency.md` says what the modes are.

Before the last line, a table. The last line is JSON:

    rows                    one per size, architecture and prompt: TTFT and TPOT of each mode in ms, the time of the
                            sums alone, exposed communication, speed-up over the standard model
    speedup_geomean         of Kraken over the standard model, TTFT, over all sizes and prompts
    exposed_communication_max   of Kraken: (overlapped - none) / (blocking - none) of TTFT
"""

import argparse
import asyncio
import dataclasses
import json
import math
import multiprocessing
import socket
import statistics
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kraken import plan
from kraken.config import EngineConfig, ModelConfig
from kraken.engine.collectives import join_group
from kraken.engine.meeting import Meeting
from kraken.engine.protocol import EngineInfo, Request, SamplingParams
from kraken.engine.runner import Runner
from kraken.engine.torch_engine import TorchEngine

SIZES = {
    "tiny": (2, 128, 64),
    "25M": (8, 512, 64),
    "125M": (12, 768, 64),
    "350M": (24, 1024, 64),
    "1.3B": (24, 2048, 128),
    "6.7B": (32, 4096, 128),
    "13B": (40, 5120, 128),
    "65B": (80, 8192, 128),
}
"""Layers, width and head size of the standard model."""
MODES = {
    "standard": ("blocking", "none"),
    "parallel": ("blocking", "none"),
    "kraken": ("overlapped", "blocking", "none"),
}
NUM_SUMS_ALONE = 5
"""How often a prompt's sums are timed by themselves."""


class Contestant:
    """An engine with random weights, and how long it takes.

    Args:
        meeting: to which its other ranks are invited; None starts them on this host.
    """

    def __init__(self, name: str, shape: ModelConfig, config: EngineConfig, meeting: Meeting | None = None):
        self.name, self.shape = name, shape
        info = EngineInfo(
            name="torch",
            context_length=shape.context_length,
            num_ids=shape.vocab_size,
            eot_id=0,
            tokenizer_fingerprint="none",
        )
        self._engine = TorchEngine.from_shape(shape, info, config, meeting)
        self._loop = asyncio.Runner()
        self._num_requests = 0

    @property
    def runner(self) -> Runner:
        """What computes in this process."""
        return self._engine._runner

    def seconds(self, prompt_tokens: int, new_tokens: int = 1) -> tuple[float, float]:
        """Of one request: seconds to the first token, and for each later one."""
        self._num_requests += 1
        prompt = tuple(torch.randint(self.shape.vocab_size, (prompt_tokens,)).tolist())
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0)
        request = Request(id=str(self._num_requests), prompt_ids=prompt, sampling=sampling)

        async def times() -> list[float]:
            started_at = time.perf_counter()
            return [time.perf_counter() - started_at async for _ in self._engine.generate(request)]

        found = self._loop.run(times())
        return found[0], (found[-1] - found[0]) / max(1, len(found) - 1)

    def close(self) -> None:
        """End its processes."""
        self._loop.run(self._engine.close())
        self._loop.close()


def shapes(size: str, num_devices: int, context: int, vocabulary: int) -> dict[str, ModelConfig]:
    """Architecture -> shape, of equal parameters."""
    layers, width, head_size = SIZES[size]
    standard = ModelConfig(
        num_layers=layers,
        width=width,
        num_heads=width // head_size,
        num_ways=1,
        ffn_multiple=4,
        context_length=context,
        vocab_size=vocabulary,
        architecture="standard",
    )
    ways = dataclasses.replace(
        standard, architecture="kraken", num_ways=num_devices, num_heads=num_devices, ffn_multiple=2
    )
    budget = plan.num_parameters(standard)
    # a width in steps of 64 and head size 64, 96 or 128, where that is near enough
    aligned = plan.aligned_widths(ways, budget)[0][0]
    is_near = abs(plan.num_parameters(aligned) / budget - 1) < 0.02
    kraken = aligned if is_near else plan.matched(standard, "kraken", num_devices)
    return {"standard": standard, "parallel": dataclasses.replace(standard, architecture="parallel"), "kraken": kraken}


def sums_of(shape: ModelConfig, prompt_tokens: int) -> tuple[int, tuple[int, int, int]]:
    """How many sums the layers of a prefill need, and the shape of each."""
    layers = shape.num_layers
    count = {"kraken": layers - 1, "standard": 2 * layers, "parallel": layers}[shape.architecture]
    return count, (1, prompt_tokens, shape.width)


def sum_alone(rank: int, port: int, args: argparse.Namespace, cases: list[Any], answers: Any) -> None:
    """One rank that does nothing but sums; rank 0 answers with the median seconds of each case."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, rank == 0, timedelta(seconds=60), wait_for_workers=False)
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(device)
    group = join_group(store, rank, args.devices, "127.0.0.1", device, 60.0, "blocking", leaves_room=False)
    found = []
    for count, shape in cases:
        x = torch.zeros(shape, dtype=getattr(torch, args.dtype), device=device)
        times = []
        for _ in range(NUM_SUMS_ALONE + 1):
            started_at = time.perf_counter()
            for _ in range(count):
                group.sum(x)
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started_at)
        found.append(statistics.median(times[1:]))
    group.sum(torch.zeros(1, device=device))  # nobody leaves while another still waits
    if rank == 0:
        answers.put(found)


def sums_alone(args: argparse.Namespace, cases: list[Any]) -> list[float]:
    """Seconds of each case's sums without anything computed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=sum_alone, args=(r, port, args, cases, answers)) for r in range(args.devices)]
    for rank in ranks:
        rank.start()
    try:
        found: list[float] = answers.get(timeout=300)
        return found
    finally:
        for rank in ranks:
            rank.join(10)
            rank.kill()


def measure(args: argparse.Namespace, size: str) -> list[dict[str, Any]]:
    """All rows of one size."""
    models = shapes(size, args.devices, max(args.prompts) + args.new_tokens, args.vocabulary)
    names = [(architecture, mode) for architecture in args.architectures for mode in MODES[architecture]]
    times: dict[tuple[str, str, int], list[tuple[float, float]]] = {}

    def open_one(architecture: str, mode: Any) -> Contestant:
        config = EngineConfig(
            device=args.device,
            dtype=args.dtype,
            num_threads=args.threads,
            num_devices=args.devices,
            overlap=mode,
            max_batch_size=1,
            max_step_tokens=max(args.prompts),
            prefix_reuse=False,
        )
        return Contestant(architecture, models[architecture], config)

    def take_turns(group: Sequence[tuple[str, str]]) -> None:
        contestants = [open_one(*name) for name in group]
        try:
            for prompt_tokens in args.prompts:
                for turn in range(args.rounds + 1):
                    for name, contestant in zip(group, contestants, strict=True):
                        found = contestant.seconds(prompt_tokens, args.new_tokens)
                        if turn > 0:  # the first one warms up
                            times.setdefault((*name, prompt_tokens), []).append(found)
        finally:
            for contestant in contestants:
                contestant.close()

    for group in [[name] for name in names] if args.apart else [names]:
        take_turns(group)
    cases = [(architecture, prompt) for architecture in args.architectures for prompt in args.prompts]
    alone = dict(zip(cases, sums_alone(args, [sums_of(models[a], p) for a, p in cases]), strict=True))
    rows = []
    for prompt_tokens in args.prompts:
        for architecture in args.architectures:
            medians = {
                mode: [
                    statistics.median(values) * 1e3
                    for values in zip(*times[architecture, mode, prompt_tokens], strict=True)
                ]
                for mode in MODES[architecture]
            }
            rows.append(row_of(size, models[architecture], prompt_tokens, medians, alone[architecture, prompt_tokens]))
        base = next(
            (row["ttft_ms"] for row in rows[-len(args.architectures) :] if row["architecture"] == "standard"), None
        )
        for row in rows[-len(args.architectures) :]:
            row["speedup"] = None if base is None else round(best(base) / best(row["ttft_ms"]), 4)
            say(row)
    return rows


def row_of(
    size: str, shape: ModelConfig, prompt_tokens: int, medians: dict[str, Any], alone_s: float
) -> dict[str, Any]:
    """One architecture at one prompt length."""
    ttft_ms = {mode: round(values[0], 3) for mode, values in medians.items()}
    exposed = None
    if "overlapped" in ttft_ms and ttft_ms["blocking"] > ttft_ms["none"]:
        exposed = round((ttft_ms["overlapped"] - ttft_ms["none"]) / (ttft_ms["blocking"] - ttft_ms["none"]), 4)
    return {
        "size": size,
        "architecture": shape.architecture,
        "parameters": plan.num_parameters(shape),
        "width": shape.width,
        "head_size": shape.head_size,
        "prompt_tokens": prompt_tokens,
        "ttft_ms": ttft_ms,
        "tpot_ms": {mode: round(values[1], 3) for mode, values in medians.items()},
        "sums_alone_ms": round(alone_s * 1e3, 3),
        "exposed_communication": exposed,
    }


def best(by_mode: dict[str, float]) -> float:
    """The time that a user gets: overlapped where the architecture allows it."""
    return by_mode.get("overlapped", by_mode["blocking"])


def say(row: dict[str, Any]) -> None:
    modes = "  ".join(f"{mode} {row['ttft_ms'][mode]:.1f}/{row['tpot_ms'][mode]:.2f}" for mode in row["ttft_ms"])
    print(
        f"{row['size']:5} {row['prompt_tokens']:5} {row['architecture']:9} {row['parameters']:15,}  sums alone "
        f"{row['sums_alone_ms']:8.1f}  exposed {row['exposed_communication']}  "
        f"speed-up {row['speedup']}  TTFT/TPOT {modes}",
        flush=True,
    )


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars per size and prompt, and their geometric mean, as in the paper's figure of TTFT."""
    from matplotlib.figure import Figure  # not pyplot, whose state is global

    others = [name for name in ("parallel", "kraken") if any(row["architecture"] == name for row in rows)]
    labels = list(dict.fromkeys((row["size"], row["prompt_tokens"]) for row in rows))
    figure = Figure(figsize=(max(6, 1.1 * len(labels)), 3.6), layout="constrained")
    axes = figure.add_subplot()
    for index, name in enumerate(others):
        found = {(row["size"], row["prompt_tokens"]): row["speedup"] for row in rows if row["architecture"] == name}
        values = [found[label] for label in labels]
        places = [place + (index - (len(others) - 1) / 2) * 0.4 for place in range(len(labels) + 1)]
        axes.bar(places, [*values, geomean(values)], width=0.38, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(labels) + 1), [*(f"{size}\n{prompt}" for size, prompt in labels), "geometric\nmean"])
    axes.set_ylabel("TTFT of standard over TTFT")
    axes.set_xlabel("parameters and prompt tokens")
    axes.legend()
    figure.savefig(path, dpi=150)


def geomean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["25M"])
    parser.add_argument("--architectures", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--new-tokens", type=int, default=17)
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, divided among the processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--apart", action="store_true", help="one engine in memory at a time")
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    args = parser.parse_args()
    rows = [row for size in args.sizes for row in measure(args, size)]
    kraken = [row for row in rows if row["architecture"] == "kraken"]
    speedups = [row["speedup"] for row in kraken if row["speedup"] is not None]
    exposed = [row["exposed_communication"] for row in kraken if row["exposed_communication"] is not None]
    if args.figure is not None and speedups:
        draw(rows, args.figure)
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU threads",
        "devices": args.devices,
        "dtype": args.dtype,
        "rows": rows,
        "speedup_geomean": round(geomean(speedups), 4) if speedups else None,
        "exposed_communication_max": max(exposed, default=None),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
