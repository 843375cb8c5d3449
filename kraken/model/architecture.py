"""The architectures, whole, on one device: Kraken and the two baselines that it is compared with.

Every layer of Kraken consists of W independent sub-layers, the ways. With x_i the input of way i, one layer computes

    a_i  = x_i + Attn_i(LN1_i(x_i))                     needs nothing from the other ways
    S    = sum_j x_j                                    the one all-reduce of a layer; may run during the line above
    x_i' = a_i + FFN_i(LN2_i(a_i + (S - x_i)))          reads the sum of the OTHER ways' inputs

The first layer has no incoming sum: all ways start from the same embedding. After the last layer the ways are
concatenated, brought back to width D by one linear (the conjunction), normalised and read out by the tied embedding.
Source: Prabhakar, Zhang, Wentzlaff, "Kraken", NeurIPS 2024 (arXiv 2408.07802). A way is the paper's sub-layer and the
published code's split (`num_splits`, `n_heads_in_split`).

`kraken_delayed` lets a way read the others' states one layer later, everywhere, with attention and FFN side by side:

    n_i  = LN_i(x_i + S - y_i)                          y_i: the way's input of the layer BEFORE; S = sum_j y_j
    x_i' = x_i + Attn_i(n_i) + FFN_i(n_i)

An all-reduce starts with a layer and is read by the next one, so that it may run during all of the layer. The first
layer reads no other way. The second reads the sum of W equal embeddings, and nothing reads the sum of the last layer's
inputs: L - 2 all-reduces.

The baselines have one way and no conjunction. `standard` is the pre-LayerNorm Transformer of GPT-2, with two
all-reduces a layer under tensor parallelism, both waited for; `parallel` is the block of GPT-J and PaLM, which waits
for one:

    standard:  a = x + Attn(LN1(x));  x' = a + FFN(LN2(a))
    parallel:  x' = x + Attn(LN1(x)) + FFN(LN1(x))

Shape letters: B batch, T sequence, W ways, D width of a way, N heads per way, H head size, F FFN hidden size,
V padded vocabulary; I and O are the inputs and outputs of any linear. The ways are a dimension of the weights, so that
a layer is a few batched matrix products and one attention call, whatever W is.
"""

import hashlib
import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import skip_init
from torch.utils.checkpoint import checkpoint

from kraken.config import ModelConfig
from kraken.model.alignment import Alignment, pad
from kraken.model.loss import chunk_gradient, chunked_cross_entropy
from kraken.model.precision import compute_dtype
from kraken.model.residual_norm import LAYER_NORM_EPSILON, add_norm, add_reduced_norm
from kraken.model.ways import WayGroup

INIT_STD = 0.02
COMPILE_OPTIONS: dict[str, Any] = {"reorder_for_peak_memory": False}
"""Of a compiled layer. Its sum must start where the code starts it: moved next to its wait it would hide nothing."""
VALUES_PER_LOAD = 8
"""16 bytes of 16-bit values, which rows must be multiples of for tensor cores."""
FASTEST_ATTENTION_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, each [B or 1, T, 1, H/2]."""


def causal_attention(q_WBTNH: Tensor, k_WBTNH: Tensor, v_WBTNH: Tensor, head_size: int) -> Tensor:
    """Full causal attention, one call over all ways' heads; `head_size` is the one without padding."""
    # [W, B, T, N, H] -> [W*B, N, T, H], a view: ways are just more of the batch
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q_WBTNH, k_WBTNH, v_WBTNH))
    # cuDNN's kernels are up to twice as fast as flash attention's on Hopper, and take what both take; no CPU has them
    with sdpa_kernel(FASTEST_ATTENTION_FIRST, set_priority=True) if q.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=head_size**-0.5)
    return out.transpose(1, 2).unflatten(0, q_WBTNH.shape[:2])


class BatchedProduct(torch.autograd.Function):
    """W products of inputs and transposed weights: [W, R, I] and [W, O, I] -> [W, R, O].

    torch's own gradient by the weights comes out transposed, and is copied when it is stored beside them.
    """

    @staticmethod
    def forward(ctx: Any, x_WRI: Tensor, weight_WOI: Tensor) -> Tensor:
        ctx.save_for_backward(x_WRI, weight_WOI)
        return torch.bmm(x_WRI, weight_WOI.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, grad_WRO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_WRI, weight_WOI = ctx.saved_tensors
        by_input, by_weight = ctx.needs_input_grad
        return (
            torch.bmm(grad_WRO, weight_WOI) if by_input else None,
            torch.bmm(grad_WRO.transpose(1, 2), x_WRI) if by_weight else None,
        )


def batched_linear(x_WBTI: Tensor, weight_WOI: Tensor, bias_WO: Tensor | None) -> Tensor:
    """W linears as one batched product: [W, B, T, I] -> [W, B, T, O]."""
    if len(weight_WOI) == 1:  # a plain product reads its inputs with any stride
        return F.linear(x_WBTI, weight_WOI[0], None if bias_WO is None else bias_WO[0])
    dtype = compute_dtype(x_WBTI)
    y_WRO: Tensor = BatchedProduct.apply(x_WBTI.flatten(1, 2).to(dtype), weight_WOI.to(dtype))
    y_WBTO = y_WRO.unflatten(1, x_WBTI.shape[1:3])
    return y_WBTO if bias_WO is None else y_WBTO + bias_WO[:, None, None].to(dtype)


class WayLinear(nn.Module):
    """The parameters of W linears, one per way; whoever owns it knows how they are padded."""

    def __init__(self, num_ways: int, num_inputs: int, num_outputs: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_ways, num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.empty(num_ways, num_outputs)) if bias else None


class WayNorm(nn.Module):
    """The gains and biases of a LayerNorm per way, which the linear that reads it takes over."""

    def __init__(self, num_ways: int, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_ways, width))
        self.bias = nn.Parameter(torch.empty(num_ways, width)) if bias else None

    def fold(self, linear: WayLinear) -> tuple[Tensor, Tensor | None]:
        """Weights [W, O, D] and biases [W, O] with which `linear` may read what is normalised only.

        (n * gain + bias) @ A^T + b  =  n @ (A * gain)^T + (A @ bias + b)
        """
        weight_WOD = linear.weight * self.weight[:, None]
        if self.bias is None:
            return weight_WOD, linear.bias
        moved_WO = (linear.weight * self.bias[:, None]).sum(dim=-1)  # a product would be in autocast's type
        return weight_WOD, moved_WO if linear.bias is None else moved_WO + linear.bias


class Attention(nn.Module):
    """Causal self-attention inside each way."""

    def __init__(self, config: ModelConfig, num_ways: int):
        super().__init__()
        self.width, self.num_heads, self.head_size = config.width, config.heads_per_way, config.head_size
        self.c_attn = WayLinear(num_ways, config.width, 3 * config.width, config.bias)
        self.c_proj = WayLinear(num_ways, config.width, config.width, config.bias)
        self.alignment = Alignment()

    def forward(self, x_WBTD: Tensor, norm: WayNorm, rotation: Rotation | None) -> Tensor:
        """Attention of normalised input, padded as its output is."""
        D, H = self.alignment.padded_width(self.width), self.alignment.padded_head_size(self.head_size)
        heads = (3, self.num_heads, self.head_size)
        weight, bias = norm.fold(self.c_attn)
        weight = pad(weight.unflatten(1, heads), H, D).flatten(1, 3)
        bias = None if bias is None else pad(bias.unflatten(1, heads), H).flatten(1)
        # [W, B, T, 3*N*H] -> three of [W, B, T, N, H]; the published order is q, k, v
        q, k, v = batched_linear(x_WBTD, weight, bias).unflatten(-1, (3, self.num_heads, H)).unbind(dim=3)
        if rotation is not None:
            q, k = (pad(rotate(x[..., : self.head_size], rotation), H) for x in (q, k))
        out_WBTNH = causal_attention(q, k, v, self.head_size)
        weight = pad(self.c_proj.weight.unflatten(2, heads[1:]), D, None, H).flatten(2)
        bias = None if self.c_proj.bias is None else pad(self.c_proj.bias, D)
        return batched_linear(out_WBTNH.flatten(-2), weight, bias)


class MLP(nn.Module):
    """The feed-forward network of each way: GELU, or SwiGLU with the gate's rows first in `c_fc`."""

    def __init__(self, config: ModelConfig, num_ways: int):
        super().__init__()
        self.width, self.ffn_size, self.gated = config.width, config.ffn_size, config.activation == "swiglu"
        num_hidden = (2 if self.gated else 1) * config.ffn_size
        self.c_fc = WayLinear(num_ways, config.width, num_hidden, config.bias)
        self.c_proj = WayLinear(num_ways, config.ffn_size, config.width, config.bias)
        self.alignment = Alignment()

    def forward(self, x_WBTD: Tensor, norm: WayNorm) -> Tensor:
        """The FFN of normalised input, padded as its output is."""
        D, hidden = self.alignment.padded_width(self.width), self.alignment.padded_width(self.ffn_size)
        parts = (-1, self.ffn_size)  # one, or the gate and what it gates
        weight, bias = norm.fold(self.c_fc)
        weight = pad(weight.unflatten(1, parts), hidden, D).flatten(1, 2)
        bias = None if bias is None else pad(bias.unflatten(1, parts), hidden).flatten(1)
        y_WBTF = batched_linear(x_WBTD, weight, bias)
        if self.gated:
            gate, y_WBTF = y_WBTF.chunk(2, dim=-1)
            y_WBTF = F.silu(gate) * y_WBTF
        else:
            y_WBTF = F.gelu(y_WBTF, approximate="tanh")
        bias = None if self.c_proj.bias is None else pad(self.c_proj.bias, D)
        return batched_linear(y_WBTF, pad(self.c_proj.weight, D, hidden), bias)


class Layer(nn.Module):
    """One layer of the ways held here; see the module's docstring for the equations."""

    def __init__(self, config: ModelConfig, layer_index: int, ways: WayGroup):
        super().__init__()
        num_ways = len(ways.part(config.num_ways))
        self.ways = ways
        self.reads_others = config.architecture == "kraken" and layer_index > 0
        self.ln_1 = WayNorm(num_ways, config.width, config.bias)
        self.attn = Attention(config, num_ways)
        self.ln_2 = None if config.has_one_norm else WayNorm(num_ways, config.width, config.bias)
        self.mlp = MLP(config, num_ways)

    def forward(self, x_WBTD: Tensor, addend_WBTD: Tensor | None, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Of a state in two parts the next, in two parts: the last addition of a layer is left to the one that follows,
        which does it in the same kernel as its first norm. What is added is padded as the linears are."""
        padded_width = self.attn.alignment.padded_width(x_WBTD.shape[-1])
        sum_dtype = self.ways.sum_dtype(x_WBTD) if self.reads_others else None
        x_WBTD, normed_WBTD, total_1BTD = add_norm(x_WBTD, addend_WBTD, padded_width, sum_dtype)
        if total_1BTD is not None:  # in flight while the ways held here attend
            total_1BTD = self.ways.start_sum(total_1BTD)
        attended_WBTD = self.attn(normed_WBTD, self.ln_1, rotation)
        if self.ln_2 is None:
            return x_WBTD, attended_WBTD + self.mlp(normed_WBTD, self.ln_1)
        if total_1BTD is None:
            a_WBTD, normed_WBTD, _ = add_norm(x_WBTD, attended_WBTD, padded_width, sum_dtype=None)
        else:
            total_1BTD = self.ways.wait_sum(total_1BTD)
            a_WBTD, normed_WBTD, _ = add_reduced_norm(x_WBTD, attended_WBTD, total_1BTD)
        return a_WBTD, self.mlp(normed_WBTD, self.ln_2)


class DelayedLayer(nn.Module):
    """One layer of `kraken_delayed`, of the ways held here; see the module's docstring for the equations."""

    def __init__(self, config: ModelConfig, layer_index: int, ways: WayGroup):
        super().__init__()
        num_ways = len(ways.part(config.num_ways))
        self.ways = ways
        self.starts_sum = 0 < layer_index < config.num_layers - 1
        self.recomputes = False
        self.ln_1 = WayNorm(num_ways, config.width, config.bias)
        self.attn = Attention(config, num_ways)
        self.mlp = MLP(config, num_ways)

    def forward(
        self, x_WBTD: Tensor, addend_WBTD: Tensor | None, total_1BTD: Tensor | None, rotation: Rotation | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the input of the layer before and what that layer adds: the input of this layer, what this layer adds, and
        the sum over the ways of the input in flight, for `WayGroup.wait_sum` before the next layer.

        Args:
            total_1BTD: the sum over the ways of the input of the layer before; None in the first layer.
        """
        padded_width = self.attn.alignment.padded_width(x_WBTD.shape[-1])
        sum_dtype = self.ways.sum_dtype(x_WBTD) if self.starts_sum else None
        if addend_WBTD is None or total_1BTD is None:
            x_WBTD, normed_WBTD, sum_1BTD = add_norm(x_WBTD, addend_WBTD, padded_width, sum_dtype)
        else:
            x_WBTD, normed_WBTD, sum_1BTD = add_reduced_norm(x_WBTD, addend_WBTD, total_1BTD, sum_dtype)
        if sum_1BTD is not None:
            sum_1BTD = self.ways.start_sum(sum_1BTD)
        if self.recomputes and torch.is_grad_enabled():  # without the sum, which runs once
            addend_WBTD = checkpoint(self._attention_and_mlp, normed_WBTD, rotation, use_reentrant=False)
        else:
            addend_WBTD = self._attention_and_mlp(normed_WBTD, rotation)
        return x_WBTD, addend_WBTD, sum_1BTD

    def _attention_and_mlp(self, normed_WBTD: Tensor, rotation: Rotation | None) -> Tensor:
        return self.attn(normed_WBTD, self.ln_1, rotation) + self.mlp(normed_WBTD, self.ln_1)


class Kraken(nn.Module):
    """The language model: token ids [B, T] -> logits [B, T, V].

    Parameters are uninitialised until `init_weights` or a checkpoint fills them. Names follow the published code, with
    the ways stacked into the first dimension.

    Args:
        ways: the processes that share the model; each holds the parameters that `part_of` cuts for it.
    """

    def __init__(self, config: ModelConfig, ways: WayGroup = WayGroup()):  # noqa: B008 - frozen
        super().__init__()
        self.config, self.ways = config, ways
        self.alignment = Alignment()
        self.chunk_gradient = chunk_gradient
        self.recomputes = False
        D = config.width
        device = torch.get_default_device()  # which may be `meta`: shapes without memory
        learned = config.positions == "learned"
        self.wte = skip_init(nn.Embedding, len(ways.part(config.vocab_size)), D, device=device)
        self.wpe = skip_init(nn.Embedding, config.context_length, D, device=device) if learned else None
        layer = DelayedLayer if config.architecture == "kraken_delayed" else Layer
        self.h = nn.ModuleList(layer(config, index, ways) for index in range(config.num_layers))
        num_joined = len(ways.part(config.num_ways)) * D
        self.conjunction = (
            skip_init(nn.Linear, num_joined, D, bias=config.bias, device=device) if config.is_kraken else None
        )
        self.ln_f = nn.LayerNorm(D, eps=LAYER_NORM_EPSILON, bias=config.bias)

    def align(self, alignment: Alignment) -> None:
        """Round sizes up inside the forward pass from now on."""
        for module in self.modules():
            if isinstance(module, Kraken | Attention | MLP):
                module.alignment = alignment

    def recompute_activations(self) -> None:
        """Keep only the layers' inputs for the backward pass from now on."""
        self.recomputes = True
        for layer in self.h:
            if isinstance(layer, DelayedLayer):
                layer.recomputes = True

    def compile_parts(self) -> None:
        """`torch.compile` each layer, of which those of one kind share one compilation, however many there are; and the
        loss, where no kernel computes it.

        Compiled is `forward` alone: the hooks by which FSDP gathers parameters stay outside of the graph.
        """
        for layer in self.h:
            layer.forward = torch.compile(layer.forward, options=COMPILE_OPTIONS)
        self.chunk_gradient = torch.compile(chunk_gradient)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits of the next token at every position, in the compute type."""
        return self.readout(self.hidden(ids_BT))

    def loss(self, ids_BT: Tensor, targets_BT: Tensor, num_ids: int | None = None) -> Tensor:
        """Sum (not mean) of the next-token cross-entropy in nats; at no time do all logits exist.

        Args:
            num_ids: ids of the tokenizer, over which the softmax is for every number that is reported or compared.
                None takes the padded vocabulary: that is the training objective, as in the published code.
        """
        hidden_BTD = self.hidden(ids_BT)
        padded_width = self.alignment.padded_width(self.config.width)
        return chunked_cross_entropy(
            pad(hidden_BTD.flatten(0, 1), padded_width),
            pad(self.wte.weight, padded_width),
            targets_BT.flatten(),
            self.chunk_gradient,
            self.ways,
            self.config.vocab_size,
            num_ids,
        )

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """The normalised state [B, T, D] that the head reads."""
        positions_1T = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        x_BTD = self._embed(ids_BT)
        rotation = None
        if self.wpe is None:
            rotation = rotation_of(positions_1T, self.config.head_size, self.config.rope_base, x_BTD.dtype)
        else:
            x_BTD = x_BTD + self.wpe(positions_1T)
        x_BTD = self.ways.share(x_BTD.to(compute_dtype(x_BTD)))  # between layers too, as sums stay in float32
        num_ways = len(self.ways.part(self.config.num_ways))
        x_WBTD = x_BTD.expand(num_ways, -1, -1, -1)
        if x_BTD.is_cuda and num_ways > 1:
            # a token's ways side by side in memory, [B, T, W, D]: the sum over them then reads each of them once
            x_WBTD = x_WBTD.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
        through = self._through_delayed_layers if self.config.architecture == "kraken_delayed" else self._through_layers
        return self.ln_f(self._join(through(x_WBTD, rotation)))

    def _through_layers(self, x_WBTD: Tensor, rotation: Rotation | None) -> Tensor:
        addend_WBTD = None
        for layer in self.h:
            if self.recomputes and torch.is_grad_enabled():
                whole_WBTD = _added(x_WBTD, addend_WBTD)  # what is kept is one tensor a layer
                x_WBTD, addend_WBTD = checkpoint(layer, whole_WBTD, None, rotation, use_reentrant=False)
            else:
                x_WBTD, addend_WBTD = layer(x_WBTD, addend_WBTD, rotation)
        return _added(x_WBTD, addend_WBTD)

    def _through_delayed_layers(self, x_WBTD: Tensor, rotation: Rotation | None) -> Tensor:
        addend_WBTD = total_1BTD = in_flight_1BTD = None
        for index, layer in enumerate(self.h):
            if in_flight_1BTD is not None:
                total_1BTD = self.ways.wait_sum(in_flight_1BTD)
            elif index == 1:  # all ways start from one embedding
                total_1BTD = self.config.num_ways * x_WBTD[:1].to(self.ways.sum_dtype(x_WBTD))
            x_WBTD, addend_WBTD, in_flight_1BTD = layer(x_WBTD, addend_WBTD, total_1BTD, rotation)
        return _added(x_WBTD, addend_WBTD)

    def _embed(self, ids_BT: Tensor) -> Tensor:
        """Token embeddings [B, T, D], of whose rows each process holds some."""
        if self.ways.size == 1:
            return self.wte(ids_BT)
        rows = self.ways.part(self.config.vocab_size)
        elsewhere_BT1 = ((ids_BT < rows.start) | (ids_BT >= rows.stop))[..., None]
        x_BTD = self.wte((ids_BT - rows.start).clamp(0, len(rows) - 1)).masked_fill(elsewhere_BT1, 0.0)
        return self.ways.sum_partial(x_BTD)

    def _join(self, x_WBTD: Tensor) -> Tensor:
        """Bring the ways back to one state [B, T, D]."""
        if self.conjunction is None:
            return x_WBTD[0]
        D = self.config.width
        padded = self.alignment.padded_width(D)
        # rows side by side need no padding of their own where together they are a multiple of what is loaded at once
        inner = D if len(x_WBTD) * D % VALUES_PER_LOAD == 0 else padded
        weight = pad(self.conjunction.weight.unflatten(1, (-1, D)), padded, None, inner).flatten(1)
        # [W, B, T, D] -> [B, T, W*D], way after way, as the published code concatenates
        y_BTD = F.linear(pad(x_WBTD, inner).permute(1, 2, 0, 3).flatten(2), weight)[..., :D]
        y_BTD = self.ways.sum_partial(y_BTD)
        return y_BTD if self.conjunction.bias is None else y_BTD + self.conjunction.bias

    def readout(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D], of the rows of the vocabulary held here; the head is the embedding."""
        return F.linear(hidden_BTD, self.wte.weight)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter, each drawn whole and by itself, so that whoever holds a part has the same numbers."""
        shapes = whole_shapes(self.config)
        for name, parameter in self.named_parameters():
            fill(parameter, part_of(name, initial_value(name, shapes[name], self.config, seed), self.config, self.ways))


def _added(x_WBTD: Tensor, addend_WBTP: Tensor | None) -> Tensor:
    """x plus what of the addend is not padding."""
    return x_WBTD if addend_WBTP is None else x_WBTD + addend_WBTP[..., : x_WBTD.shape[-1]]


def is_vector(parameter_name: str) -> bool:
    """Whether a parameter is a gain or a bias: not drawn at the start, and not decayed."""
    return "ln_" in parameter_name or parameter_name.endswith("bias")


def whole_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Name -> shape of every parameter of the whole model."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Kraken(config).named_parameters()}


def way_dimension(name: str) -> int | None:
    """The dimension in which a parameter is divided among the processes of a `WayGroup`; None: each holds all of it."""
    if name.startswith("h.") or name == "wte.weight":
        return 0
    return 1 if name == "conjunction.weight" else None


def part_of(name: str, whole: Tensor, config: ModelConfig, ways: WayGroup) -> Tensor:
    """What one process holds of a whole parameter, as a view."""
    dimension = way_dimension(name)
    if dimension is None or ways.size == 1:
        return whole
    if name == "wte.weight":
        rows = ways.part(config.vocab_size)
        return whole[rows.start : rows.stop]
    held = ways.part(config.num_ways)
    each = whole.shape[dimension] // config.num_ways
    return whole.narrow(dimension, held.start * each, len(held) * each)


def own_shard(parameter: Tensor, value: Tensor) -> Tensor:
    """Where FSDP shards a parameter, this rank's share of a value of the shape that it shards, as a view."""
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            if placement.is_shard():
                chunks = value.chunk(parameter.device_mesh.size(axis), dim=placement.dim)  # type: ignore[attr-defined]
                rank = parameter.device_mesh.get_local_rank(axis)
                value = chunks[rank] if rank < len(chunks) else value.narrow(placement.dim, 0, 0)  # type: ignore[attr-defined]
    return value


def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a value into a parameter, or where FSDP shards it, this rank's share of the value."""
    held = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    held.copy_(own_shard(parameter, value))


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """A whole parameter as training starts: gains 1; biases 0; matrices normal 0.02, `c_proj` divided by
    sqrt(2 * layers * ways). Each matrix of each way has a generator of its own, seeded by (seed, name, way).
    """
    if is_vector(name):
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
    std = INIT_STD
    if name.endswith("c_proj.weight"):
        std /= math.sqrt(2 * config.num_layers * config.num_ways)
    value = torch.empty(shape)
    for way, matrix in enumerate(value.unbind(0) if value.dim() == 3 else (value,)):
        digest = hashlib.sha256(f"{seed}/{name}/{way}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        # drawn in float32 on the CPU, so that every device and precision starts from the same numbers
        torch.randn(matrix.shape, generator=generator, out=matrix).mul_(std)
    return value


def rotation_of(positions_BT: Tensor, head_size: int, base: float, dtype: torch.dtype) -> Rotation:
    """Rotary positions: channel pair i turns by position * base^(-2i/H) (Su et al., RoFormer, 2021)."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, head_size, 2, device=positions_BT.device, dtype=exact) / head_size
    angles = (positions_BT[..., None].to(exact) * base**-exponents)[:, :, None]
    return angles.cos(), angles.sin()


def rotate(x_WBTNH: Tensor, rotation: Rotation) -> Tensor:
    """Turn channel i and channel i + H/2 as a pair, in the precision of the rotation; returns the type of x."""
    cos, sin = rotation
    first, second = x_WBTNH.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_WBTNH.dtype)
