"""Why the local cluster sets OMP_WAIT_POLICY=PASSIVE: a two-thread forward pass, alone and beside a busy process.

    python -m benchmarks.wait_policy --rounds 3

Each round runs both policies, one after the other, in processes of their own, since OpenMP reads the policy once.
The last line is JSON; a ratio is time(default) / time(PASSIVE), median over the rounds: above 1, PASSIVE is faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

BUSY = [sys.executable, "-c", "while True: pass"]


def forward_ms(repeats: int) -> float:
    """Median time of one forward pass of the quickstart model over a full context, on two threads."""
    import torch

    from kraken.model import Kraken
    from kraken.presets import quickstart

    torch.set_num_threads(2)
    config = quickstart().model
    model = Kraken(config)
    model.init_weights(seed=0)
    ids_BT = torch.zeros(1, config.context_length, dtype=torch.int64)
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 2):
            started_at = time.perf_counter()
            model(ids_BT)
            times.append((time.perf_counter() - started_at) * 1e3)
    return statistics.median(times[2:])


def run_policy(policy: str | None, repeats: int) -> float:
    """`forward_ms` in a process with that policy; None is OpenMP's default."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    if policy:
        environment["OMP_WAIT_POLICY"] = policy
    command = [sys.executable, "-m", "benchmarks.wait_policy", "--one", "--repeats", str(repeats)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="alternations of the two policies (3)")
    parser.add_argument("--repeats", type=int, default=20, help="forward passes per process (20)")
    parser.add_argument("--one", action="store_true", help="only measure this process; print milliseconds")
    args = parser.parse_args()
    if args.one:
        print(forward_ms(args.repeats))
        return
    result: dict[str, float] = {}
    for name, num_busy in (("alone", 0), ("beside_a_busy_process", 1)):
        busy = [subprocess.Popen(BUSY) for _ in range(num_busy)]
        try:
            pairs = [(run_policy(None, args.repeats), run_policy("PASSIVE", args.repeats)) for _ in range(args.rounds)]
        finally:
            for process in busy:
                process.kill()
                process.wait()
        for default_ms, passive_ms in pairs:
            print(f"{name}: default {default_ms:.1f} ms, PASSIVE {passive_ms:.1f} ms", flush=True)
        result[f"ratio_{name}"] = round(statistics.median(d / p for d, p in pairs), 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
