"""Memory of a training worker: what the plan leads one to expect, and what its device has."""

import shutil
import subprocess
from dataclasses import dataclass

from kraken.config import RunConfig
from kraken.plan import cost as plan
from kraken.plan.roofline import Share, Workload

PROCESS_BYTES = 512 * 2**20
"""Of a process with torch, before it does anything; and of a CUDA context."""
BYTES_PER_VALUE = {"float32": 4, "float64": 8, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Bytes of one worker."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass of one micro-batch."""

    @property
    def total(self) -> int:
        """All of it, with the process itself."""
        return self.weights + self.gradients + self.optimizer + self.activations + PROCESS_BYTES

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations")
        return f"{self.total / 2**30:.1f} GiB (" + ", ".join(f"{n} {getattr(self, n) / 2**30:.1f}" for n in parts) + ")"


def of_worker(config: RunConfig) -> Need:
    """What one worker needs: state divided over ways and shards, activations over ways and data ranks.

    A lower bound, so that nothing is refused that would fit: the measured peaks of docs/training.md are 9 % (four ways)
    and 16 % (two) above it.
    """
    c, train = config.cluster, config.train
    state_bytes = 8 if train.precision == "float64" else 4  # master weights
    # on a GPU "auto" is bfloat16; elsewhere float32 at most
    default = 2 if c.gpus_per_worker else 4
    share = Share(
        config.model,
        c.way_size,
        Workload(
            prompt_length=1,
            sequences_per_microbatch=min(
                train.sequences_per_microbatch, train.sequences_per_step // (c.num_workers // c.way_size)
            ),
            bytes_per_value=BYTES_PER_VALUE.get(train.precision, default),
        ),
    )
    # the embedding is divided over the ways, too
    state = round(plan.num_parameters(config.model) / c.way_size / c.shard_size * state_bytes)
    activations = share.activation_bytes
    if train.recompute_activations:  # one layer's, and every layer's input
        kept = share.ways * config.model.width * config.model.context_length
        inputs = config.model.num_layers * kept * share.workload.sequences_per_microbatch
        activations = activations / config.model.num_layers + inputs * share.workload.bytes_per_value
    moments = 1 if train.optimizer == "muon" else 2
    return Need(weights=state, gradients=state, optimizer=moments * state, activations=round(activations))


def way_out(config: RunConfig) -> str:
    """Settings that would lower the need, those that help most first."""
    need = of_worker(config)
    divide = ["cluster.way_size"] if config.cluster.way_size < config.model.num_ways else []
    ways = [*divide, "cluster.shard_size"]
    fewer = ["train.sequences_per_microbatch"] if config.train.sequences_per_microbatch > 1 else []
    recompute = [] if config.train.recompute_activations else ["set train.recompute_activations"]
    divided, smaller = f"raise {' or '.join(ways)}", [*(f"lower {name}" for name in fewer), *recompute]
    first = need.activations > need.weights + need.gradients + need.optimizer
    options = [*smaller, divided] if first else [divided, *smaller]
    return ", or ".join(options) + ", or use larger nodes"


def of_smallest_gpu() -> int:
    """Bytes of this machine's smallest GPU; 0 without one, or without NVIDIA's tool."""
    if not (tool := shutil.which("nvidia-smi")):
        return 0
    command = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
        return min(int(line) for line in output.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0
