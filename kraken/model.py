"""The Kraken architecture, whole, on one device.

Every layer consists of W independent sub-layers, the ways. With x_i the input of way i, one layer computes

    a_i  = x_i + Attn_i(LN1_i(x_i))                     needs nothing from the other ways
    S    = sum_j x_j                                    the one all-reduce of a layer; may run during the line above
    x_i' = a_i + FFN_i(LN2_i(a_i + (S - x_i)))          reads the sum of the OTHER ways' inputs

The first layer has no incoming sum: all ways start from the same embedding. After the last layer the ways are
concatenated, brought back to width D by one linear (the conjunction), normalised and read out by the tied embedding.
Source: Prabhakar, Zhang, Wentzlaff, "Kraken", NeurIPS 2024 (arXiv 2408.07802). A way is the paper's sub-layer and the
published code's split (`num_splits`, `n_heads_in_split`).

Shape letters: B batch, T sequence, W ways, D width of a way, N heads per way, H head size, F FFN hidden size,
V padded vocabulary; I and O are the inputs and outputs of any linear. The ways are a dimension of the weights, so that
a layer is a few batched matrix products and one attention call, whatever W is.
"""

import hashlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken.config import ModelConfig

INIT_STD = 0.02
LAYER_NORM_EPSILON = 1e-5

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer index, q_WBTNH, k_WBTNH, v_WBTNH) -> out_WBTNH. Training attends causally; an engine brings its cache here."""


def causal_attention(layer_index: int, q_WBTNH: Tensor, k_WBTNH: Tensor, v_WBTNH: Tensor) -> Tensor:
    """Full causal attention, one call over all ways' heads."""
    # [W, B, T, N, H] -> [W*B, N, T, H], a view: ways are just more of the batch
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q_WBTNH, k_WBTNH, v_WBTNH))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).unflatten(0, q_WBTNH.shape[:2])


def sum_across_ways(x_WBTD: Tensor) -> Tensor:
    """The sum over all ways, [1, B, T, D]; with ways on several devices this is the layer's all-reduce."""
    return x_WBTD.sum(dim=0, keepdim=True)


class WayLinear(nn.Module):
    """W linears without bias, one per way, as one batched product: [W, B, T, I] -> [W, B, T, O]."""

    def __init__(self, num_ways: int, num_inputs: int, num_outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_ways, num_outputs, num_inputs))

    def forward(self, x_WBTI: Tensor) -> Tensor:
        y = torch.bmm(x_WBTI.flatten(1, 2), self.weight.transpose(1, 2))
        return y.unflatten(1, x_WBTI.shape[1:3])


class WayNorm(nn.Module):
    """LayerNorm without bias, with one gain vector per way: [W, B, T, D] -> the same."""

    def __init__(self, num_ways: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_ways, width))

    def forward(self, x_WBTD: Tensor) -> Tensor:
        normed = F.layer_norm(x_WBTD, x_WBTD.shape[-1:], eps=LAYER_NORM_EPSILON)
        return normed * self.weight[:, None, None]


class Attention(nn.Module):
    """Causal self-attention inside each way."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads_per_way = config.heads_per_way
        self.c_attn = WayLinear(config.num_ways, config.width, 3 * config.width)
        self.c_proj = WayLinear(config.num_ways, config.width, config.width)

    def forward(self, x_WBTD: Tensor, layer_index: int, attend: Attend) -> Tensor:
        # [W, B, T, 3*D] -> three of [W, B, T, N, H]; the published order is q, k, v
        q, k, v = self.c_attn(x_WBTD).unflatten(-1, (3, self.heads_per_way, -1)).unbind(dim=3)
        out_WBTNH = attend(layer_index, q, k, v)
        return self.c_proj(out_WBTNH.flatten(-2))


class MLP(nn.Module):
    """The feed-forward network of each way."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.c_fc = WayLinear(config.num_ways, config.width, config.ffn_size)
        self.c_proj = WayLinear(config.num_ways, config.ffn_size, config.width)

    def forward(self, x_WBTD: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x_WBTD), approximate="tanh"))


class Layer(nn.Module):
    """One layer of all ways; see the module's docstring for the equation."""

    def __init__(self, config: ModelConfig, layer_index: int):
        super().__init__()
        self.layer_index = layer_index
        self.ln_1 = WayNorm(config.num_ways, config.width)
        self.attn = Attention(config)
        self.ln_2 = WayNorm(config.num_ways, config.width)
        self.mlp = MLP(config)

    def forward(self, x_WBTD: Tensor, attend: Attend) -> Tensor:
        a_WBTD = x_WBTD + self.attn(self.ln_1(x_WBTD), self.layer_index, attend)
        if self.layer_index == 0:
            return a_WBTD + self.mlp(self.ln_2(a_WBTD))
        others_WBTD = sum_across_ways(x_WBTD) - x_WBTD
        return a_WBTD + self.mlp(self.ln_2(a_WBTD + others_WBTD))


class Kraken(nn.Module):
    """The language model: token ids [B, T] -> logits [B, T, V].

    Parameters are uninitialised until `init_weights` or a checkpoint fills them. Names follow the published code, with
    the ways stacked into the first dimension.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.wpe = nn.Parameter(torch.empty(config.context_length, config.width))
        self.h = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.conjunction = nn.Parameter(torch.empty(config.width, config.num_ways * config.width))
        self.ln_f = nn.Parameter(torch.empty(config.width))

    def forward(self, ids_BT: Tensor, positions_BT: Tensor | None = None, attend: Attend = causal_attention) -> Tensor:
        """Logits of the next token at every position, in the compute type.

        Args:
            positions_BT: int64 positions in the context; None counts from 0.
            attend: how queries meet keys; the default is full causal attention.
        """
        return self.readout(self.hidden(ids_BT, positions_BT, attend))

    def hidden(self, ids_BT: Tensor, positions_BT: Tensor | None = None, attend: Attend = causal_attention) -> Tensor:
        """The normalised state [B, T, D] that the head reads."""
        positions = self.wpe[: ids_BT.shape[1]] if positions_BT is None else F.embedding(positions_BT, self.wpe)
        x_BTD = F.embedding(ids_BT, self.wte) + positions
        x_WBTD = x_BTD.expand(self.config.num_ways, -1, -1, -1)
        for layer in self.h:
            x_WBTD = layer(x_WBTD, attend)
        # [W, B, T, D] -> [B, T, W*D], way after way, as the published code concatenates
        y_BTD = F.linear(x_WBTD.permute(1, 2, 0, 3).flatten(2), self.conjunction)
        return F.layer_norm(y_BTD, y_BTD.shape[-1:], self.ln_f, eps=LAYER_NORM_EPSILON)

    def readout(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [..., V] of states [..., D]; the head is tied to the token embedding."""
        return F.linear(hidden_BTD, self.wte)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter: gains 1; matrices normal 0.02, `c_proj` smaller by sqrt(2 * layers * ways).

        Each matrix of each way has a generator of its own, seeded by (seed, name, way): whoever holds only some ways
        draws the same numbers for them.
        """
        for name, parameter in self.named_parameters():
            if is_gain(name):
                parameter.fill_(1.0)
                continue
            std = INIT_STD
            if name.endswith("c_proj.weight"):
                std /= math.sqrt(2 * self.config.num_layers * self.config.num_ways)
            matrices = parameter.unbind(0) if parameter.dim() == 3 else (parameter,)
            for way, matrix in enumerate(matrices):
                digest = hashlib.sha256(f"{seed}/{name}/{way}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
                # drawn in float32 on the CPU, so that every device and precision starts from the same numbers
                matrix.copy_(torch.randn(matrix.shape, generator=generator) * std)

    def num_parameters(self) -> int:
        """Parameters, with the tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def training_flops_per_token(self) -> int:
        """Floating-point operations of forward and backward per token at the full context.

        Six per matrix weight, the tied head included, and 12 * layers * W*D * T for attention's two products, all T
        positions counted (Chowdhery et al., PaLM, 2022, appendix B).
        """
        c = self.config
        matrix_weights = sum(p.numel() for name, p in self.named_parameters() if not is_gain(name) and name != "wpe")
        return 6 * matrix_weights + 12 * c.num_layers * c.num_ways * c.width * c.context_length

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Cache that one token occupies over all layers and ways."""
        c = self.config
        return 2 * c.num_layers * c.num_ways * c.width * bytes_per_value


def is_gain(parameter_name: str) -> bool:
    """Whether a parameter is a LayerNorm's gain: set to 1 at the start and not decayed."""
    return "ln_" in parameter_name


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum (not mean) of the cross-entropy in nats over all positions, at least float32."""
    logits = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="sum")
