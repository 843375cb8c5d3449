"""Seconds from the SIGKILL of a training worker to the first step of the group that replaces it.

    python -m benchmarks.recovery

Real Ray Train with two CPU workers and a tiny model on a cluster of its own; the clock runs from the signal until the
driver's output shows a step again, so that it holds everything a user waits for: noticing the loss, ending the old
group, starting processes, imports, meeting, loading the checkpoint. The last line is JSON: `recovery_seconds`, the
median over `--rounds` kills, and the parts of the last one as the driver's output shows them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import psutil

STEPS_BETWEEN_KILLS = 30

TINY = {
    "data.num-trained-ids": 300,
    "data.validation-fraction": 0.01,
    "model.num-layers": 2,
    "model.width": 16,
    "model.num-heads": 4,
    "model.num-ways": 2,
    "model.context-length": 32,
    "model.vocab-size": 320,
    "train.compile": "off",
    "train.steps": 100_000,
    "train.sequences-per-step": 4,
    "train.sequences-per-microbatch": 4,
    "train.warmup-steps": 2,
    "train.log-every": 1,
    "train.validate-every": 100_000,
    "train.validation-windows": 4,
    "train.checkpoint-every": 10,
    "cluster.max-failures": 100,
}


def measure(rounds: int) -> dict[str, float]:
    """Kill a worker as often; returns the median in seconds, and the parts of the last round."""
    options = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory() as storage:
        driver = subprocess.Popen(
            [sys.executable, "-m", "jobs.pretrain", "quickstart", "--storage", storage, *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            seconds, parts = [], {}
            for _ in range(rounds):
                for _ in range(STEPS_BETWEEN_KILLS):
                    read_until(driver, "pretrain: step ")
                victim = next(process for process in workers(driver.pid))
                killed_at = time.monotonic()
                victim.kill()
                parts["noticed"] = read_until(driver, "failed (") - killed_at
                parts["placed"] = read_until(driver, " workers on ") - killed_at
                seconds.append(read_until(driver, "pretrain: step ") - killed_at)
        finally:
            driver.terminate()
            try:
                driver.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                driver.kill()
    rounded = {f"seconds_until_{name}": round(value, 2) for name, value in parts.items()}
    return {"recovery_seconds": round(statistics.median(seconds), 2), **rounded}


def read_until(driver: subprocess.Popen[str], text: str) -> float:
    """Read the driver's output up to a line with this text; returns when that was."""
    assert driver.stdout is not None
    lines: list[str] = []
    for line in driver.stdout:
        if text in line:
            return time.monotonic()
        lines.append(line)
    raise RuntimeError("training ended:\n" + "".join(lines[-20:]))


def workers(pid: int) -> list[psutil.Process]:
    """The training processes below a driver."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="workers to kill (3)")
    print(json.dumps(measure(parser.parse_args().rounds)))


if __name__ == "__main__":
    main()
