"""Memory, communication and time to first token that a shape leads one to expect on several devices: a roofline.

A kernel takes the longer of its arithmetic at the device's matrix rate and its traffic at the memory's bandwidth; the
kernels of a device follow one another, and nothing else takes time but all-reduces. `docs/plan.md` derives the formulas
and works one example. Everything is of one device out of n. Shape letters as in `kraken/model/architecture.py`, and M
= B * T.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from kraken.config import ConfigError, ModelConfig
from kraken.plan import cost as plan
from kraken.plan.cost import Architecture

ARCHITECTURES: tuple[Architecture, ...] = ("standard", "parallel", "kraken", "kraken_delayed")
MASTER_BYTES = 4
"""Size of a master weight, of its gradient and of each of Adam's two moments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """Equal devices in a ring, and what they reach: measured rates make a better prediction than data sheets."""

    num_devices: int
    link_gb_per_s: float
    """10^9 bytes per second that a device sends while it receives as much."""
    link_latency_us: float
    """Microseconds of one step of the ring besides its bytes."""
    matrix_tflop_per_s: float
    """10^12 FLOPs per second of matrix products in the compute type."""
    memory_gb_per_s: float
    """10^9 bytes per second of the device's memory."""

    def __post_init__(self) -> None:
        _require_positive(self, "num_devices", "link_gb_per_s", "matrix_tflop_per_s", "memory_gb_per_s")
        if not self.link_latency_us >= 0:
            raise ConfigError(f"link_latency_us={self.link_latency_us} is negative; 0 is a link without latency")


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What the devices are asked to do."""

    prompt_length: int
    """Tokens of each prompt [T]."""
    batch_size: int = 1
    """Prompts at once [B], and contexts that the cache holds."""
    sequences_per_step: int = 480
    """Training: sequences of a full context in one optimizer step, over all devices."""
    sequences_per_microbatch: int = 8
    """Training: sequences whose activations are held at once."""
    bytes_per_value: int = 2
    """Size of a weight, an activation and a cached value in the compute type."""

    def __post_init__(self) -> None:
        _require_positive(
            self,
            *("prompt_length", "batch_size", "sequences_per_step", "sequences_per_microbatch", "bytes_per_value"),
        )


def _require_positive(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if not value > 0:
            raise ConfigError(f"{name}={value} is not positive; choose a value above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingCost:
    """What training asks of a device."""

    state_bytes: int
    """Master weights, gradients and Adam's moments."""
    activation_bytes: int
    """Activations kept for the backward pass of one micro-batch; an estimate."""
    sent_bytes_per_step: int
    """Bytes that a device sends in one optimizer step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What to expect of one model."""

    config: ModelConfig
    parameters: int
    weight_bytes: int
    """Serving: weights on a device."""
    kv_bytes: int
    """Serving: cache of `batch_size` full contexts on a device."""
    prefill_sent_bytes: int
    """Bytes that a device sends in a prefill."""
    attention_us: float
    """Attention phase of a layer: from the layer's input to the residual after attention."""
    ffn_us: float
    """The rest of a layer."""
    all_reduce_us: float
    """One all-reduce of a layer."""
    num_all_reduces: int
    """All-reduces of all layers in a prefill."""
    exposed_us: float
    """What one of them adds when the architecture overlaps it; all of it where it cannot."""
    readout_us: float
    """Embedding, conjunction and head with their communication."""
    ttft_waited_ms: float
    """Time to first token when every all-reduce is waited for."""
    ttft_overlapped_ms: float
    """Time to first token with the overlap that the architecture allows; only the two Krakens allow any."""
    data_parallel: TrainingCost
    """Training with the whole model on every device."""
    model_parallel: TrainingCost
    """Training with Kraken's ways on different devices, or tensor parallelism of the baselines."""


def compare(config: ModelConfig, devices: Devices, workload: Workload) -> list[Prediction]:
    """All architectures at equal parameters: `config` and its partners (`plan.matched`).

    Raises:
        ConfigError: ways that the devices do not divide, or a prompt longer than the context.
    """
    models = [
        plan.matched(config, architecture, _partner_ways(architecture, devices)) for architecture in ARCHITECTURES
    ]
    return [predict(model, devices, workload) for model in models]


def _partner_ways(architecture: Architecture, devices: Devices) -> int:
    return devices.num_devices if architecture in plan.WAY_ARCHITECTURES else 1


def predict(config: ModelConfig, devices: Devices, workload: Workload) -> Prediction:
    """One model on these devices, Kraken's ways or the baselines' tensors divided evenly among them.

    Raises:
        ConfigError: ways that the devices do not divide, or a prompt longer than the context.
    """
    _check(config, devices, workload)
    share = Share(config, devices.num_devices, workload)
    attention_s = seconds(share.attention_kernels(), devices)
    ffn_s = seconds(share.ffn_kernels(), devices)
    all_reduce_s = ring_seconds(share.payload_bytes, devices)
    readout_s = seconds(share.readout_kernels(), devices) + share.readout_link_seconds(devices)
    hidden_s = {"kraken": attention_s, "kraken_delayed": attention_s + ffn_s}.get(config.architecture, 0.0)
    exposed_s = max(0.0, all_reduce_s - hidden_s)
    computing_s = config.num_layers * (attention_s + ffn_s) + readout_s
    return Prediction(
        config=config,
        parameters=plan.num_parameters(config),
        weight_bytes=round(share.num_parameters * workload.bytes_per_value),
        kv_bytes=round(share.kv_bytes),
        prefill_sent_bytes=round(share.prefill_sent_bytes),
        attention_us=attention_s * 1e6,
        ffn_us=ffn_s * 1e6,
        all_reduce_us=all_reduce_s * 1e6,
        num_all_reduces=share.num_all_reduces,
        exposed_us=exposed_s * 1e6,
        readout_us=readout_s * 1e6,
        ttft_waited_ms=(computing_s + share.num_all_reduces * all_reduce_s) * 1e3,
        ttft_overlapped_ms=(computing_s + share.num_all_reduces * exposed_s) * 1e3,
        data_parallel=data_parallel_training(config, devices.num_devices, workload),
        model_parallel=model_parallel_training(share),
    )


def _check(config: ModelConfig, devices: Devices, workload: Workload) -> None:
    n = devices.num_devices
    if config.is_kraken and config.num_ways % n:
        choices = [count for count in range(1, config.num_ways + 1) if config.num_ways % count == 0]
        raise ConfigError(
            f"num_devices={n} does not divide the {config.num_ways} ways; choose from {choices}, or {n} ways"
        )
    if workload.prompt_length > config.context_length:
        raise ConfigError(
            f"prompt_length={workload.prompt_length} is past the context of {config.context_length}; choose a shorter "
            "prompt or a longer context"
        )


def data_parallel_training(config: ModelConfig, num_devices: int, workload: Workload) -> TrainingCost:
    """Every device holds the model; once a step the gradients are all-reduced."""
    state = MASTER_BYTES * plan.num_parameters(config)
    return TrainingCost(
        state_bytes=4 * state,
        activation_bytes=round(Share(config, 1, workload).activation_bytes),
        sent_bytes_per_step=round(ring_bytes(state, num_devices)),
    )


def model_parallel_training(share: "Share") -> TrainingCost:
    """The layers are divided; their all-reduces come once more in the backward pass."""
    tokens = share.workload.sequences_per_step * share.config.context_length
    # every layer's forward and backward; forward of the conjunction; backward of the head, whose rows are divided
    num_sums = 2 * share.num_all_reduces + (2 if share.config.is_kraken else 1)
    activations = num_sums * tokens * share.config.width * share.workload.bytes_per_value
    gradients = MASTER_BYTES * share.replicated_parameters
    return TrainingCost(
        state_bytes=round(4 * MASTER_BYTES * share.num_parameters),
        activation_bytes=round(share.activation_bytes),
        sent_bytes_per_step=round(ring_bytes(activations + gradients, share.num_devices)),
    )


def ring_bytes(payload_bytes: float, num_devices: int) -> float:
    """What a device sends in an all-reduce: a reduce-scatter and an all-gather, (n-1)/n of the payload each."""
    return 2 * (num_devices - 1) / num_devices * payload_bytes


def ring_seconds(payload_bytes: float, devices: Devices) -> float:
    """An all-reduce in 2(n-1) steps, each with its latency; nothing on one device."""
    n = devices.num_devices
    return ring_bytes(payload_bytes, n) / (devices.link_gb_per_s * 1e9) + 2 * (n - 1) * devices.link_latency_us * 1e-6


@dataclass(frozen=True, slots=True)
class Kernel:
    """What one kernel computes and moves on one device."""

    flops: float
    num_bytes: float


def seconds(kernels: Iterable[Kernel], devices: Devices) -> float:
    """Kernels one after another, each at the roof that it reaches first."""
    flops_per_s, bytes_per_s = devices.matrix_tflop_per_s * 1e12, devices.memory_gb_per_s * 1e9
    return sum(max(kernel.flops / flops_per_s, kernel.num_bytes / bytes_per_s) for kernel in kernels)


@dataclass(frozen=True, slots=True)
class Share:
    """One device's share of a model and a workload."""

    config: ModelConfig
    num_devices: int
    workload: Workload

    @property
    def ways(self) -> float:
        """Ways on this device; the baselines' one way is on every device in part."""
        return self.config.num_ways / self.num_devices if self.config.is_kraken else 1

    @property
    def split(self) -> int:
        """Devices that share the matrices of one way."""
        return 1 if self.config.is_kraken else self.num_devices

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of the batch [M]."""
        return self.workload.batch_size * self.workload.prompt_length

    @property
    def payload_bytes(self) -> int:
        """What one all-reduce of a layer sums, [M, D]."""
        return self.num_tokens * self.config.width * self.workload.bytes_per_value

    @property
    def num_all_reduces(self) -> int:
        """All-reduces of all layers; the first layers of the two Krakens need none, nor does the last delayed one."""
        layers = self.config.num_layers
        return {
            "kraken": layers - 1,
            "kraken_delayed": max(0, layers - 2),
            "standard": 2 * layers,
            "parallel": layers,
        }[self.config.architecture]

    @property
    def replicated_parameters(self) -> int:
        """Embedding (and head), positions and the last gain, which every device holds."""
        positions = self.config.context_length if self.config.positions == "learned" else 0
        return (self.config.vocab_size + positions + 1) * self.config.width

    @property
    def num_parameters(self) -> float:
        """Parameters on this device; the vectors that tensor parallelism replicates count as divided."""
        divided = plan.num_parameters(self.config) - self.replicated_parameters
        return self.replicated_parameters + divided / self.num_devices

    @property
    def kv_bytes(self) -> float:
        """Keys and values of `batch_size` full contexts."""
        tokens = self.workload.batch_size * self.config.context_length
        return plan.kv_bytes_per_token(self.config, self.workload.bytes_per_value) * tokens / self.num_devices

    @property
    def activation_bytes(self) -> float:
        """Activations of one micro-batch that the backward pass reads.

        Per token, layer and way: input and output of both norms, 4D (2D with one norm); q, k, v and the
        attention's output, 4D; in the FFN 2F, before and after the activation, or 4F when gated.
        """
        c = self.config
        norms = (2 if c.has_one_norm else 4) * c.width
        inner = 4 * c.width + (4 if c.activation == "swiglu" else 2) * c.ffn_size
        tokens = self.workload.sequences_per_microbatch * c.context_length
        per_token = c.num_layers * self.ways * (norms + inner / self.split)
        return per_token * tokens * self.workload.bytes_per_value

    def attention_kernels(self) -> list[Kernel]:
        """One layer from its input to the residual after attention."""
        tokens, width = self.num_tokens, self.config.width
        channels = self.ways * width / self.split
        # a causal kernel computes half of 4 * M * T * channels
        products = Kernel(
            2 * tokens * self.workload.prompt_length * channels,
            4 * tokens * channels * self.workload.bytes_per_value,
        )
        kernels = [
            self._moves(2 * self.ways * tokens * width),  # ln_1
            self._linear(tokens, width, 3 * width / self.split),
            products,
            self._linear(tokens, width / self.split, width),
        ]
        if not self.config.has_one_norm:  # with one norm everything is added at the end
            kernels.append(self._moves(3 * self.ways * tokens * width))
        return kernels

    def ffn_kernels(self) -> list[Kernel]:
        """The rest of one layer: what is added and normalised, and the FFN."""
        tokens, width, hidden = self.num_tokens, self.config.width, self.config.ffn_size / self.split
        matrices = plan.num_ffn_matrices(self.config)
        # vectors moved: S, x and a in, their sum out | ln_2 | residual; with one norm three vectors are added, to which
        # the delayed Kraken adds S and the input of the layer before
        vectors = {"kraken": 4 + 2 + 3, "kraken_delayed": 4 + 2, "standard": 2 + 3, "parallel": 4}

        return [
            self._moves(vectors[self.config.architecture] * self.ways * tokens * width),
            self._linear(tokens, width, (matrices - 1) * hidden),
            self._moves(matrices * self.ways * tokens * hidden),  # the activation
            self._linear(tokens, hidden, width),
        ]

    def readout_kernels(self) -> list[Kernel]:
        """Embedding of all tokens; conjunction and this device's rows of the head for the last of each prompt."""
        width, prompts = self.config.width, self.workload.batch_size
        rows = self.config.vocab_size / self.num_devices
        values = prompts * width + width * rows + prompts * rows
        kernels = [
            self._moves(3 * self.num_tokens * width),
            Kernel(2 * prompts * width * rows, values * self.workload.bytes_per_value),
        ]
        return [*kernels, self._linear(prompts, width, width)] if self.config.is_kraken else kernels

    def readout_link_seconds(self, devices: Devices) -> float:
        """The conjunction's all-reduce, and the all-gather of the logits, both waited for."""
        n = self.num_devices
        gather = self._gather_bytes / (devices.link_gb_per_s * 1e9) + (n - 1) * devices.link_latency_us * 1e-6
        return gather + (ring_seconds(self._conjunction_bytes, devices) if self.config.is_kraken else 0.0)

    @property
    def prefill_sent_bytes(self) -> float:
        """Bytes that this device sends in a prefill, the readout's included."""
        sums = self.num_all_reduces * self.payload_bytes + (self._conjunction_bytes if self.config.is_kraken else 0)
        return ring_bytes(sums, self.num_devices) + self._gather_bytes

    @property
    def _conjunction_bytes(self) -> int:
        return self.workload.batch_size * self.config.width * self.workload.bytes_per_value

    @property
    def _gather_bytes(self) -> float:
        logits = self.workload.batch_size * self.config.vocab_size * self.workload.bytes_per_value
        return (self.num_devices - 1) / self.num_devices * logits

    def _linear(self, rows: float, num_inputs: float, num_outputs: float) -> Kernel:
        """One product of [rows, inputs] and [inputs, outputs] per way; inputs, weights and outputs move once."""
        values = rows * num_inputs + num_inputs * num_outputs + rows * num_outputs
        flops = 2 * self.ways * rows * num_inputs * num_outputs
        return Kernel(flops, self.ways * values * self.workload.bytes_per_value)

    def _moves(self, num_values: float) -> Kernel:
        """Elementwise work: `num_values` read or written."""
        return Kernel(0, num_values * self.workload.bytes_per_value)
