"""Muon on matrices of one shape together, against torch's, which takes one after the other.

    python -m benchmarks.muon kraken_10m_4way                                    # two CPU cores, half a minute
    python -m benchmarks.muon kraken_10m_4way --device cuda

Both update the hidden matrices of a preset from the same random gradients, in alternation; ours computes in the type
that a training would choose, torch's always in bfloat16. The last line is JSON: `milliseconds` is our time of one
update, `ratio_vs_torch` torch's over ours, median over the rounds.

Expected before it was measured: torch's takes 148 matrices x 30 small operations for `kraken_10m_4way`, ours 3 batches
x 30. On a GPU, where each is a launch of some 6 us, 27 ms and 1 ms: a ratio of 15 to 25. On two CPU cores the 60 GFLOP
of both are what takes the time: 1.1 to 1.4 where bfloat16 has instructions, and far more where torch emulates it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from kraken.model import Kraken
from kraken.model.precision import choose_precision
from kraken.presets import PRESETS
from kraken.training.muon import MOMENTUM, Muon, matrices_of

RATE = 1e-3


def contestants(model: Kraken, weight_decay: float, compute: torch.dtype) -> dict[str, Callable[[], None]]:
    """Name -> one update of a model's hidden matrices, or of copies of them; gradients are set."""
    ours = Muon(model, weight_decay, compute)
    singles = []
    for name, parameter in ours.parameters.items():
        assert parameter.grad is not None
        weights, gradients = (matrices_of(name, tensor, model) for tensor in (parameter.detach(), parameter.grad))
        for weight, gradient in zip(weights, gradients, strict=True):
            singles.append(torch.nn.Parameter(weight.clone()))
            singles[-1].grad = gradient.clone()
    theirs = torch.optim.Muon(
        singles, lr=RATE, weight_decay=weight_decay, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw"
    )
    return {"ours": lambda: ours.step(RATE), "torch": lambda: theirs.step()}


def seconds_of(update: Callable[[], None], repeats: int, device: torch.device) -> float:
    started_at = time.perf_counter()
    for _ in range(repeats):
        update()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started_at) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="kraken_10m_4way", choices=sorted(PRESETS), metavar="PRESET")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--rounds", type=int, default=7, help="alternations of the two (7)")
    parser.add_argument("--repeats", type=int, default=3, help="updates of each per round (3)")
    args = parser.parse_args()
    device, run = torch.device(args.device), PRESETS[args.preset]()
    precision = choose_precision(args.precision, device)
    torch.manual_seed(0)
    model = Kraken(run.model)
    model.init_weights(seed=0)  # drawn on the CPU
    model.to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    updates = contestants(model, run.train.weight_decay, precision.compute)
    times: dict[str, list[float]] = {name: [] for name in updates}
    for update in updates.values():
        seconds_of(update, 2, device)
    for _ in range(args.rounds):
        for name, update in updates.items():
            times[name].append(seconds_of(update, args.repeats, device))
    ratios = [theirs / ours for theirs, ours in zip(times["torch"], times["ours"], strict=True)]
    result = {
        "preset": args.preset,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "dtype": precision.name,
        "milliseconds": round(statistics.median(times["ours"]) * 1e3, 2),
        "torch_milliseconds": round(statistics.median(times["torch"]) * 1e3, 2),
        "ratio_vs_torch": round(statistics.median(ratios), 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
