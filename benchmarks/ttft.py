"""Time to first token (TTFT) and per output token (TPOT) on several devices: Kraken, standard, parallel Transformer.

    python -m benchmarks.ttft --sizes 25M --prompts 128 512                       # two CPU processes over gloo
    python -m benchmarks.ttft --device cuda --dtype bfloat16 --sizes 1.3B 6.7B 13B --figure ttft.png           # GPUs
    python -m benchmarks.ttft --device cuda --dtype bfloat16 --sizes 65B --apart      # one model in memory at a time
    python -m benchmarks.ttft --device cuda --dtype bfloat16 --sizes 6.7B --quantization fp8      # all in float8
    python -m benchmarks.ttft --sizes tiny --prompts 32 --rounds 1                # does it run?

Random weights of the shapes of GPT-2 and GPT-3; Kraken has as many ways as there are devices, the same layers, and a
width that makes its parameters equal. All contestants of a size take turns (with `--apart` one after the other, each
with all its rounds); times are medians. On CUDA the standard model and Kraken run over NCCL (`nccl`) and with the
fastest backend of each message (`auto`, see `engine.all_reduce`), the parallel model with the latter. The mode `none`
leaves out all-reduces, so that its tokens are WRONG; `docs/latency.md` says what the other modes are.

Before the last line, a table. The last line is JSON:

    rows                    one per size, architecture, `all_reduce` and prompt: TTFT of each mode in ms at batch 1;
                            TPOT of each mode in ms at each batch, after prompts of the first length; the time of NCCL's
                            or gloo's all-reduces alone; share_of_communication, 1 - none / blocking; exposed
                            communication, (overlapped - none) / (blocking - none), and exposed_vs_nccl, where blocking
                            is NCCL's; speed-up of TTFT over the standard model with NCCL, and with the best backend (on
                            a CPU both are gloo); roofline_ratio, TTFT over the longer of floating-point operations at
                            the matrix rate and weights at the memory's bandwidth, both measured before
    speedup_geomean         of Kraken over the standard model over NCCL (gloo), TTFT, all sizes and prompts
    speedup_geomean_vs_best     the same over the standard model with the best backends
    exposed_communication_max   of Kraken with the best backends
    exposed_vs_nccl_max     likewise
"""

import argparse
import asyncio
import dataclasses
import gc
import json
import logging
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
from torch._C._distributed_c10d import TCPStore

from benchmarks.engine import bandwidth, best_seconds, matrix_rate
from benchmarks.without_all_reduce import RendezvousWithoutAllReduce
from kraken.config import EngineConfig, ModelConfig
from kraken.engine.distributed.device_group import join_group
from kraken.engine.distributed.rendezvous import Rendezvous
from kraken.engine.engine import TorchEngine
from kraken.engine.kernels.choose import choose_kernels
from kraken.engine.kernels.quantized_tensor import FLOAT8
from kraken.engine.model.quantized import Fp8Linear
from kraken.engine.model_runner import ModelRunner
from kraken.engine.protocol import EngineInfo, Request, SamplingParams
from kraken.plan import cost as plan

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
    "kraken_delayed": ("overlapped", "blocking", "none"),
}
BEST, PLAIN = "auto", "nccl"
Name = tuple[str, str, str]
"""Architecture, `engine.all_reduce`, mode."""
BLOCK = 16
"""Tokens of a block of the cache."""
NUM_ROUNDS_ALONE = 5
"""How often a prompt's all-reduces are timed by themselves."""


class Contestant:
    """An engine with random weights, and how long it takes.

    Args:
        meeting: to which its other ranks are invited; None starts them on this host.
    """

    def __init__(self, name: str, shape: ModelConfig, config: EngineConfig, rendezvous: Rendezvous | None = None):
        self.name, self.shape = name, shape
        info = EngineInfo(
            name="torch",
            context_length=shape.context_length,
            num_ids=shape.vocab_size,
            eot_id=0,
            tokenizer_fingerprint="none",
        )
        self._engine = TorchEngine.from_shape(shape, info, config, rendezvous)
        self._loop = asyncio.Runner()
        self._num_requests = 0

    @property
    def runner(self) -> ModelRunner:
        """What computes in this process."""
        return self._engine._runner

    def seconds(self, prompt_tokens: int, new_tokens: int = 1) -> tuple[float, float]:
        """Of one request: seconds to the first token, and for each later one."""
        (found,) = self._times(1, prompt_tokens, new_tokens)
        return found[0], (found[-1] - found[0]) / max(1, len(found) - 1)

    def seconds_per_token(self, batch: int, prompt_tokens: int, new_tokens: int) -> float:
        """Of each of several requests, while all of them decode."""
        found = self._times(batch, prompt_tokens, new_tokens)
        start, end = max(times[0] for times in found), min(times[-1] for times in found)
        num_tokens = sum(start < at <= end for times in found for at in times)
        return (end - start) * batch / max(1, num_tokens)

    def _times(self, batch: int, prompt_tokens: int, new_tokens: int) -> list[list[float]]:
        """When each token of each request came, in seconds since all of them began."""
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0)
        prompts = torch.randint(self.shape.vocab_size, (batch, prompt_tokens)).tolist()

        async def all_of_them() -> list[list[float]]:
            started_at = time.perf_counter()

            async def times(prompt: list[int]) -> list[float]:
                self._num_requests += 1
                request = Request(id=str(self._num_requests), prompt_ids=tuple(prompt), sampling=sampling)
                return [time.perf_counter() - started_at async for _ in self._engine.generate(request)]

            return await asyncio.gather(*(times(prompt) for prompt in prompts))

        return self._loop.run(all_of_them())

    def close(self) -> None:
        """End its processes, and give back its memory."""
        self._loop.run(self._engine.close())
        self._loop.close()
        del self._engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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
    # a width in steps of 64 and the largest head size of 64, 96 and 128, where that is near enough
    aligned = plan.aligned_widths(ways, budget)[0][-1]
    is_near = abs(plan.num_parameters(aligned) / budget - 1) < 0.02
    kraken = aligned if is_near else plan.matched(standard, "kraken", num_devices)
    return {
        "standard": standard,
        "parallel": dataclasses.replace(standard, architecture="parallel"),
        "kraken": kraken,
        "kraken_delayed": dataclasses.replace(kraken, architecture="kraken_delayed"),
    }


def all_reduces_of(shape: ModelConfig, prompt_tokens: int) -> tuple[int, tuple[int, int, int]]:
    """Number and shape of a prefill's all-reduces over all tokens; those of the last layer have one token."""
    layers = shape.num_layers - 1
    counts = {"kraken": layers - 1, "kraken_delayed": layers - 1, "standard": 2 * layers, "parallel": layers}
    return counts[shape.architecture], (1, prompt_tokens, shape.width)


def time_alone(rank: int, port: int, args: argparse.Namespace, cases: list[Any], answers: Any) -> None:
    """One rank that does nothing but all-reduce; rank 0 answers with the median seconds of each case."""
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, None, rank == 0, timedelta(seconds=60), wait_for_workers=False)
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(device)
    message_bytes = max(math.prod(shape) for _, shape in cases) * getattr(torch, args.dtype).itemsize
    kernels = choose_kernels(device, getattr(torch, args.dtype))
    group = join_group(kernels, store, rank, args.devices, "127.0.0.1", device, 60.0, True, False, message_bytes)
    found = []
    for count, shape in cases:
        x = torch.zeros(shape, dtype=getattr(torch, args.dtype), device=device)
        times = []
        for _ in range(NUM_ROUNDS_ALONE + 1):
            started_at = time.perf_counter()
            for _ in range(count):
                group.all_reduce_for(shape[1]).all_reduce(x[0])
            if args.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started_at)
        found.append(statistics.median(times[1:]))
    group.all_reduce_for(1).all_reduce(torch.zeros(1, 1, device=device))  # nobody leaves while another still waits
    if rank == 0:
        answers.put(found)


def all_reduces_alone(args: argparse.Namespace, cases: list[Any]) -> list[float]:
    """Seconds of each case's all-reduces without anything computed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=time_alone, args=(r, port, args, cases, answers)) for r in range(args.devices)]
    for rank in ranks:
        rank.start()
    try:
        found: list[float] = answers.get(timeout=300)
        return found
    finally:
        for rank in ranks:
            rank.join(10)
            rank.kill()


def roofline_seconds(shape: ModelConfig, prompt_tokens: int, num_devices: int, rates: tuple[float, float]) -> float:
    """No prefill can be faster on so many devices.

    Args:
        rates: of one device, floating-point operations and weights per second.
    """
    attention = 2 * shape.num_layers * shape.num_ways * shape.width * prompt_tokens**2  # causal: half of all pairs
    of_prompt, weights = plan.prompt_weights(shape), plan.matrix_weights(shape)
    flops = 2 * of_prompt * prompt_tokens + attention + 2 * (weights - of_prompt)  # the rest for one token
    return max(flops / rates[0], weights / rates[1]) / num_devices


def rates_of(args: argparse.Namespace) -> tuple[float, float]:
    """Floating-point operations and weights per second of one device; CPU processes share the threads."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    num_sharing = args.devices if args.device == "cpu" else 1
    torch.set_num_threads(args.threads)
    if args.quantization == "fp8":
        matrices, weight_bytes = quantised_matrix_rate(dtype, device), FLOAT8.itemsize
    else:
        matrices, weight_bytes = matrix_rate(dtype, device), dtype.itemsize
    return matrices / num_sharing, bandwidth(dtype, device) / weight_bytes / num_sharing


def quantised_matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations per second of a large product in float8."""
    size = 8192 if device.type == "cuda" else 1024
    kernels = choose_kernels(device, dtype)
    rows = kernels.quantize(torch.randn(1, size, size, device=device).to(dtype))
    linear = Fp8Linear(torch.randn(1, size, size, device=device).to(dtype), None, kernels)
    return 2 * size**3 / best_seconds(lambda: linear(rows), device, 4)


def names_of(args: argparse.Namespace) -> list[Name]:
    """All contestants of a size. Without all-reduces their backend does not matter."""
    every = dict.fromkeys(("standard", *plan.WAY_ARCHITECTURES), (PLAIN, BEST)) if args.device == "cuda" else {}
    return [
        (architecture, all_reduce, mode)
        for architecture in args.architectures
        for all_reduce in every.get(architecture, (BEST,))
        for mode in MODES[architecture]
        if mode != "none" or all_reduce == BEST
        # in brief, the Krakens wait for NCCL only, and overlap the best backend only
        if not args.brief
        or architecture not in plan.WAY_ARCHITECTURES
        or mode == "none"
        or (mode == "blocking") == (all_reduce == PLAIN)
    ]


def measure(args: argparse.Namespace, size: str) -> list[dict[str, Any]]:
    """All rows of one size."""
    models = shapes(size, args.devices, max(args.prompts) + args.new_tokens, args.vocabulary)
    names = names_of(args)
    rates = rates_of(args)
    ttft_s: dict[tuple[Name, int], list[float]] = {}
    tpot_s: dict[tuple[Name, int], list[float]] = {}
    # what decodes together, and every prompt
    tokens_kept = max(max(args.batches) * (args.prompts[0] + args.new_tokens + BLOCK), max(args.prompts) + 2 * BLOCK)

    def open_one(architecture: str, all_reduce: Any, mode: Any, rendezvous: Rendezvous) -> Contestant:
        config = EngineConfig(
            device=args.device,
            dtype=args.dtype,
            quantization=args.quantization,
            num_threads=args.threads,
            num_devices=args.devices,
            overlap="blocking" if mode == "blocking" else "overlapped",
            all_reduce=all_reduce,
            max_batch_size=max(args.batches),
            max_step_tokens=max(*args.prompts, *args.batches),
            kv_cache_tokens=tokens_kept + args.new_tokens,
            tokens_per_block=BLOCK,
            prefix_reuse=False,
            cuda_graph_sizes=tuple(sorted({*args.prompts, *args.batches})) if args.device == "cuda" else (),
        )
        return Contestant(architecture, models[architecture], config, rendezvous)

    def take_turns(group: Sequence[Name]) -> None:
        contestants: list[Contestant] = []
        try:
            for name in group:
                contestants.append(open_one(*name, open_rendezvous.pop(name)))
            for prompt_tokens in args.prompts:
                for turn in range(args.rounds + 1):
                    for name, contestant in zip(group, contestants, strict=True):
                        first_s = contestant.seconds(prompt_tokens)[0]
                        if turn > 0:  # the first one warms up
                            ttft_s.setdefault((name, prompt_tokens), []).append(first_s)
            for batch in args.batches:
                for turn in range(args.decode_rounds + 1):
                    for name, contestant in zip(group, contestants, strict=True):
                        later_s = contestant.seconds_per_token(batch, args.prompts[0], args.new_tokens)
                        if turn > 0:
                            tpot_s.setdefault((name, batch), []).append(later_s)
        finally:
            for contestant in contestants:
                contestant.close()

    open_rendezvous = {
        name: (RendezvousWithoutAllReduce if name[2] == "none" else Rendezvous)(args.devices) for name in names
    }
    for rendezvous in open_rendezvous.values():  # all processes start now: starting takes longest
        rendezvous.launch(max(1, args.threads // args.devices))
    for group in [[name] for name in names] if args.apart else [names]:
        take_turns(group)
    cases = [(architecture, prompt) for architecture in args.architectures for prompt in args.prompts]
    alone = dict(zip(cases, all_reduces_alone(args, [all_reduces_of(models[a], p) for a, p in cases]), strict=True))
    rows = []
    for prompt_tokens in args.prompts:
        of_prompt = []
        for architecture, all_reduce in dict.fromkeys(name[:2] for name in names):
            found = {name[2]: name for name in names if name[:2] == (architecture, all_reduce)}
            found.setdefault("none", (architecture, BEST, "none"))
            found.setdefault("blocking", (architecture, PLAIN, "blocking"))
            ttft_ms = {mode: statistics.median(ttft_s[name, prompt_tokens]) * 1e3 for mode, name in found.items()}
            tpot_ms = {
                mode: {str(batch): round(statistics.median(tpot_s[name, batch]) * 1e3, 3) for batch in args.batches}
                for mode, name in found.items()
            }
            row = row_of(
                size, models[architecture], all_reduce, prompt_tokens, ttft_ms, alone[architecture, prompt_tokens]
            )
            roofline_ms = roofline_seconds(models[architecture], prompt_tokens, args.devices, rates) * 1e3
            of_prompt.append(row | {"tpot_ms": tpot_ms, "roofline_ratio": round(best(ttft_ms) / roofline_ms, 4)})
        bases = {row["all_reduce"]: best(row["ttft_ms"]) for row in of_prompt if row["architecture"] == "standard"}
        for row in of_prompt:
            own = [other for other in of_prompt if other["architecture"] == row["architecture"]]
            waits = {other["all_reduce"]: other["ttft_ms"]["blocking"] for other in own}
            row["speedup"] = ratio(bases.get(PLAIN, bases.get(BEST)), row)
            row["speedup_vs_best"] = ratio(bases.get(BEST), row)
            row["exposed_vs_nccl"] = exposed(row["ttft_ms"], waits.get(PLAIN))
            say(row)
        rows += of_prompt
    return rows


def row_of(
    size: str, shape: ModelConfig, all_reduce: str, prompt_tokens: int, ttft_ms: dict[str, float], alone_s: float
) -> dict[str, Any]:
    """One architecture at one prompt length."""
    ttft_ms = {mode: round(value, 3) for mode, value in ttft_ms.items()}
    return {
        "size": size,
        "architecture": shape.architecture,
        "all_reduce": all_reduce,
        "parameters": plan.num_parameters(shape),
        "width": shape.width,
        "head_size": shape.head_size,
        "prompt_tokens": prompt_tokens,
        "ttft_ms": ttft_ms,
        "all_reduces_alone_ms": round(alone_s * 1e3, 3),
        "share_of_communication": round(1.0 - ttft_ms["none"] / ttft_ms["blocking"], 4),
        "exposed_communication": exposed(ttft_ms, ttft_ms["blocking"]),
    }


def exposed(ttft_ms: dict[str, float], blocking_ms: float | None) -> float | None:
    """Share of what waiting costs that is left when nobody waits before they must."""
    if "overlapped" not in ttft_ms or blocking_ms is None or blocking_ms <= ttft_ms["none"]:
        return None
    return round((ttft_ms["overlapped"] - ttft_ms["none"]) / (blocking_ms - ttft_ms["none"]), 4)


def ratio(base_ms: float | None, row: dict[str, Any]) -> float | None:
    """How much faster than a base."""
    return None if base_ms is None else round(base_ms / best(row["ttft_ms"]), 4)


def best(by_mode: dict[str, float]) -> float:
    """The time that a user gets: overlapped where the architecture allows it."""
    return by_mode.get("overlapped", by_mode["blocking"])


def say(row: dict[str, Any]) -> None:
    modes = "  ".join(
        f"{mode} {value:.1f}/{'/'.join(f'{tpot:.2f}' for tpot in row['tpot_ms'][mode].values())}"
        for mode, value in row["ttft_ms"].items()
    )
    print(
        f"{row['size']:5} {row['prompt_tokens']:5} {row['architecture']:14} {row['all_reduce']:5} "
        f"{row['parameters']:15,}  "
        f"all-reduces alone {row['all_reduces_alone_ms']:8.1f}  share {row['share_of_communication']:.2f}  "
        f"exposed {row['exposed_communication']} ({row['exposed_vs_nccl']} of NCCL's)  speed-up {row['speedup']} "
        f"({row['speedup_vs_best']} over the best)  roofline {row['roofline_ratio']}  TTFT/TPOT {modes}",
        flush=True,
    )


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars per size and prompt, and their geometric mean where everybody has one, as in the paper's figure of TTFT."""
    from matplotlib.figure import Figure  # not pyplot, whose state is global

    best_rows = [row for row in rows if row["all_reduce"] == BEST]
    speedups = {
        name: {(row["size"], row["prompt_tokens"]): row["speedup"] for row in best_rows if row["architecture"] == name}
        for name in ("parallel", "kraken", "kraken_delayed")
    }
    speedups = {name: found for name, found in speedups.items() if found}
    labels = list(dict.fromkeys((row["size"], row["prompt_tokens"]) for row in rows))
    common = [label for label in labels if all(label in found for found in speedups.values())]
    figure = Figure(figsize=(max(6, 0.9 * len(labels)), 3.6), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, found) in enumerate(speedups.items()):
        values = [found.get(label, math.nan) for label in labels]
        if common:
            values.append(geomean([found[label] for label in common]))
        width = 0.8 / len(speedups)
        places = [place + (index - (len(speedups) - 1) / 2) * width for place in range(len(values))]
        axes.bar(places, values, width=0.95 * width, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    mean = f"mean of\n{len(common)}" if len(common) < len(labels) else "geometric\nmean"
    ticks = [*(f"{size}\n{prompt}" for size, prompt in labels), *([mean] if common else [])]
    axes.set_xticks(range(len(ticks)), ticks)
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
    parser.add_argument("--batches", type=int, nargs="+", help="requests that decode together (1; on CUDA 1 8 32)")
    parser.add_argument("--vocabulary", type=int, default=50304)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--quantization", choices=("none", "fp8"), default="none", help="of all contestants' linears")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, divided among the processes")
    parser.add_argument("--rounds", type=int, default=5, help="of prompts (5)")
    parser.add_argument("--decode-rounds", type=int, default=3, help="of batches that decode (3)")
    parser.add_argument(
        "--brief", action="store_true", help="on CUDA, only the modes of Kraken that speed-up and exposed_vs_nccl need"
    )
    parser.add_argument("--apart", action="store_true", help="one engine in memory at a time")
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    args = parser.parse_args()
    args.batches = args.batches or ([1, 8, 32] if args.device == "cuda" else [1])
    if args.new_tokens < 2:
        parser.error("--new-tokens must be 2 or more, since the first belongs to the prompt")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("kraken.engine").setLevel(logging.INFO)  # says which backends are chosen
    rows = [row for size in args.sizes for row in measure(args, size)]
    kraken = [row for row in rows if row["architecture"] == "kraken" and row["all_reduce"] == BEST]
    speedups, speedups_vs_best = (
        [row[key] for row in kraken if row[key] is not None] for key in ("speedup", "speedup_vs_best")
    )
    largest_exposed = {
        key: max((row[key] for row in kraken if row[key] is not None), default=None)
        for key in ("exposed_communication", "exposed_vs_nccl")
    }
    if args.figure is not None and speedups:
        draw(rows, args.figure)
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} CPU threads",
        "devices": args.devices,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "rows": rows,
        "speedup_geomean": round(geomean(speedups), 4) if speedups else None,
        "speedup_geomean_vs_best": round(geomean(speedups_vs_best), 4) if speedups_vs_best else None,
        "exposed_communication_max": largest_exposed["exposed_communication"],
        "exposed_vs_nccl_max": largest_exposed["exposed_vs_nccl"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
