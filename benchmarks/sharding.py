"""Training on meshes of several processes against one process.

    python -m benchmarks.sharding kraken_10m_4way                       # two CPU processes over gloo, one thread each
    python -m benchmarks.sharding kraken_350m_4way --device cuda --processes 4 --sequences 480 --microbatch 32
    python -m benchmarks.sharding kraken_350m_4way --device cuda --meshes way4 shard4 way2xshard2

A mesh is named by its axes: `replicate4`, `shard2`, `way2xshard2`. Each is started, compiled, timed and ended before
the next begins, and its line is printed at once; the single process is timed first and last, so that a machine whose
speed drifts is noticed. All train on random tokens by the published recipe (learned positions, and AdamW, since Muon
cannot be sharded).

Columns and JSON keys of a mesh (`{mesh}_efficiency` and so on):
    tokens/s            of all processes together, median over the rounds
    efficiency          tokens/s of a device over those of one device alone; on CPUs, whose threads are divided among
                        the processes, tokens/s of all over those of one process with all threads
    mfu                 operations per second over the rate of a matrix product in the same type on the same devices
    peak_memory_ratio   largest peak of a process over that of the single process, at the same microbatch
    overlap_gain        tokens/s over those of the same mesh when it waits for each sum over the ways at once
    communication       share of a step's time in which a collective runs, and in which nothing else runs beside it (on
                        CUDA from a profile of one step; on CPUs the time waited for the collectives of this project)
With `--all` the line also holds `checkpoint_stall_share` and `recovery_seconds`, of benchmarks.checkpoint and
benchmarks.recovery, which run afterwards.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.recipe import published_recipe
from kraken.plan.cost import training_flops_per_token
from kraken.presets import PRESETS
from kraken.training.parallel import Mesh, join_mesh
from kraken.training.rate import matrix_rate
from kraken.training.report import peak_bytes
from kraken.training.step import TrainingStep

START_LIMIT_S = 240.0
"""Longest wait for a mesh to start and compile, or for one answer."""
AXIS = re.compile(r"(replicate|shard|way)(\d+)")


@dataclasses.dataclass(frozen=True, slots=True)
class MeshShape:
    """Sizes of the axes."""

    replicate: int = 1
    shard: int = 1
    way: int = 1

    @classmethod
    def parse(cls, name: str) -> "MeshShape":
        """Of `way2xshard2`. Raises: argparse.ArgumentTypeError."""
        axes = [AXIS.fullmatch(part) for part in name.split("x")]
        if not all(axes):
            raise argparse.ArgumentTypeError(f"{name!r} is no mesh; write for example way2, shard4 or way2xshard2")
        return cls(**{axis[1]: int(axis[2]) for axis in axes if axis})

    @property
    def name(self) -> str:
        sizes = {"way": self.way, "shard": self.shard, "replicate": self.replicate}
        return "x".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "one"

    @property
    def num_processes(self) -> int:
        return self.replicate * self.shard * self.way


def default_meshes(num_processes: int, num_ways: int) -> list[MeshShape]:
    """Each axis alone, and ways with shards."""
    whole = [MeshShape(replicate=num_processes), MeshShape(shard=num_processes)]
    ways = [MeshShape(way=num_processes)] if num_ways % num_processes == 0 else []
    mixed = [MeshShape(way=2, shard=num_processes // 2)] if num_processes % 4 == 0 and num_ways % 2 == 0 else []
    return whole + ways + mixed


class Trainee:
    """What one process of a mesh does for the benchmark."""

    def __init__(self, mesh: Mesh, args: argparse.Namespace):
        self.mesh = mesh
        run = published_recipe(args.preset)
        config = dataclasses.replace(
            run.train,
            steps=100_000,
            sequences_per_step=args.sequences,
            sequences_per_microbatch=args.microbatch,
            warmup_steps=0,
            compile="on" if args.device == "cuda" else "off",
            recompute_activations=args.recompute,
        )
        self.step = TrainingStep(run.model, config, mesh)
        self.step.start(config.steps)
        torch.manual_seed(mesh.data_rank)
        shape = (args.sequences // mesh.num_data_ranks, run.model.context_length + 1)
        ids = torch.randint(run.model.vocab_size, shape, device=mesh.device)
        self.batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self.rate = matrix_rate(self.step.precision.compute, mesh.device)

    def seconds(self, num_steps: int) -> tuple[float, float]:
        """Seconds per step, and the share of them that was spent waiting for our collectives, where that is known."""
        self.mesh.barrier()
        self.mesh.communication.read()
        started_at = time.perf_counter()
        for index in range(num_steps):
            norm = self.step(index, *self.batch)[1]
        float(norm)  # waits for the device
        seconds = time.perf_counter() - started_at
        return seconds / num_steps, self.mesh.communication.read() / seconds

    def communication(self) -> tuple[float, float]:
        """Shares of one step's time in which a collective's kernel runs, and in which it runs alone."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            seconds, _ = self.seconds(1)
        kernels = [event for event in profiler.events() if event.device_type.name == "CUDA"]
        spans = [(event.time_range.start, event.time_range.end, "nccl" in event.name.lower()) for event in kernels]
        collective = union([span[:2] for span in spans if span[2]])
        other = union([span[:2] for span in spans if not span[2]])
        together = length(collective) + length(other) - length(union(collective + other))
        return length(collective) / seconds / 1e6, (length(collective) - together) / seconds / 1e6


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans without overlap that cover the same times."""
    covered: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if covered and start <= covered[-1][1]:
            covered[-1] = covered[-1][0], max(end, covered[-1][1])
        else:
            covered.append((start, end))
    return covered


def length(spans: list[tuple[float, float]]) -> float:
    """Time covered by spans without overlap."""
    return sum(end - start for start, end in spans)


def serve(pipe: Connection, rank: int, port: int, shape: MeshShape, overlap: bool, args: argparse.Namespace) -> None:
    """One process of a mesh: answers each request with what was measured, until it gets None."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": shape.num_processes, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in environment.items()} | {"MASTER_PORT": str(port)})
    torch.set_num_threads(max(1, args.threads // shape.num_processes))
    with join_mesh(args.device == "cuda", shape.shard, shape.way, overlap) as mesh:
        trainee = Trainee(mesh, args)
        trainee.seconds(1)
        pipe.send(trainee.rate)
        while (request := pipe.recv()) is not None:
            if request == "communication":
                pipe.send(trainee.communication())
            elif request == "peak":
                pipe.send(peak_bytes(mesh.device))
            else:
                pipe.send(trainee.seconds(request))
        trainee.step.close()


class Contestant:
    """The processes of one mesh."""

    def __init__(self, shape: MeshShape, overlap: bool, args: argparse.Namespace):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.shape = shape
        self.pipes, self.processes = [], []
        for rank in range(shape.num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, port, shape, overlap, args), daemon=True)
            process.start()
            theirs.close()  # so that ours notices when the process ends
            self.pipes.append(ours)
            self.processes.append(process)
        self.rate = sum(self._answers("start and compile"))
        """Floating-point operations per second of all of them."""

    def ask(self, request: Any) -> list[Any]:
        """The answer of each process."""
        for pipe in self.pipes:
            pipe.send(request)
        return self._answers(str(request))

    def _answers(self, what: str) -> list[Any]:
        answers = []
        deadline = time.monotonic() + START_LIMIT_S
        for rank, pipe in enumerate(self.pipes):
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    self.kill()
                    raise SystemExit(
                        f"{self.shape.name}: process {rank} of {len(self.pipes)} did not answer ({what}) within "
                        f"{START_LIMIT_S:.0f} s"
                    )
                answers.append(pipe.recv())
            except EOFError:
                self.kill()
                raise SystemExit(
                    f"{self.shape.name}: process {rank} of {len(self.pipes)} ended; its own message stands above"
                ) from None
        return answers

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def stop(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join(30)
            process.kill()


def measure(shape: MeshShape, args: argparse.Namespace, overlap: bool = True) -> dict[str, float]:
    """One mesh from its start to its end."""
    waits = "" if overlap else ", waiting for every sum"
    print(f"# {shape.name}{waits}: starting and compiling {shape.num_processes} processes", file=sys.stderr, flush=True)
    contestant = Contestant(shape, overlap, args)
    try:
        rounds = [contestant.ask(args.steps) for _ in range(args.rounds)]
        seconds = statistics.median(max(answer[0] for answer in answers) for answers in rounds)
        waiting = statistics.median(max(answer[1] for answer in answers) for answers in rounds)
        busy, exposed = waiting, waiting
        if args.device == "cuda" and shape.num_processes > 1:
            busy, exposed = (max(values) for values in zip(*contestant.ask("communication"), strict=True))
        peak = max(contestant.ask("peak"))
    finally:
        contestant.stop()
    run = published_recipe(args.preset)
    tokens_per_second = args.sequences * run.model.context_length / seconds
    return {
        "tokens_per_second": tokens_per_second,
        "mfu": tokens_per_second * training_flops_per_token(run.model) / contestant.rate,
        "peak_bytes": peak,
        "communication": busy,
        "exposed": exposed,
    }


def measured_by(benchmark: str, key: str) -> Any:
    """A number of another benchmark: of the JSON in its last line."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(output, end="", flush=True)
    return json.loads(output.strip().splitlines()[-1])[key]


def line(name: str, found: dict[str, float], result: dict[str, Any]) -> str:
    """What is printed of a mesh as soon as it is measured."""
    keys = ("efficiency", "mfu", "peak_memory_ratio", "overlap_gain")
    ratios = [result.get(f"{name}_{key}", math.nan) for key in keys]
    return (
        f"{name:18} {found['tokens_per_second']:12,.0f} {ratios[0]:10.3f} {ratios[1]:6.3f} "
        f"{found['peak_bytes'] / 2**30:8.2f} GiB {ratios[2]:6.2f} {ratios[3]:12.3f} "
        f"{found['communication']:13.3f} {found['exposed']:8.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="kraken_10m_4way", choices=sorted(PRESETS), metavar="PRESET")
    parser.add_argument("--processes", type=int, default=2, help="processes of each mesh, where none are named (2)")
    parser.add_argument("--meshes", nargs="+", type=MeshShape.parse, metavar="MESH", help="way2 shard2 way2xshard2 ...")
    parser.add_argument("--sequences", type=int, default=8, help="sequences per step, over all processes (8)")
    parser.add_argument("--microbatch", type=int, help="most sequences of a forward pass (all of them)")
    parser.add_argument("--recompute", action="store_true", help="train.recompute_activations")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of all processes together (2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each mesh (5)")
    parser.add_argument("--steps", type=int, default=2, help="steps of a measurement (2)")
    parser.add_argument("--no-gain", action="store_true", help="leave overlap_gain out, which starts a mesh twice")
    parser.add_argument("--all", action="store_true", help="also measure checkpoints and recovery, on the CPU")
    args = parser.parse_args()
    args.microbatch = args.microbatch or args.sequences
    meshes = args.meshes or default_meshes(args.processes, published_recipe(args.preset).model.num_ways)
    most = max(shape.num_processes for shape in meshes)
    if args.device == "cuda" and torch.cuda.device_count() < most:
        parser.error(f"{most} processes on cuda need {most} GPUs, this machine has {torch.cuda.device_count()}")
    print(
        f"{'mesh':18} {'tokens/s':>12} {'efficiency':>10} {'mfu':>6} {'peak memory':>12} {'ratio':>6} "
        f"{'overlap gain':>12} {'communication':>13} {'exposed':>8}",
        flush=True,
    )
    one = measure(MeshShape(), args)
    result: dict[str, Any] = {"preset": args.preset, "one_mfu": round(one["mfu"], 3)}
    print(line("one", one, result), flush=True)
    for shape in meshes:
        found = measure(shape, args)
        devices = shape.num_processes if args.device == "cuda" else 1
        result[f"{shape.name}_efficiency"] = round(found["tokens_per_second"] / one["tokens_per_second"] / devices, 3)
        result[f"{shape.name}_mfu"] = round(found["mfu"], 3)
        result[f"{shape.name}_peak_memory_ratio"] = round(found["peak_bytes"] / one["peak_bytes"], 3)
        if shape.way > 1 and not args.no_gain:
            blocking = measure(shape, args, overlap=False)
            gain = found["tokens_per_second"] / blocking["tokens_per_second"]
            result[f"{shape.name}_overlap_gain"] = round(gain, 3)
        print(line(shape.name, found, result), flush=True)
    again = measure(MeshShape(), args)
    result["drift"] = round(again["tokens_per_second"] / one["tokens_per_second"], 3)
    print(line("one", again, {}), flush=True)
    if args.all:
        for benchmark, key in (("checkpoint", "checkpoint_stall_share"), ("recovery", "recovery_seconds")):
            result[key] = measured_by(benchmark, key)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
