"""The forward pass of an engine: the equations of `kraken/model.py` over a batch of tokens without a shape of its own.

The tokens of every request lie one after the other in T; only attention knows which belong together. Shape letters as
in `kraken/model.py`; I and O are the inputs and outputs of a linear.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.engine.attention import PagedAttend
from kraken.engine.linear import Linear, make_linear
from kraken.model import LAYER_NORM_EPSILON, Kraken, Layer, WayLinear, WayNorm, rotate, rotation_of


@dataclass(frozen=True, slots=True)
class _Norm:
    """LayerNorm with gains per way."""

    weight_WD: Tensor
    bias_WD: Tensor | None

    def __call__(self, x_WTD: Tensor) -> Tensor:
        size = self.weight_WD.shape[1:]
        if len(self.weight_WD) == 1:
            bias_D = None if self.bias_WD is None else self.bias_WD[0]
            return F.layer_norm(x_WTD, size, self.weight_WD[0], bias_D, LAYER_NORM_EPSILON)
        normed_WTD = F.layer_norm(x_WTD, size, eps=LAYER_NORM_EPSILON) * self.weight_WD[:, None]
        return normed_WTD if self.bias_WD is None else normed_WTD + self.bias_WD[:, None]


class Network:
    """A model's weights, arranged for inference. The model itself is not needed afterwards.

    Args:
        model: on its device, in the type to compute in.
        num_ids: ids of the tokenizer; the head has no rows for the padding ids beyond, so nothing can produce one.
    """

    def __init__(self, model: Kraken, num_ids: int):
        self.config = model.config
        self.device, self.dtype = model.wte.weight.device, model.wte.weight.dtype
        self._wte_VD = model.wte.weight.detach()
        self._wpe_TD = None if model.wpe is None else model.wpe.weight.detach()
        self._layers = [_NetworkLayer(layer) for layer in model.h if isinstance(layer, Layer)]
        self._conjunction = None
        if model.conjunction is not None:
            bias = model.conjunction.bias
            self._conjunction = make_linear(
                model.conjunction.weight.detach()[None], None if bias is None else bias.detach()[None]
            )
        final_bias = model.ln_f.bias
        self._ln_f = _Norm(model.ln_f.weight.detach()[None], None if final_bias is None else final_bias.detach()[None])
        self._head = make_linear(self._wte_VD[None, :num_ids], None)

    def hidden(self, ids_T: Tensor, positions_T: Tensor, attend: PagedAttend) -> Tensor:
        """The state [T, D] that the last norm reads."""
        x_TD = F.embedding(ids_T, self._wte_VD)
        rotation = None
        if self._wpe_TD is None:
            rotation = rotation_of(positions_T[None], self.config.head_size, self.config.rope_base, self.dtype)
        else:
            x_TD = x_TD + F.embedding(positions_T, self._wpe_TD)
        x_WTD = x_TD.expand(self.config.num_ways, -1, -1)
        for index, layer in enumerate(self._layers):

            def heads(q_WTNH: Tensor, k_WTNH: Tensor, v_WTNH: Tensor, index: int = index) -> Tensor:
                if rotation is not None:
                    q_WTNH, k_WTNH = rotate(q_WTNH, rotation), rotate(k_WTNH, rotation)
                q, k, v = (x.permute(1, 0, 2, 3).flatten(1, 2) for x in (q_WTNH, k_WTNH, v_WTNH))
                return attend(index, q, k, v).unflatten(1, (self.config.num_ways, -1)).permute(1, 0, 2, 3)

            x_WTD = layer(x_WTD, heads)
        if self._conjunction is None:
            return x_WTD[0]
        return self._conjunction(x_WTD.permute(1, 0, 2).flatten(1)[None])[0]

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """float32 logits [T, ids of the tokenizer]."""
        return self._head(self._ln_f(hidden_TD[None]))[0].float()


class _NetworkLayer:
    """One layer of all ways; the equations are at the top of `kraken/model.py`."""

    def __init__(self, layer: Layer):
        self.reads_others = layer.reads_others
        self.num_heads, self.head_size = layer.attn.num_heads, layer.attn.head_size
        self.gated = layer.mlp.gated
        self.ln_1, self.ln_2 = _norm(layer.ln_1), None if layer.ln_2 is None else _norm(layer.ln_2)
        self.c_attn, self.attn_proj = _linear(layer.attn.c_attn), _linear(layer.attn.c_proj)
        self.c_fc, self.mlp_proj = _linear(layer.mlp.c_fc), _linear(layer.mlp.c_proj)

    def __call__(self, x_WTD: Tensor, heads: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        normed_WTD = self.ln_1(x_WTD)
        q, k, v = self.c_attn(normed_WTD).unflatten(-1, (3, self.num_heads, self.head_size)).unbind(dim=2)
        a_WTD = x_WTD + self.attn_proj(heads(q, k, v).flatten(2))
        if self.ln_2 is None:
            return a_WTD + self._mlp(normed_WTD)
        seen_WTD = a_WTD + (_sum_of_ways(x_WTD) - x_WTD) if self.reads_others else a_WTD
        return a_WTD + self._mlp(self.ln_2(seen_WTD.to(a_WTD.dtype)))

    def _mlp(self, x_WTD: Tensor) -> Tensor:
        y_WTF = self.c_fc(x_WTD)
        if self.gated:
            gate, y_WTF = y_WTF.chunk(2, dim=-1)
            return self.mlp_proj(F.silu(gate) * y_WTF)
        return self.mlp_proj(F.gelu(y_WTF, approximate="tanh"))


def _sum_of_ways(x_WTD: Tensor) -> Tensor:
    """[1, T, D], at least float32: what all ways together know."""
    exact = torch.float64 if x_WTD.dtype == torch.float64 else torch.float32
    return x_WTD.sum(dim=0, keepdim=True, dtype=exact)


def _norm(norm: WayNorm) -> _Norm:
    return _Norm(norm.weight.detach(), None if norm.bias is None else norm.bias.detach())


def _linear(linear: WayLinear) -> Linear:
    return make_linear(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
