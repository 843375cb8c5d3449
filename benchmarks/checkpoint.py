"""What checkpoints cost training: written beside the steps, and with training waiting for them, against none.

    python -m benchmarks.checkpoint kraken_10m_4way                                      # two CPU cores
    python -m benchmarks.checkpoint kraken_125m_4way --device cuda --sequences 16 --every 100

One process trains on random tokens by the published recipe, with AdamW's two moments in a checkpoint. It does so in
intervals of `--every` steps, and takes turns in what follows an interval's first step: a checkpoint in the background,
one that training waits for, or none. The last line is JSON, of medians over the
rounds:

    checkpoint_stall_share    seconds of an interval with a checkpoint in the background over one without, less 1
    standing_still_share      seconds that training itself measured as standing still, over those of the interval
    synchronous_stall_share   as checkpoint_stall_share, where training waits
    stall_ratio_to_synchronous   the first over the third: what the background leaves of the stall

An interval ends when the device has finished its steps and the checkpoint is durable, so that nothing of it runs in the
next one. Shares are for a checkpoint every `--every` steps; of rarer ones they are that much smaller.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.recipe import published_recipe
from kraken.config import to_dict
from kraken.presets import PRESETS
from kraken.stopwatch import Stopwatch
from kraken.training.checkpointer import Checkpointer, Label
from kraken.training.control_all_reduce import ControlAllReduce
from kraken.training.parallel import Mesh
from kraken.training.state import TrainingState
from kraken.training.step import TrainingStep

KINDS = ("background", "synchronous", "none")


class Bench:
    """A training step and a checkpointer, and the seconds of an interval of steps."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.every, self.device = args.every, torch.device(args.device)
        run = published_recipe(args.preset)
        config = dataclasses.replace(
            run.train,
            steps=100_000,
            warmup_steps=0,
            sequences_per_step=args.sequences,
            sequences_per_microbatch=args.sequences,
            compile="on" if args.device == "cuda" else "off",
        )
        mesh = Mesh(self.device, communication=Stopwatch(self.device))
        self.control = ControlAllReduce(mesh, 600.0)
        label = Label(config=to_dict(run.model), data_fingerprint="random", tokenizer_fingerprint="random")
        self.checkpointer = Checkpointer(
            folder, mesh, self.control, label, keep=1, keep_best=False, on_finished=lambda step, path: None
        )
        self.step = TrainingStep(run.model, config, mesh)
        self.state = TrainingState(self.step, mesh)
        self.step.start(config.steps)
        self.step.before_update = self.checkpointer.snapshot.before_change
        ids = torch.randint(run.model.vocab_size, (args.sequences, run.model.context_length + 1), device=self.device)
        self.batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self.done = 0

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def interval(self, kind: str) -> tuple[float, float]:
        """Seconds of an interval, and how many of them training says that it stood still for a checkpoint."""
        self.checkpointer.waiting.read(), self.checkpointer.snapshot_waiting.read()
        self.wait()
        started_at = time.perf_counter()
        for index in range(self.every):
            self.step(self.done, *self.batch)
            self.done += 1
            if (numbers := self.control.result()) is not None:
                self.checkpointer.advance(*numbers)
            if index == 0 and kind != "none":
                self.wait()  # as training does, to see that nothing bad is written
                self.checkpointer.start(self.done, self.state.to_write(), [], {})
                if kind == "synchronous":
                    self.checkpointer.finish(must_succeed=True)
            self.control.start(self.checkpointer.numbers())
        self.wait()
        seconds = time.perf_counter() - started_at
        self.step.bad_steps()
        still = self.checkpointer.waiting.read() + self.checkpointer.snapshot_waiting.read()
        self.control.result()
        if self.checkpointer.is_busy:
            print(f"an interval of {seconds:.1f} s is shorter than a checkpoint; raise --every", flush=True)
        self.checkpointer.finish(must_succeed=True)
        return seconds, still


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", nargs="?", default="kraken_10m_4way", choices=sorted(PRESETS), metavar="PRESET")
    parser.add_argument("--sequences", type=int, default=8, help="sequences per step, in one micro-batch (8)")
    parser.add_argument("--every", type=int, default=10, help="steps of an interval, with one checkpoint in it (10)")
    parser.add_argument("--rounds", type=int, default=3, help="alternations of the three kinds of interval (3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (the temporary folder)")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kraken-checkpoint-", dir=args.folder))
    try:
        bench = Bench(args, folder)
        with bench.checkpointer:
            for kind in ("none", "background"):  # compiles, and makes the buffers
                bench.interval(kind)
            measured: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
            for _ in range(args.rounds):
                for kind in KINDS:
                    measured[kind].append(bench.interval(kind))
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for kind in KINDS:
        seconds = statistics.median(seconds for seconds, _ in measured[kind])
        print(f"{kind:12} {seconds:8.3f} s per interval", flush=True)

    def share(kind: str) -> float:
        pairs = zip(measured[kind], measured["none"], strict=True)
        return statistics.median(with_one / without - 1 for (with_one, _), (without, _) in pairs)

    background, synchronous = share("background"), share("synchronous")
    result = {
        "preset": args.preset,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "steps_per_checkpoint": args.every,
        "checkpoint_bytes": num_bytes,
        "checkpoint_stall_share": round(background, 4),
        "standing_still_share": round(statistics.median(still / s for s, still in measured["background"]), 4),
        "synchronous_stall_share": round(synchronous, 4),
        "stall_ratio_to_synchronous": round(background / synchronous, 3) if synchronous > 0 else None,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
