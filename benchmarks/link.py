"""Does Kraken hide its communication on a real link? Two engine processes, one core each, two network namespaces.

    python -m benchmarks.link                              # as root, with iproute2; below ten minutes on two cores
    python -m benchmarks.link --shares 0.35 --rounds 1 --layers 2 --width 256       # does it run?

The namespaces are joined by a pair of virtual Ethernet devices whose rate `tc tbf` limits at both ends, so that an
all-reduce takes the time that it would take on such a link, and nothing in the engine is simulated. One model is a
standard Transformer under tensor parallelism, the others a 2-way Kraken of as many layers and equal parameters, and the
same with ways that read each other a layer later (`kraken_delayed`); weights are random. The rates are chosen so that
the standard model's all-reduces take given shares of its time to first token (TTFT), of one prompt. At every rate all
contestants take turns. `docs/latency.md` says more.

The last line is JSON:

    exposed_communication_max   (overlapped - none) / (blocking - none) of Kraken's TTFTs, the largest over the rates at
                                which Kraken's attention phase is at least as long as one of its all-reduces
    delayed_exposed_max         the same of `kraken_delayed` over all rates
    delayed_ttft_ratio_min      TTFT of Kraken over that of `kraken_delayed`, the smallest over the rates
    speedup_at_35_percent       TTFT of the standard model over that of Kraken, where all-reduces take 35 % of the
                                former; interpolated between the measured shares
    speedup_min, speedup_geomean    over all rates
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from benchmarks.ttft import Contestant, all_reduces_of
from benchmarks.without_all_reduce import RendezvousWithoutAllReduce
from kraken.config import EngineConfig, ModelConfig
from kraken.engine.distributed.rendezvous import Rendezvous
from kraken.plan import cost as plan

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
PAPER_SHARE = 0.35
HOSTS = ("10.213.77.1", "10.213.77.2")
BURST_BYTES = 128 * 1024
"""What may pass at once: two segments as TCP hands them down whole, a few per cent of an all-reduce. With less the
kernel segments them, on the cores that compute."""
QUEUE_BYTES = 64 * 1024 * 1024
"""Nothing is dropped."""
MTU_BYTES = 65000
"""As network cards that segment by themselves are seen by the kernel."""
MODES = ("", " blocking", " none")
CONTESTANTS = ("standard", "standard none", *(name + mode for name in plan.WAY_ARCHITECTURES for mode in MODES))


def call(command: Sequence[str]) -> None:
    """Run a tool, whose complaint becomes ours."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {result.stderr.strip() or result.returncode}")


@dataclass(frozen=True, slots=True)
class Link:
    """Two namespaces and the link between them, whose names no other process uses."""

    spaces: tuple[str, str]

    @classmethod
    @contextlib.contextmanager
    def build(cls) -> Iterator["Link"]:
        """Make both, and remove them however it ends."""
        link = cls((f"kraken-{os.getpid()}-a", f"kraken-{os.getpid()}-b"))
        devices = (f"kra{os.getpid()}", f"krb{os.getpid()}")
        try:
            for space in link.spaces:
                call(["ip", "netns", "add", space])
            a, b = link.spaces
            call(["ip", "link", "add", devices[0], "netns", a, "type", "veth", "peer", "name", devices[1], "netns", b])
            for space, device, host in zip(link.spaces, devices, HOSTS, strict=True):
                call(["ip", "-n", space, "link", "set", device, "name", "link0"])
                call(["ip", "-n", space, "address", "add", f"{host}/24", "dev", "link0"])
                call(["ip", "-n", space, "link", "set", "link0", "mtu", str(MTU_BYTES), "up"])
                call(["ip", "-n", space, "link", "set", "lo", "up"])
                # a connection that pauses between prompts does not begin slowly again
                setting = "net.ipv4.tcp_slow_start_after_idle=0"
                call(["ip", "netns", "exec", space, "sysctl", "-q", "-w", setting])
            yield link
        finally:
            for space in link.spaces:
                subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)

    def limit(self, bytes_per_s: float) -> None:
        """Let so many bytes pass in each direction from now on."""
        for space in self.spaces:
            shape = ["rate", f"{round(8 * bytes_per_s)}bit", "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES)]
            call(["tc", "-n", space, "qdisc", "replace", "dev", "link0", "root", "tbf", *shape])

    def free(self) -> None:
        """As fast as it goes."""
        for space in self.spaces:
            subprocess.run(
                ["tc", "-n", space, "qdisc", "delete", "dev", "link0", "root"], capture_output=True, check=False
            )


def shapes(args: argparse.Namespace) -> dict[str, ModelConfig]:
    """The standard model, and the Kraken model of equal parameters."""
    standard = ModelConfig(
        num_layers=args.layers,
        width=args.width,
        num_heads=args.width // 64,
        num_ways=1,
        ffn_multiple=4,
        context_length=args.prompt_tokens + 1,
        vocab_size=args.vocabulary,
        architecture="standard",
    )
    kraken = plan.matched(standard, "kraken", 2)
    delayed = dataclasses.replace(kraken, architecture="kraken_delayed")
    return {"standard": standard, "kraken": kraken, "kraken_delayed": delayed}


def open_contestant(name: str, shape: ModelConfig, args: argparse.Namespace, link: Link, core: int) -> Contestant:
    """An engine on two processes, the other one in the other namespace and on another core."""
    _, _, mode = name.partition(" ")
    config = EngineConfig(
        device="cpu",
        dtype="float32",
        num_threads=2,
        num_devices=2,
        overlap="blocking" if mode == "blocking" else "overlapped",
        max_batch_size=1,
        max_step_tokens=args.prompt_tokens,
        prefix_reuse=False,
    )
    rendezvous = (RendezvousWithoutAllReduce if mode == "none" else Rendezvous)(2, HOSTS[0])
    rendezvous.launch(1, {1: ["ip", "netns", "exec", link.spaces[1], "taskset", "-c", str(core)]})
    return Contestant(name, shape, config, rendezvous)


def time_attention(contestant: Contestant) -> list[float]:
    """Where the seconds of every attention phase, from c_attn to c_proj, will be found from now on."""
    seconds: list[float] = []

    def timed(attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*args: Any) -> torch.Tensor:
            started_at = time.perf_counter()
            out = attention(*args)
            seconds.append(time.perf_counter() - started_at)
            return out

        return run

    for layer in contestant.runner.network._layers:
        layer._attention = timed(layer._attention)  # type: ignore[method-assign]
    return seconds


def sent_bytes(shape: ModelConfig, prompt_tokens: int) -> int:
    """Bytes that one of two ranks sends in the all-reduces of a prefill's layers."""
    count, message = all_reduces_of(shape, prompt_tokens)
    return count * math.prod(message) * 4


def ttfts(contestants: Sequence[Contestant], prompt_tokens: int, num_rounds: int) -> dict[str, list[float]]:
    """Name -> TTFT in seconds of every round; who begins changes from round to round."""
    times: dict[str, list[float]] = {each.name: [] for each in contestants}
    for each in contestants:
        each.seconds(prompt_tokens)
    for turn in range(num_rounds):
        start = turn % len(contestants)
        for each in [*contestants[start:], *contestants[:start]]:
            times[each.name].append(each.seconds(prompt_tokens)[0])
    return times


def median_difference(later: Sequence[float], earlier: Sequence[float]) -> float:
    """Of two contestants' times round by round, so that what slows a whole round down is in both."""
    return statistics.median(a - b for a, b in zip(later, earlier, strict=True))


def measure(args: argparse.Namespace, link: Link, core: int) -> dict[str, Any]:
    """The whole sweep, in the first namespace."""
    link.free()
    models = shapes(args)
    contestants = [open_contestant(name, models[name.split(" ")[0]], args, link, core) for name in CONTESTANTS]
    attention_s = time_attention(contestants[CONTESTANTS.index("kraken none")])
    say(f"{'model':14} {'parameters':>12} layers width heads  bytes sent per prompt")
    for name, shape in models.items():
        say(
            f"{name:14} {plan.num_parameters(shape):12,} {shape.num_layers:6} {shape.width:5} {shape.num_heads:5} "
            f"{sent_bytes(shape, args.prompt_tokens):,}"
        )
    try:
        none_s = statistics.median(ttfts(contestants, args.prompt_tokens, 3)["standard none"])
        say(f"standard without all-reduces: {none_s * 1e3:.0f} ms; below, TTFTs in ms, medians of {args.rounds}")
        say(
            f"{'link MB/s':>10} {'share':>6} {'standard':>9} {'Kraken':>9} {'blocking':>9} {'none':>9} {'speed-up':>9} "
            f"{'exposed':>8} {'attention':>10} {'one sum':>8} {'delayed':>9} {'none':>9} {'exposed':>8}"
        )
        points = [measure_point(share, none_s, contestants, attention_s, models, args, link) for share in args.shares]
    finally:
        link.free()  # nobody waits for the last frames
        for each in contestants:
            each.close()
    covered = [point["exposed_communication"] for point in points if point["attention_ms"] >= point["sum_ms"]]
    speedups = [point["speedup"] for point in points]
    return {
        "models": {name: dataclasses.asdict(shape) for name, shape in models.items()},
        "parameters": {name: plan.num_parameters(shape) for name, shape in models.items()},
        "prompt_tokens": args.prompt_tokens,
        "points": points,
        "exposed_communication_max": max(covered, default=None),
        "delayed_exposed_max": max(point["delayed_exposed_communication"] for point in points),
        "delayed_ttft_ratio_min": min(point["delayed_ttft_ratio"] for point in points),
        "speedup_at_35_percent": interpolate([(p["share"], p["speedup"]) for p in points], PAPER_SHARE),
        "speedup_min": min(speedups),
        "speedup_geomean": round(math.exp(statistics.fmean(math.log(value) for value in speedups)), 4),
    }


def measure_point(
    share: float,
    none_s: float,
    contestants: Sequence[Contestant],
    attention_s: list[float],
    models: dict[str, ModelConfig],
    args: argparse.Namespace,
    link: Link,
) -> dict[str, Any]:
    """One rate: that at which all-reduces should take this share of the standard model's TTFT; the share that they take
    is measured."""
    bytes_per_s = sent_bytes(models["standard"], args.prompt_tokens) / (none_s * share / (1 - share))
    link.limit(bytes_per_s)
    attention_s.clear()
    rounds_s = ttfts(contestants, args.prompt_tokens, args.rounds)
    ttft_s = {name: statistics.median(values) for name, values in rounds_s.items()}
    waited_s = median_difference(rounds_s["kraken blocking"], rounds_s["kraken none"])
    point: dict[str, Any] = {
        "link_mb_per_s": round(bytes_per_s / 1e6, 3),
        "share": round(1 - ttft_s["standard none"] / ttft_s["standard"], 4),
        "speedup": round(ttft_s["standard"] / ttft_s["kraken"], 4),
        "exposed_communication": exposed(rounds_s, "kraken"),
        "delayed_exposed_communication": exposed(rounds_s, "kraken_delayed"),
        "delayed_ttft_ratio": round(ttft_s["kraken"] / ttft_s["kraken_delayed"], 4),
        "attention_ms": round(statistics.median(attention_s) * 1e3, 3),
        "sum_ms": round(waited_s / max(1, all_reduces_of(models["kraken"], args.prompt_tokens)[0]) * 1e3, 3),
        "ttft_ms": {name: round(value * 1e3, 2) for name, value in ttft_s.items()},
    }
    ms = point["ttft_ms"]
    say(
        f"{point['link_mb_per_s']:10.2f} {point['share']:6.1%} {ms['standard']:9.1f} {ms['kraken']:9.1f} "
        f"{ms['kraken blocking']:9.1f} {ms['kraken none']:9.1f} {point['speedup']:9.3f} "
        f"{point['exposed_communication']:8.3f} {point['attention_ms']:10.2f} {point['sum_ms']:8.2f} "
        f"{ms['kraken_delayed']:9.1f} {ms['kraken_delayed none']:9.1f} {point['delayed_exposed_communication']:8.3f}"
    )
    return point


def exposed(rounds_s: dict[str, list[float]], name: str) -> float:
    """Share of what waiting costs that is left when the all-reduces are overlapped."""
    waited_s = median_difference(rounds_s[f"{name} blocking"], rounds_s[f"{name} none"])
    return round(median_difference(rounds_s[name], rounds_s[f"{name} none"]) / waited_s, 4)


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value at x on straight lines between points; None outside them."""
    for (x0, y0), (x1, y1) in pairwise(sorted(points)):
        if x0 <= x <= x1:
            return round(y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y0, 4)
    return None


def say(text: str) -> None:
    print(text, flush=True)


def require_machine() -> list[int]:
    """The two cores to use; says what is missing."""
    cores = sorted(os.sched_getaffinity(0))
    missing = [tool for tool in ("ip", "tc", "taskset", "sysctl") if shutil.which(tool) is None]
    if sys.platform != "linux" or os.geteuid() != 0:
        raise SystemExit("benchmarks.link makes network namespaces, for which it must run as root on Linux")
    if missing:
        raise SystemExit(f"{missing} are missing; install iproute2, util-linux and procps")
    if len(cores) < 2:
        raise SystemExit("benchmarks.link gives each of two processes a core, and there is only one")
    return cores[:2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1536, help="of the standard model, a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)  # the namespaces, and the other one's core
    args = parser.parse_args()
    if args.inside:
        *spaces, core = args.inside
        print(json.dumps(measure(args, Link((spaces[0], spaces[1])), int(core))))
        return
    first_core, second_core = require_machine()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with Link.build() as link:
        a, b = link.spaces
        command = [*("ip", "netns", "exec", a, "taskset", "-c", str(first_core)), sys.executable, "-m"]
        arguments = ["benchmarks.link", *sys.argv[1:], "--inside", a, b, str(second_core)]
        # the addresses have no names, of which torch warns
        process = subprocess.Popen([*command, *arguments], env=os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"})
        try:
            status = process.wait()
        finally:
            process.kill()  # its worker ends with it
            process.wait()
    sys.exit(status)


if __name__ == "__main__":
    main()
