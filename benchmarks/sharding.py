"""Training on a mesh of two processes against one process with as many threads.

    python -m benchmarks.sharding kraken_10m_4way                       # two CPU processes over gloo, one thread each
    python -m benchmarks.sharding kraken_350m_4way --device cuda        # two GPUs over NCCL, against one

All train on the same random tokens in alternation, by the published recipe (learned positions, and AdamW, since Muon
cannot be sharded); the processes of a mesh live through the whole benchmark and wait while another contestant runs. The
last line is JSON: `way2_ratio`, `shard2_ratio` and `replicate2_ratio` are tokens/s of a mesh over tokens/s of one
process (on CPUs with two threads; on GPUs of one GPU, so that 2 would be perfect), `overlap_gain` is way2's tokens/s
over those of the same mesh that waits for every sum at once. Medians over the rounds.
`way2_mfu` and the like are the model's floating-point operations per second over the rate of a matrix product in the
same type, measured by all processes of the mesh at once; `way2_efficiency` is the tokens/s of a device of the mesh over
those of one device alone. On CPUs the threads are the devices.
With `--all` the line also holds `checkpoint_stall_share` and `recovery_seconds`, of benchmarks.checkpoint and
benchmarks.recovery, which run afterwards.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.recipe import published_recipe
from kraken.config import TrainConfig
from kraken.plan import training_flops_per_token
from kraken.presets import PRESETS
from kraken.training.parallel import join_mesh
from kraken.training.rate import matrix_rate
from kraken.training.step import TrainingStep

MESHES: dict[str, dict[str, Any]] = {
    "one": {"processes": 1},
    "way2": {"processes": 2, "way_size": 2},
    "way2_blocking": {"processes": 2, "way_size": 2, "overlap": False},
    "shard2": {"processes": 2, "shard_size": 2},
    "replicate2": {"processes": 2},
}


def serve(pipe: Connection, rank: int, port: int, mesh_name: str, args: argparse.Namespace) -> None:
    """One process of a mesh: answers each number of steps with the seconds that they took."""
    settings = dict(MESHES[mesh_name])
    processes = settings.pop("processes")
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in environment.items()} | {"MASTER_PORT": str(port)})
    torch.set_num_threads(args.threads // processes)
    run = published_recipe(args.preset)
    config: TrainConfig = dataclasses.replace(
        run.train,
        steps=100_000,
        sequences_per_step=args.sequences,
        sequences_per_microbatch=args.sequences,
        warmup_steps=0,
        compile="on" if args.device == "cuda" else "off",
    )
    with join_mesh(args.device == "cuda", **settings) as mesh:
        step = TrainingStep(run.model, config, mesh)
        step.start(config.steps)
        torch.manual_seed(mesh.data_rank)
        shape = (args.sequences // mesh.num_data_ranks, run.model.context_length + 1)
        ids = torch.randint(run.model.vocab_size, shape, device=mesh.device)
        batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        mesh.barrier()
        pipe.send(matrix_rate(step.precision.compute, mesh.device))
        while (num_steps := pipe.recv()) is not None:
            mesh.barrier()
            started_at = time.perf_counter()
            for index in range(num_steps):
                norm = step(index, *batch)[1]
            float(norm)  # waits for the device
            mesh.barrier()
            pipe.send(time.perf_counter() - started_at)


class Contestant:
    """The processes of one mesh."""

    def __init__(self, name: str, args: argparse.Namespace):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(MESHES[name]["processes"]):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, port, name, args), daemon=True)
            process.start()
            theirs.close()  # so that ours notices when the process ends
            self.pipes.append(ours)
            self.processes.append(process)
        self.rate = sum(self._answers())
        """Floating-point operations per second of all of them."""

    def seconds(self, num_steps: int) -> float:
        """Seconds per step, of the slowest process."""
        for pipe in self.pipes:
            pipe.send(num_steps)
        return max(self._answers()) / num_steps

    def _answers(self) -> list[float]:
        """One of each process."""
        answers = []
        for rank, pipe in enumerate(self.pipes):
            try:
                answers.append(pipe.recv())
            except EOFError:
                for process in self.processes:
                    process.kill()
                raise SystemExit(f"process {rank} of {len(self.pipes)} ended; its own message stands above") from None
        return answers

    def stop(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join()


def measured_by(benchmark: str, key: str) -> Any:
    """A number of another benchmark: of the JSON in its last line."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(output, end="", flush=True)
    return json.loads(output.strip().splitlines()[-1])[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="kraken_10m_4way", choices=sorted(PRESETS), metavar="PRESET")
    parser.add_argument("--sequences", type=int, default=8, help="sequences per step, over all processes (8)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of all processes together (2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="alternations of all contestants (5)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a contestant per round (2)")
    parser.add_argument("--all", action="store_true", help="also measure checkpoints and recovery, on the CPU")
    args = parser.parse_args()
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        parser.error(f"--device cuda needs two GPUs, this machine has {torch.cuda.device_count()}")
    contestants = {name: Contestant(name, args) for name in MESHES}
    times: dict[str, list[float]] = {name: [] for name in MESHES}
    try:
        for contestant in contestants.values():
            contestant.seconds(2)
        for _ in range(args.rounds):
            for name, contestant in contestants.items():
                times[name].append(contestant.seconds(args.steps))
    finally:
        for contestant in contestants.values():
            contestant.stop()
    tokens = args.sequences * published_recipe(args.preset).model.context_length
    for name in MESHES:
        middle = statistics.median(times[name])
        print(f"{name:14} {middle * 1e3:10.1f} ms/step {tokens / middle:12,.0f} tokens/s", flush=True)

    def ratio(theirs: str, ours: str) -> float:
        return round(statistics.median(t / o for t, o in zip(times[theirs], times[ours], strict=True)), 3)

    result: dict[str, Any] = {f"{name}_ratio": ratio("one", name) for name in ("way2", "shard2", "replicate2")}
    result["overlap_gain"] = ratio("way2_blocking", "way2")
    flops = tokens * training_flops_per_token(published_recipe(args.preset).model)
    for name in ("one", "way2", "shard2", "replicate2"):
        result[f"{name}_mfu"] = round(flops / statistics.median(times[name]) / contestants[name].rate, 3)
    for name in ("way2", "shard2", "replicate2"):
        devices = MESHES[name]["processes"] if args.device == "cuda" else 1  # on CPUs both sides have all threads
        result[f"{name}_efficiency"] = round(result[f"{name}_ratio"] / devices, 3)
    if args.all:
        for benchmark, key in (("checkpoint", "checkpoint_stall_share"), ("recovery", "recovery_seconds")):
            result[key] = measured_by(benchmark, key)
    print(json.dumps({"preset": args.preset, **result}))


if __name__ == "__main__":
    main()
