"""How OpenMP's threads should wait in a local cluster: a forward pass and decoding, alone and beside a busy process.

    python -m benchmarks.wait_policy --rounds 3

Three policies: `default` spins for milliseconds, `passive` sleeps at once (OMP_WAIT_POLICY=PASSIVE), `ours` is what
`pipelines/local_cluster.py` sets. Each round runs all of them in turn, in processes of their own, since OpenMP reads
the policy once. Measured on two threads are a forward pass of the trainer's model over a whole context, and a token of
the engine at batch 1.

The last line is JSON; a ratio is time(policy) / time(ours), median over the rounds: above 1, ours is faster.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time

from pipelines.local_cluster import RAY_SETTINGS

BUSY = [sys.executable, "-c", "while True: pass"]
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
POLICIES = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "ours": {name: RAY_SETTINGS[name] for name in VARIABLES},
}
NUM_TOKENS = 200


def times_ms(repeats: int) -> dict[str, float]:
    """Medians of a forward pass over a full context of the quickstart model, and of a token of its engine."""
    import torch

    from kraken.config import EngineConfig
    from kraken.engine.engine import TorchEngine
    from kraken.engine.protocol import EngineInfo, Request, SamplingParams
    from kraken.evaluate import collect
    from kraken.model import Kraken
    from kraken.presets import quickstart

    torch.set_num_threads(2)
    config = quickstart().model
    model = Kraken(config).requires_grad_(False)
    model.init_weights(seed=0)
    ids_BT = torch.zeros(1, config.context_length, dtype=torch.int64)
    times = []
    for _ in range(repeats + 2):
        started_at = time.perf_counter()
        model(ids_BT)
        times.append((time.perf_counter() - started_at) * 1e3)
    info = EngineInfo(
        name="torch",
        context_length=config.context_length,
        num_ids=config.vocab_size,
        eot_id=0,
        tokenizer_fingerprint="none",
    )
    engine = TorchEngine.from_model(model, info, EngineConfig(num_threads=2))

    async def decode() -> list[float]:
        times = []
        for index in range(5):
            sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
            started_at = time.perf_counter()
            await collect(engine, Request(id=str(index), prompt_ids=(1, 2, 3), sampling=sampling))
            times.append((time.perf_counter() - started_at) * 1e3 / NUM_TOKENS)
        await engine.close()
        return times[1:]

    return {"forward": statistics.median(times[2:]), "token": statistics.median(asyncio.run(decode()))}


def run_policy(policy: str, repeats: int) -> dict[str, float]:
    """`times_ms` in a process with that policy."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | POLICIES[policy]
    command = [sys.executable, "-m", "benchmarks.wait_policy", "--one", "--repeats", str(repeats)]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    times: dict[str, float] = json.loads(printed)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="alternations of the policies (3)")
    parser.add_argument("--repeats", type=int, default=20, help="forward passes per process (20)")
    parser.add_argument("--one", action="store_true", help="only measure this process; print milliseconds")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(times_ms(args.repeats)))
        return
    result: dict[str, float] = {}
    for name, num_busy in (("alone", 0), ("beside_a_busy_process", 1)):
        busy = [subprocess.Popen(BUSY) for _ in range(num_busy)]
        try:
            rounds = [{policy: run_policy(policy, args.repeats) for policy in POLICIES} for _ in range(args.rounds)]
        finally:
            for process in busy:
                process.kill()
                process.wait()
        for times in rounds:
            told = ", ".join(f"{p} {ms['forward']:.1f} and {ms['token']:.2f} ms" for p, ms in times.items())
            print(f"{name}: a pass and a token {told}", flush=True)
        for what in ("forward", "token"):
            for policy in ("default", "passive"):
                ratios = [times[policy][what] / times["ours"][what] for times in rounds]
                result[f"{what}_ratio_{policy}_{name}"] = round(statistics.median(ratios), 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
