"""What a shape costs, and which shapes a budget allows: arithmetic on `ModelConfig`, without torch.

`docs/plan.md` derives every formula. Shape letters as in `kraken/model/architecture.py`; FLOPs are floating-point
operations, a multiply-add counting two. `kraken/plan/roofline.py` turns these counts into memory, communication and
time.
"""

import dataclasses
from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

from kraken.config import ConfigError, ModelConfig

NEAR = 0.10
"""A candidate is listed when its parameters are within this fraction of the budget."""
RESHAPED_TOLERANCE = 0.01
"""How near to the budget a shape with other layers or another FFN multiple must come."""
MAX_WIDTH = 2**20
"""Wider ways than this are not considered."""
WIDTH_MULTIPLE = 64
"""Widths in steps of this fill the tiles of matrix kernels; steps of 8 only meet their 16-byte alignment."""
ALIGNED_HEAD_SIZES = (64, 128, 96)
"""Head sizes of aligned shapes, the most widely tuned first."""
WAY_ARCHITECTURES = ("kraken", "kraken_delayed")
FFN_MULTIPLES = range(1, 7)
"""FFN multiples that `reshaped` tries."""

FLASH_HEAD_SIZES = tuple(range(8, 257, 8))
"""Head sizes that flash attention computes without padding."""
TENSORRT_LLM_HEAD_SIZES = (32, 48, 64, 80, 96, 104, 128, 160, 256)
"""Head sizes with both a prefill and a decoding kernel in TensorRT-LLM. 192 has both as well, but on GPUs of compute
capability 9 its prefill kernel has been reported to abort."""


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the model, with the tied head counted once."""
    c = config
    gains = (c.num_layers * c.num_ways * (1 if c.has_one_norm else 2) + 1) * c.width  # ln_f is the one
    positions = c.context_length * c.width if c.positions == "learned" else 0
    return matrix_weights(c) + positions + gains + (_bias_parameters(c) if c.bias else 0)


def matrix_weights(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: the layers, the conjunction and the head."""
    conjunction = config.num_ways * config.width**2 if config.is_kraken else 0
    return layer_weights(config) + conjunction + config.vocab_size * config.width


def layer_weights(config: ModelConfig) -> int:
    """Weights of the matrices of all layers and ways."""
    per_way = 4 * config.width**2 + num_ffn_matrices(config) * config.width * config.ffn_size
    return config.num_layers * config.num_ways * per_way


def prompt_weights(config: ModelConfig) -> int:
    """Weights of the layers that every token of a prompt is multiplied with, where only the last is read out: of the
    others the last layer computes keys and values (and queries beside them)."""
    per_way = config.width**2 + num_ffn_matrices(config) * config.width * config.ffn_size
    return layer_weights(config) - config.num_ways * per_way


def num_ffn_matrices(config: ModelConfig) -> int:
    """Matrices of D * F weights in one FFN: two, or three when gated."""
    return 3 if config.activation == "swiglu" else 2


def _bias_parameters(config: ModelConfig) -> int:
    """Biases of every linear (c_attn, c_proj; c_fc, c_proj; the conjunction) and of every LayerNorm."""
    c = config
    linears = 4 * c.width + (num_ffn_matrices(c) - 1) * c.ffn_size + c.width
    norms = (1 if c.has_one_norm else 2) * c.width
    conjunction = c.width if c.is_kraken else 0
    return c.num_layers * c.num_ways * (linears + norms) + conjunction + c.width


def forward_flops_per_token(config: ModelConfig) -> int:
    """FLOPs of one token's forward pass at the full context, all positions counted (PaLM, 2022, appendix B)."""
    attention = 4 * config.num_layers * config.num_ways * config.width * config.context_length
    return 2 * matrix_weights(config) + attention


def training_flops_per_token(config: ModelConfig) -> int:
    """FLOPs of forward and backward per token: the backward pass is two forward passes."""
    return 3 * forward_flops_per_token(config)


def kv_bytes_per_token(config: ModelConfig, bytes_per_value: int) -> int:
    """Bytes of keys and values that one token leaves in the cache, over all layers and ways."""
    return 2 * config.num_layers * config.num_ways * config.width * bytes_per_value


@dataclass(frozen=True, kw_only=True, slots=True)
class Padding:
    """What kernels ask of a shape."""

    width_multiple: int
    """Widths and FFN sizes are rounded up to a multiple of this."""
    head_sizes: tuple[int, ...]
    """Head sizes with a kernel, ascending; others are padded to the next one."""

    def head_size(self, head_size: int) -> int | None:
        """The head size to compute with, or None where every kernel is too small."""
        return min((size for size in self.head_sizes if size >= head_size), default=None)

    def waste(self, config: ModelConfig) -> float | None:
        """Additional multiply-adds of a forward pass at the full context, as a fraction; None without a kernel."""
        head_size = self.head_size(config.head_size)
        if head_size is None:
            return None
        padded = _multiply_adds(
            config,
            width=_round_up(config.width, self.width_multiple),
            ffn_size=_round_up(config.ffn_size, self.width_multiple),
            attention_width=config.heads_per_way * head_size,
        )
        plain = _multiply_adds(config, width=config.width, ffn_size=config.ffn_size, attention_width=config.width)
        return padded / plain - 1

    def kv_waste(self, config: ModelConfig) -> float | None:
        """Additional bytes of a cached token, as a fraction; None without a kernel."""
        head_size = self.head_size(config.head_size)
        return None if head_size is None else head_size / config.head_size - 1


LEAST_PADDING = Padding(width_multiple=8, head_sizes=FLASH_HEAD_SIZES)
"""The least that lets cuBLAS and flash attention run on 2-byte types."""
FULL_PADDING = Padding(width_multiple=WIDTH_MULTIPLE, head_sizes=TENSORRT_LLM_HEAD_SIZES)
"""Full tiles, and the fused kernels of TensorRT-LLM."""


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _multiply_adds(config: ModelConfig, *, width: int, ffn_size: int, attention_width: int) -> int:
    """Multiply-adds of one token's forward pass; `attention_width` is N*H of a way, which padding parts from D."""
    c = config
    projections = 4 * width * attention_width
    attention = 2 * c.context_length * attention_width
    ffn = num_ffn_matrices(c) * width * ffn_size
    conjunction = c.num_ways * width**2 if c.is_kraken else 0
    return c.num_layers * c.num_ways * (projections + attention + ffn) + conjunction + c.vocab_size * width


Architecture = Literal["kraken", "kraken_delayed", "standard", "parallel"]
Kind = Literal["preset", "exact", "aligned", "reshaped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One row of the table: a shape and what it costs."""

    kind: Kind
    """`preset`: as it is. `exact`: the heads asked for, any width. `aligned`: width a multiple of 64 and head size 64,
    96 or 128. `reshaped`: aligned, and within 1 % by other layers or another FFN multiple."""
    config: ModelConfig
    parameters: int
    deviation: float
    """Parameters over or under the budget, as a fraction of it."""
    forward_flops_per_token: int
    training_flops_per_token: int
    kv_bytes_per_token: int
    width_multiple: int
    """Largest of 64, 8, 1 that divides the width: full tiles, aligned rows, neither."""
    least_waste: float | None
    """Additional multiply-adds with `LEAST_PADDING`; None where flash attention takes no such head."""
    full_waste: float | None
    """Additional multiply-adds with `FULL_PADDING`; None where TensorRT-LLM takes no such head."""
    full_kv_waste: float | None
    """Additional bytes of the cache with `FULL_PADDING`."""
    flash_head_size: int | None
    """Head size flash attention computes with; equal to the head size where it is accepted as it is."""
    tensorrt_llm_head_size: int | None
    """The same of TensorRT-LLM."""


def describe(kind: Kind, config: ModelConfig, budget: int, bytes_per_value: int = 2) -> Candidate:
    """Everything the table says about one shape."""
    parameters = num_parameters(config)
    return Candidate(
        kind=kind,
        config=config,
        parameters=parameters,
        deviation=parameters / budget - 1,
        forward_flops_per_token=forward_flops_per_token(config),
        training_flops_per_token=training_flops_per_token(config),
        kv_bytes_per_token=kv_bytes_per_token(config, bytes_per_value),
        width_multiple=next(multiple for multiple in (WIDTH_MULTIPLE, 8, 1) if config.width % multiple == 0),
        least_waste=LEAST_PADDING.waste(config),
        full_waste=FULL_PADDING.waste(config),
        full_kv_waste=FULL_PADDING.kv_waste(config),
        flash_head_size=LEAST_PADDING.head_size(config.head_size),
        tensorrt_llm_head_size=FULL_PADDING.head_size(config.head_size),
    )


def candidates(shape: ModelConfig, budget: int, *, bytes_per_value: int = 2, num_widths: int = 3) -> list[Candidate]:
    """Shapes near a budget: `exact` ones, then `aligned` ones, then `reshaped` ones, each kind nearest first.

    Args:
        shape: everything but the width is kept; aligned shapes have other heads, reshaped ones other layers or another
            FFN multiple besides.
        budget: parameters.
        bytes_per_value: size of a cached value.
        num_widths: how many widths of each kind.

    Raises:
        ConfigError: a budget that is not positive, or no width within a tenth of it.
    """
    if budget <= 0:
        raise ConfigError(f"budget={budget} is not positive; give a number of parameters, for example 125M")
    kinds: list[tuple[Kind, list[ModelConfig]]] = [
        ("exact", exact(shape, budget)[:num_widths]),
        ("aligned", [config for width in aligned_widths(shape, budget)[:num_widths] for config in width]),
        ("reshaped", reshaped(shape, budget)[:num_widths]),
    ]
    kind_of: dict[ModelConfig, Kind] = {}
    for kind, configs in kinds:
        for config in configs:
            kind_of.setdefault(config, kind)  # a shape is listed once, where it comes first
    rows = [describe(kind, config, budget, bytes_per_value) for config, kind in kind_of.items()]
    nearest = rows[0]
    if abs(nearest.deviation) > NEAR:
        raise ConfigError(
            f"budget={budget}: the nearest width of {shape.num_layers} layers and {shape.num_heads} heads, "
            f"{nearest.config.width}, makes {nearest.parameters:,} parameters; choose a budget near that, or another "
            f"number of layers, heads, or a vocabulary other than {shape.vocab_size}"
        )
    return [row for row in rows if abs(row.deviation) <= NEAR]


def exact(shape: ModelConfig, budget: int) -> list[ModelConfig]:
    """`shape` with the widths nearest to the budget."""
    step = shape.heads_per_way * (2 if shape.positions == "rope" else 1)  # rotations want an even head size
    return [dataclasses.replace(shape, width=width) for width in _widths_near(shape, budget, step)]


def aligned_widths(shape: ModelConfig, budget: int) -> list[list[ModelConfig]]:
    """`shape` with the multiples of 64 nearest to the budget; of each width every head size that divides it."""
    widths = _widths_near(shape, budget, WIDTH_MULTIPLE)
    return [[_with_head_size(shape, width, h) for h in ALIGNED_HEAD_SIZES if width % h == 0] for width in widths]


def reshaped(shape: ModelConfig, budget: int) -> list[ModelConfig]:
    """Aligned shapes within 1 % of the budget: fewest layers added or removed first, then FFN multiples nearest first.

    Head size 64 or 128, whichever brings the heads nearer to those of `shape`. Up to half as many layers more or less
    are tried, at most twelve.
    """
    found = []
    reach = min(shape.num_layers // 2, 12)
    for num_layers in range(shape.num_layers - reach, shape.num_layers + reach + 1):
        for ffn_multiple in FFN_MULTIPLES:
            other = dataclasses.replace(
                shape, num_layers=num_layers, ffn_multiple=ffn_multiple, num_heads=shape.num_ways
            )
            width = _widths_near(other, budget, WIDTH_MULTIPLE)[0]
            options = [_with_head_size(other, width, head_size) for head_size in (64, 128) if width % head_size == 0]
            config = min(options, key=lambda option: abs(option.num_heads - shape.num_heads))
            if abs(num_parameters(config) / budget - 1) <= RESHAPED_TOLERANCE:
                found.append(config)

    def order(config: ModelConfig) -> tuple[int, int, int]:
        return (
            abs(config.num_layers - shape.num_layers),
            abs(config.ffn_multiple - shape.ffn_multiple),
            abs(num_parameters(config) - budget),
        )

    return sorted(found, key=order)


def matched(config: ModelConfig, architecture: Architecture, num_ways: int = 1) -> ModelConfig:
    """The model of another architecture with the layers and, as nearly as widths in steps of 8 allow, the parameters.

    Heads have a size from 48 to 96, 64 where the width allows it. The FFN multiple is the usual one: 2 for Kraken, 4
    for the baselines. A model of that architecture already is its own partner.

    Args:
        num_ways: ways of the partner; only Kraken has more than one.
    """
    if config.architecture == architecture:
        return config
    shape = dataclasses.replace(
        config,
        architecture=architecture,
        num_ways=num_ways,
        num_heads=num_ways,
        ffn_multiple=2 if architecture in WAY_ARCHITECTURES else 4,
    )
    for width in _widths_near(shape, num_parameters(config), 8):
        head_sizes = [head_size for head_size in range(48, 97, 8) if width % head_size == 0]
        if head_sizes:
            return _with_head_size(shape, width, min(head_sizes, key=lambda head_size: abs(head_size - 64)))
    raise ConfigError(
        f"no {architecture} model of {config.num_layers} layers has about {num_parameters(config):,} parameters and a "
        "head size from 48 to 96; compare a larger model"
    )


def _with_head_size(shape: ModelConfig, width: int, head_size: int) -> ModelConfig:
    return dataclasses.replace(shape, width=width, num_heads=shape.num_ways * width // head_size)


def _widths_near(shape: ModelConfig, budget: int, step: int) -> list[int]:
    """Multiples of `step`, those nearest to the budget first; at least one, at most 16."""

    def parameters(width: int) -> int:
        return num_parameters(dataclasses.replace(shape, width=width, num_heads=shape.num_ways))

    widths = range(step, MAX_WIDTH + step, step)
    first = bisect_left(widths, budget, key=parameters)
    return sorted(widths[max(0, first - 8) : first + 8], key=lambda width: abs(parameters(width) - budget))
