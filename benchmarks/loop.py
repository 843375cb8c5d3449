"""The baseline: Kraken as a loop over its ways in plain PyTorch, one module per way, as the published code is built.

Parameter names are those of a published checkpoint. Written from the equations and the names alone; it shares no code
with `kraken/model/architecture.py`, which makes it a second opinion on the arithmetic too.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken.config import ModelConfig


def composed_gelu(x: Tensor) -> Tensor:
    """GELU (tanh form) as seven elementwise operations, which is how the published code computes it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def fused_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class LoopAttention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads = config.heads_per_way
        self.c_attn = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.c_proj = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.c_attn(x_BTD).chunk(3, -1))
        y_BNTH = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y_BNTH.transpose(1, 2).flatten(2))


class LoopMLP(nn.Module):
    def __init__(self, config: ModelConfig, composed: bool):
        super().__init__()
        self.activation = composed_gelu if composed else fused_gelu
        self.c_fc = nn.Linear(config.width, config.ffn_size, bias=config.bias)
        self.c_proj = nn.Linear(config.ffn_size, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x_BTD)))


class LoopBlock(nn.Module):
    """One way of one layer; `others` are the inputs of the other ways, none in the first layer."""

    def __init__(self, config: ModelConfig, composed: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, bias=config.bias)
        self.attn = LoopAttention(config)
        self.ln_2 = nn.LayerNorm(config.width, bias=config.bias)
        self.mlp = LoopMLP(config, composed)

    def forward(self, x_BTD: Tensor, others: list[Tensor]) -> Tensor:
        a_BTD = x_BTD + self.attn(self.ln_1(x_BTD))
        seen_BTD = a_BTD + torch.stack(others).sum(dim=0) if others else a_BTD
        return a_BTD + self.mlp(self.ln_2(seen_BTD))


class LoopKraken(nn.Module):
    """The model: token ids [B, T] -> logits [B, T, V], or with targets the mean loss in nats.

    Args:
        composed: GELU as the published code has it; otherwise torch's one operation.
    """

    def __init__(self, config: ModelConfig, composed: bool = False):
        super().__init__()
        self.config = config
        wte = nn.Embedding(config.vocab_size, config.width)
        self.transformer = nn.ModuleDict(
            {
                "wte": wte,
                "wpe": nn.Embedding(config.context_length, config.width),
                "h": nn.ModuleList(
                    nn.ModuleList(LoopBlock(config, composed) for _ in range(config.num_layers))
                    for _ in range(config.num_ways)
                ),
                "conjunction": nn.Linear(config.num_ways * config.width, config.width, bias=config.bias),
                "ln_f": nn.LayerNorm(config.width, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.lm_head.weight = wte.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor | None = None) -> Tensor:
        positions = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        x_BTD = self.transformer["wte"](ids_BT) + self.transformer["wpe"](positions)
        ways = [x_BTD] * self.config.num_ways
        blocks_of_ways = cast("Sequence[nn.ModuleList]", self.transformer["h"])
        for layer in range(self.config.num_layers):
            outputs = []
            for way, blocks in enumerate(blocks_of_ways):
                others = [x for other, x in enumerate(ways) if other != way] if layer > 0 else []
                outputs.append(blocks[layer](ways[way], others))
            ways = outputs
        joined_BTD = self.transformer["ln_f"](self.transformer["conjunction"](torch.cat(ways, dim=-1)))
        logits_BTV = self.lm_head(joined_BTD)
        if targets_BT is None:
            return logits_BTV
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
