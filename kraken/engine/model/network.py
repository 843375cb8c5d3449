"""The forward pass of an engine: the equations of `kraken/model.py` over a batch of tokens without a shape of its own.

The tokens of every request lie one after the other in T; only attention knows which belong together. Shape letters as
in `kraken/model.py`; I and O are the inputs and outputs of a linear.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.config import Quantization
from kraken.engine.distributed.all_reduce import DeviceGroup, ProcessGroupHandle
from kraken.engine.distributed.partition import Part, Weights
from kraken.engine.distributed.peer_all_reduce import PeerHandle
from kraken.engine.kernels.choose import has_kernels
from kraken.engine.model import residual
from kraken.engine.model.attention import PagedAttend
from kraken.engine.model.linear import Activation, Linear, make_linear
from kraken.engine.model.norm import Norm, Normed, select
from kraken.engine.model.quantized import Fp8Linear
from kraken.model import rotate, rotation_of

NUM_FIRST_LAYERS = 5
"""Enough for several sums, and for times that differ by more than chance."""


class Network:
    """The weights of one device, arranged for inference, and what it computes with them.

    Args:
        part: which part of the model this is.
        weights: of the part, in the type to compute in; emptied, so that what is rearranged is not held twice.
        num_ids: ids of the tokenizer; the head has no rows for the padding ids beyond, so nothing can produce one.
        group: the devices that hold the other parts.
        quantization: of the layers' linears; conjunction and head stay as they are.
    """

    def __init__(
        self, part: Part, weights: Weights, num_ids: int, group: DeviceGroup, quantization: Quantization = "none"
    ):
        self.part, self.config, self.num_ids, self.group = part, part.config, num_ids, group
        self._wte_VD = weights.pop("wte.weight")
        self._wpe_TD = weights.pop("wpe.weight", None)
        self.device, self.dtype = self._wte_VD.device, self._wte_VD.dtype
        self._layers = [
            _NetworkLayer(part, weights, index, group, quantization) for index in range(self.config.num_layers)
        ]
        for layer, following in pairwise(self._layers):
            layer.next_norm = following.ln_1
        self._conjunction = self._conjunction_bias_D = None
        if self.config.architecture == "kraken":
            self._conjunction = make_linear(weights.pop("conjunction.weight")[None], None)
            self._conjunction_bias_D = weights.pop("conjunction.bias", None)
        bias_D = weights.pop("ln_f.bias", None)
        self._ln_f = Norm(weights.pop("ln_f.weight")[None], None if bias_D is None else bias_D[None])
        head_VD = _head_rows(self._wte_VD, part.head_rows(num_ids), num_ids)
        self._head = make_linear(head_VD[None], None, is_wide=True)

    def __call__(self, ids_T: Tensor, positions_T: Tensor, attend: PagedAttend, rows_R: Tensor | None) -> Tensor:
        """One forward pass.

        Args:
            rows_R: the tokens whose logits are read out; None reads out all.
        Returns:
            float32 logits [R, ids of the tokenizer]; on devices but the first, something of no use.
        """
        x_WTD = self._hidden(ids_T, positions_T, attend, rows_R)
        logits_RV = self._logits(x_WTD) if x_WTD.shape[1] else x_WTD.new_empty(0, self.num_ids, dtype=torch.float32)
        self.group.end_pass()
        return logits_RV

    def first_layers(self, x_WTD: Tensor, num_layers: int = NUM_FIRST_LAYERS) -> None:
        """What a few layers do with any states, each token attending over those before it, without a cache: for
        measuring."""

        def heads(*qkv_WTNH: Tensor) -> Tensor:
            q, k, v = (_side_by_side(x_WTNH) for x_WTNH in qkv_WTNH)
            if has_kernels(q):
                from kraken.engine.kernels.cuda.prompt_attention import (
                    attend_prompt,  # which imports Triton, and only CUDA has that
                )

                out_TNH = attend_prompt(q, k, v)
            else:
                q, k, v = (x.transpose(0, 1) for x in (q, k, v))
                out_TNH = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)
            return _apart(out_TNH, len(x_WTD))

        state = _State(x_WTD, self._layers[0].ln_1(x_WTD))
        for layer in self._layers[:num_layers]:
            state = layer(state, heads, sums_next=self.config.architecture == "kraken")
        if state.pending is not None:  # nothing may be left in flight
            norm = self._layers[0].ln_2
            assert norm is not None
            state.pending.add_reduced_norm(state.x_WTD, state.x_WTD, norm)

    def _hidden(self, ids_T: Tensor, positions_T: Tensor, attend: PagedAttend, rows_R: Tensor | None) -> Tensor:
        """The ways' states [W, R, D] after the last layer, of the ways held here and the tokens that are read out."""
        x_TD = F.embedding(ids_T, self._wte_VD)
        rotation = None
        if self._wpe_TD is None:
            rotation = rotation_of(positions_T[None], self.config.head_size, self.config.rope_base, self.dtype)
        else:
            x_TD = x_TD + F.embedding(positions_T, self._wpe_TD)
        num_ways = len(self.part.ways)
        state = _State(x_TD.expand(num_ways, -1, -1), self._layers[0].ln_1(x_TD.expand(num_ways, -1, -1)))
        for index, layer in enumerate(self._layers):

            def heads(q_WTNH: Tensor, k_WTNH: Tensor, v_WTNH: Tensor, index: int = index) -> Tensor:
                if rotation is not None:
                    q_WTNH, k_WTNH = rotate(q_WTNH, rotation), rotate(k_WTNH, rotation)
                q, k, v = (_side_by_side(x_WTNH) for x_WTNH in (q_WTNH, k_WTNH, v_WTNH))
                return _apart(attend(index, q, k, v), num_ways)

            # the last layer sums over what is read out only
            following = self._layers[index + 1 : -1 if rows_R is not None else None][:1]
            sums_next = any(layer.reads_others for layer in following)
            state = layer(state, heads, sums_next, rows_R if layer is self._layers[-1] else None)
        return state.x_WTD

    def _logits(self, x_WTD: Tensor) -> Tensor:
        y_TD = x_WTD[0]
        if self._conjunction is not None:
            y_TD = self.group.all_reduce(self._conjunction(x_WTD.permute(1, 0, 2).flatten(1)[None])[0])
            if self._conjunction_bias_D is not None:
                y_TD = y_TD + self._conjunction_bias_D
        logits_TV = self._head(self._ln_f(y_TD[None]))[0]
        if self.device.type == "cpu":  # on whichever of the ranks there are kernels
            logits_TV = logits_TV.float()
        logits_TV = self.group.gather_columns(logits_TV)
        return logits_TV[:, : self.num_ids].float() if self.part.rank == 0 else logits_TV


@dataclass(frozen=True, slots=True)
class _State:
    """What a layer begins with."""

    x_WTD: Tensor
    normed: Normed | None
    """Its `ln_1`; None after the last layer."""
    pending: ProcessGroupHandle | PeerHandle | None = None
    """The sum over all ways of x, in flight, where the layer reads it."""


class _NetworkLayer:
    """One layer of the ways held here; the equations are at the top of `kraken/model.py`."""

    def __init__(self, part: Part, weights: Weights, index: int, group: DeviceGroup, quantization: Quantization):
        config = part.config
        self.num_heads, self.head_size = part.heads_per_way, config.head_size
        self.gated = config.activation == "swiglu"
        self._group = group
        self._sums_parts = part.is_tensor_parallel

        def take(name: str) -> tuple[Tensor, Tensor | None]:
            return weights.pop(f"h.{index}.{name}.weight"), weights.pop(f"h.{index}.{name}.bias", None)

        is_quantized = quantization == "fp8"

        def linear(name: str, activation: Activation = "none", gelu_before: bool = False) -> Linear:
            weight, bias = take(name)
            if part.is_tensor_parallel and part.rank > 0 and name.endswith("c_proj"):
                bias = None  # it is added elsewhere
            return Fp8Linear(weight, bias, gelu_before) if is_quantized else make_linear(weight, bias, activation)

        self.ln_1 = Norm(*take("ln_1"), is_quantized)
        self.next_norm: Norm | None = None
        """The next layer's first, computed with what comes before it."""
        self.reads_others = config.architecture == "kraken" and index > 0
        """Whether it reads the other ways; the first never does, since all ways begin alike."""
        self.ln_2 = None if config.architecture == "parallel" else Norm(*take("ln_2"), is_quantized)
        self.c_attn, self.attn_proj = linear("attn.c_attn"), linear("attn.c_proj")
        # GELU is in the first product's kernel, or in the one that quantises the second's inputs
        self.c_fc = linear("mlp.c_fc", "none" if self.gated else "gelu")
        self.mlp_proj = linear("mlp.c_proj", gelu_before=not self.gated)

    def __call__(
        self,
        state: _State,
        heads: Callable[[Tensor, Tensor, Tensor], Tensor],
        sums_next: bool,
        rows_R: Tensor | None = None,
    ) -> _State:
        """What the next layer begins with, of what this one does.

        Args:
            sums_next: whether the sum that the next layer reads is begun here, over all tokens.
            rows_R: in the last layer, the tokens that anybody reads: only keys and values are computed of the others.
        """
        x_WTD, normed, pending = state.x_WTD, state.normed, state.pending
        assert normed is not None
        if rows_R is not None:
            x_WTD = x_WTD.index_select(1, rows_R)
            if self.reads_others and len(rows_R):
                pending = self._group.start(x_WTD)
        attended_WTD = self._attention(normed, heads, rows_R)
        if not attended_WTD.shape[1]:
            return _State(x_WTD, None)
        if self.ln_2 is None:
            normed = normed if rows_R is None else select(normed, rows_R)
            return _State(*self._group.all_reduce_add_norm(x_WTD, attended_WTD + self._mlp(normed), self.next_norm))
        if self._sums_parts:  # tensor parallelism: what follows reads a sum, so each is waited for
            a_WTD, normed = self._group.all_reduce_add_norm(x_WTD, attended_WTD, self.ln_2)
            assert normed is not None
            return _State(*self._group.all_reduce_add_norm(a_WTD, self._mlp(normed), self.next_norm))
        if pending is None:
            a_WTD, normed = residual.add_norm(x_WTD, attended_WTD, self.ln_2)
        else:  # the sum was in flight during attention
            a_WTD, normed = pending.add_reduced_norm(x_WTD, attended_WTD, self.ln_2)
        assert normed is not None
        return _State(*self._group.add_norm(a_WTD, self._mlp(normed), self.next_norm, sums_next))

    def _attention(
        self, normed: Normed, heads: Callable[[Tensor, Tensor, Tensor], Tensor], rows_R: Tensor | None
    ) -> Tensor:
        q, k, v = self.c_attn(normed).unflatten(-1, (3, self.num_heads, self.head_size)).unbind(dim=2)
        attended_WTD = heads(q, k, v).flatten(2)
        if rows_R is not None:
            attended_WTD = attended_WTD.index_select(1, rows_R)
        return self.attn_proj(attended_WTD) if attended_WTD.shape[1] else attended_WTD

    def _mlp(self, normed: Normed) -> Tensor:
        y_WTF = self.c_fc(normed)
        if self.gated:
            gate, y_WTF = y_WTF.chunk(2, dim=-1)
            return self.mlp_proj(F.silu(gate) * y_WTF)
        return self.mlp_proj(y_WTF)


def _side_by_side(x_WTNH: Tensor) -> Tensor:
    """The heads of all ways as one way's, [T, N, H]."""
    return x_WTNH.permute(1, 0, 2, 3).flatten(1, 2)


def _apart(x_TNH: Tensor, num_ways: int) -> Tensor:
    """The inverse."""
    return x_TNH.unflatten(1, (num_ways, -1)).permute(1, 0, 2, 3)


def _head_rows(wte_VD: Tensor, rows: range, num_ids: int) -> Tensor:
    """The embedding's rows for some ids, zeros beyond the ids."""
    held_VD = wte_VD[rows.start : min(rows.stop, num_ids)]
    return held_VD if len(held_VD) == len(rows) else F.pad(held_VD, (0, 0, 0, len(rows) - len(held_VD)))
