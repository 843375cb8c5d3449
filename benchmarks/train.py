"""The training step against a loop over the ways, the published default and a standard Transformer of equal size.

    python -m benchmarks.train kraken_10m_4way                               # two CPU cores, about five minutes
    python -m benchmarks.train kraken_125m_4way --sequences 16 --device cuda

All contestants train on the same random tokens, in alternation, in one process, by the published recipe: learned
positions, and AdamW at a rate of 1e-3, whatever the preset says itself:

    ours          kraken.training.step.TrainingStep, as every run trains
    loop          benchmarks.loop, one module per way, AdamW as the published code calls it, the same dtype
    published     the loop with the published defaults: float32 on a CPU, eager, GELU composed of seven operations, the
                  loss read every step
    standard      our step on a standard Transformer with as many parameters

The last line is JSON. `ratio_vs_loop_eager` and `ratio_vs_loop_compiled` compare tokens/s with both sides eager, or
both under torch.compile; `ratio_vs_published_default` and `ratio_vs_standard` take ours as a long run would choose it.
`flop_ratio_vs_standard` is the standard model's operations per token over ours: what `ratio_vs_standard` would be at
equal efficiency, since at equal parameters Kraken has more attention. `mfu` is our model's floating-point operations
per second (six per weight and token, attention as in PaLM) over the rate of a large matrix product in the same type,
measured here. `peak_memory_ratio_vs_loop` is ours over the loop's: bytes of the CUDA allocator, both compiled; on a
CPU the growth of the process, both eager, each in a process of its own.
"""

import argparse
import dataclasses
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from benchmarks.loop import LoopKraken
from benchmarks.recipe import published_recipe
from kraken.config import ModelConfig, TrainConfig
from kraken.model.precision import choose_precision
from kraken.plan.cost import training_flops_per_token
from kraken.presets import PRESETS
from kraken.training.parallel import Mesh
from kraken.training.rate import matrix_rate
from kraken.training.step import TrainingStep

STANDARD_OF = {
    "kraken_10m": "standard_10m",
    "kraken_125m": "gpt2_124m",
    "kraken_350m": "gpt2_355m",
    "kraken_760m": "gpt2_774m",
}
"""Start of a preset's name -> the standard Transformer of its size."""

RATIOS = {
    "ratio_vs_loop_eager": ("loop_eager", "ours_eager"),
    "ratio_vs_loop_compiled": ("loop_compiled", "ours_compiled"),
    "ratio_vs_published_default": ("published", "ours"),
    "ratio_vs_standard": ("standard", "ours"),
}
"""Key -> whose time over whose."""

Step = Callable[[int, Tensor, Tensor], object]


def our_step(
    model: ModelConfig, config: TrainConfig, device: torch.device, compile_setting: Literal["auto", "on", "off"]
) -> Step:
    step = TrainingStep(model, dataclasses.replace(config, compile=compile_setting), Mesh(device))
    step.start(num_steps=config.steps)
    return step


def loop_step(model: ModelConfig, config: TrainConfig, device: torch.device, compiled: bool, published: bool) -> Step:
    """A step as the published training script takes it; `published` adds what its defaults cost."""
    precision = choose_precision(config.precision, device)
    network: nn.Module = LoopKraken(model, composed=published).to(device)
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2))
    if compiled:
        network = cast("nn.Module", torch.compile(network))

    def step(index: int, inputs_BT: Tensor, targets_BT: Tensor) -> object:
        with precision.autocast(device):
            loss = network(inputs_BT, targets_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item() if published else loss

    return step


def contestants(name: str, standard: str, config: TrainConfig, device: torch.device) -> dict[str, Callable[[], Step]]:
    """Name -> what builds it; `default` means as a run of the preset would choose."""
    model, standard_model = published_recipe(name).model, published_recipe(standard).model
    return {
        "ours": lambda: our_step(model, config, device, "auto"),
        "standard": lambda: our_step(standard_model, config, device, "auto"),
        "published": lambda: loop_step(model, config, device, compiled=False, published=True),
        "ours_eager": lambda: our_step(model, config, device, "off"),
        "loop_eager": lambda: loop_step(model, config, device, compiled=False, published=False),
        "ours_compiled": lambda: our_step(model, config, device, "on"),
        "loop_compiled": lambda: loop_step(model, config, device, compiled=True, published=False),
    }


def random_batch(model: ModelConfig, sequences: int, device: torch.device) -> tuple[Tensor, Tensor]:
    ids = torch.randint(model.vocab_size, (sequences, model.context_length + 1), device=device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(step: Step, batch: tuple[Tensor, Tensor], num_steps: int, device: torch.device) -> float:
    wait(device)
    started_at = time.perf_counter()
    for index in range(num_steps):
        step(index, *batch)
    wait(device)
    return (time.perf_counter() - started_at) / num_steps


def peak_bytes(build: Callable[[], Step], batch: tuple[Tensor, Tensor], device: torch.device) -> int:
    """Most memory that building a contestant and three of its steps take."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = build()
        for index in range(3):
            step(index, *batch)
        return torch.cuda.max_memory_allocated() - before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = build()
    for index in range(3):
        step(index, *batch)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def measure_peaks(args: argparse.Namespace, built: dict[str, Callable[[], Step]], device: torch.device) -> list[int]:
    """Peak bytes of ours and of the loop."""
    if device.type == "cuda":
        batch = random_batch(published_recipe(args.preset).model, args.sequences, device)
        return [peak_bytes(built[name], batch, device) for name in ("ours_compiled", "loop_compiled")]
    peaks = []
    for name in ("ours_eager", "loop_eager"):
        command = [sys.executable, "-m", "benchmarks.train", args.preset, "--sequences", str(args.sequences)]
        command += ["--device", "cpu", "--precision", args.precision, "--peak-of", name]
        peaks.append(int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="kraken_10m_4way", choices=sorted(PRESETS), metavar="PRESET")
    parser.add_argument(
        "--standard", choices=sorted(PRESETS), metavar="PRESET", help="the standard model (of its size)"
    )
    parser.add_argument("--sequences", type=int, default=8, help="sequences per step, in one micro-batch (8)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="alternations of all contestants (5)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a contestant per round (2)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="time these contestants alone, not their memory")
    parser.add_argument("--peak-of", metavar="NAME", help="only print the peak bytes of one contestant")
    args = parser.parse_args()
    device = torch.device(args.device)
    standard = args.standard or next((s for start, s in STANDARD_OF.items() if args.preset.startswith(start)), None)
    if standard is None:
        parser.error(f"no standard model is known for {args.preset}; name one with --standard")
    run = published_recipe(args.preset)
    config = dataclasses.replace(
        run.train,
        sequences_per_step=args.sequences,
        sequences_per_microbatch=args.sequences,
        precision=args.precision,
        steps=max(run.train.steps, 100_000),  # the choice that a long run makes
        warmup_steps=0,
    )
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True  # the published script's setting
    built = contestants(args.preset, standard, config, device)
    batch = random_batch(run.model, args.sequences, device)
    if args.peak_of:
        print(peak_bytes(built[args.peak_of], batch, device))
        return
    names = args.only or list(built)
    peaks = None if args.only else measure_peaks(args, built, device)
    steps: dict[str, Step] = {}
    for name in names:
        started_at = time.perf_counter()
        steps[name] = built[name]()
        seconds_of(steps[name], batch, 3, device)
        print(f"{name:14} ready after {time.perf_counter() - started_at:6.1f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in names}
    rates = []
    for _ in range(args.rounds):
        rates.append(matrix_rate(choose_precision(config.precision, device).compute, device))
        for name in names:
            times[name].append(seconds_of(steps[name], batch, args.steps, device))
    tokens = args.sequences * run.model.context_length
    for name in names:
        middle = statistics.median(times[name])
        print(f"{name:14} {middle * 1e3:10.1f} ms/step {tokens / middle:12,.0f} tokens/s", flush=True)

    def ratio(theirs: str, ours: str) -> float:
        return round(statistics.median(t / o for t, o in zip(times[theirs], times[ours], strict=True)), 3)

    flops = tokens * training_flops_per_token(run.model)
    result: dict[str, object] = {
        "preset": args.preset,
        "standard": standard,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "dtype": choose_precision(config.precision, device).name,
        "matrix_tflops": round(statistics.median(rates) / 1e12, 3),
        "flop_ratio_vs_standard": round(training_flops_per_token(published_recipe(standard).model) * tokens / flops, 3),
    }
    result |= {key: ratio(*pair) for key, pair in RATIOS.items() if set(pair) <= set(times)}
    if "ours" in times:
        result["tokens_per_second"] = round(tokens / statistics.median(times["ours"]))
        result["mfu"] = round(statistics.median(flops / t / r for t, r in zip(times["ours"], rates, strict=True)), 3)
    if peaks is not None:
        result["peak_gigabytes"] = round(peaks[0] / 1e9, 3)
        result["peak_memory_ratio_vs_loop"] = round(peaks[0] / peaks[1], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
