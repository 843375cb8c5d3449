"""The forward pass of one rank: the equations of `kraken/model/architecture.py` over the tokens of a step.

`ModelRunner.forward` calls it. The tokens of all sequences are concatenated in T; only attention knows which belong to
one sequence. Shape letters as in `kraken/model/architecture.py`, and: R the tokens whose logits are computed, I and O
the inputs and outputs of a linear.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.config import Quantization
from kraken.engine.distributed.all_reduce import Handle
from kraken.engine.distributed.device_group import DeviceGroup
from kraken.engine.distributed.partition import Part, Weights
from kraken.engine.kernels.norm import Norm, Normed, select
from kraken.engine.kernels.torch.attention import PagedAttend
from kraken.engine.kernels.torch.linear import Activation, Linear
from kraken.engine.model.quantized import Fp8Linear
from kraken.model.architecture import rotate, rotation_of

NUM_FIRST_LAYERS = 5
"""Layers whose time decides between all-reduce backends: enough for several all-reduces, and to differ by more than
noise."""


class Network:
    """One rank's part of a Transformer, with weights arranged for inference.

    Args:
        part: the part of the model.
        weights: of the part, in the type to compute in. Emptied, so that no weight is held twice when it is rearranged.
        num_ids: ids of the tokenizer. The head has no rows for the padding ids beyond, so they cannot be sampled.
        group: the ranks that hold the other parts.
        quantization: of the layers' linears; conjunction and head are never quantized.
    """

    def __init__(
        self, part: Part, weights: Weights, num_ids: int, group: DeviceGroup, quantization: Quantization = "none"
    ):
        self.part, self.config, self.num_ids, self.group = part, part.config, num_ids, group
        self._wte_VD = weights.pop("wte.weight")
        self._wpe_TD = weights.pop("wpe.weight", None)
        self.device, self.dtype = self._wte_VD.device, self._wte_VD.dtype
        self.kernels = group.kernels
        layer_type = _DelayedLayer if self.config.architecture == "kraken_delayed" else _Layer
        self._layers = [
            layer_type(part, weights, index, group, quantization) for index in range(self.config.num_layers)
        ]
        for layer, following in pairwise(self._layers):
            layer.next_norm = following.ln_1
        self._conjunction = self._conjunction_bias_D = None
        if self.config.is_kraken:
            self._conjunction = self.kernels.linear(weights.pop("conjunction.weight")[None], None)
            self._conjunction_bias_D = weights.pop("conjunction.bias", None)
        bias_D = weights.pop("ln_f.bias", None)
        self._ln_f = Norm(weights.pop("ln_f.weight")[None], None if bias_D is None else bias_D[None])
        head_VD = _head_rows(self._wte_VD, part.head_rows(num_ids), num_ids)
        self._head = self.kernels.linear(head_VD[None], None, is_wide=True)

    def __call__(self, ids_T: Tensor, positions_T: Tensor, attend: PagedAttend, rows_R: Tensor | None) -> Tensor:
        """Run one forward pass. All ranks call it at the same time, with the same arguments.

        Args:
            rows_R: indices in T of the tokens whose logits are computed; None computes all.
        Returns:
            float32 logits [R, ids of the tokenizer] on rank 0; on the other ranks the values are not meaningful.
        """
        x_WTD = self._hidden(ids_T, positions_T, attend, rows_R)
        logits_RV = self._logits(x_WTD) if x_WTD.shape[1] else x_WTD.new_empty(0, self.num_ids, dtype=torch.float32)
        self.group.end_pass()
        return logits_RV

    def first_layers(self, x_WTD: Tensor, num_layers: int = NUM_FIRST_LAYERS) -> None:
        """Run the first layers on states without a KV cache, each token attending over those before it: for timing
        the all-reduce backends."""

        def heads(*qkv_WTNH: Tensor) -> Tensor:
            q, k, v = (_side_by_side(x_WTNH) for x_WTNH in qkv_WTNH)
            return _apart(self.kernels.causal_attention(q, k, v), len(x_WTD))

        state = _LayerInput(x_WTD, self._layers[0].ln_1(x_WTD))
        for layer in self._layers[:num_layers]:
            state = layer(state, heads, starts_all_reduce=self.config.is_kraken)
        if state.handle is not None:  # every all-reduce must be consumed
            state.handle.add_norm(state.x_WTD, state.x_WTD, self._layers[0].ln_2 or self._layers[0].ln_1)

    def _hidden(self, ids_T: Tensor, positions_T: Tensor, attend: PagedAttend, rows_R: Tensor | None) -> Tensor:
        """The states [W, R, D] after the last layer, of this rank's ways and the tokens whose logits are computed."""
        x_TD = F.embedding(ids_T, self._wte_VD)
        rotation = None
        if self._wpe_TD is None:
            rotation = rotation_of(positions_T[None], self.config.head_size, self.config.rope_base, self.dtype)
        else:
            x_TD = x_TD + F.embedding(positions_T, self._wpe_TD)
        num_ways = len(self.part.ways)
        state = _LayerInput(x_TD.expand(num_ways, -1, -1), self._layers[0].ln_1(x_TD.expand(num_ways, -1, -1)))
        for index, layer in enumerate(self._layers):

            def heads(q_WTNH: Tensor, k_WTNH: Tensor, v_WTNH: Tensor, index: int = index) -> Tensor:
                if rotation is not None:
                    q_WTNH, k_WTNH = rotate(q_WTNH, rotation), rotate(k_WTNH, rotation)
                q, k, v = (_side_by_side(x_WTNH) for x_WTNH in (q_WTNH, k_WTNH, v_WTNH))
                return _apart(attend(index, q, k, v), num_ways)

            starts_all_reduce = layer.starts_all_reduce(rows_R is not None)
            state = layer(state, heads, starts_all_reduce, rows_R if layer is self._layers[-1] else None)
        return state.x_WTD

    def _logits(self, x_WTD: Tensor) -> Tensor:
        y_TD = x_WTD[0]
        if self._conjunction is not None:
            part_TD = self._conjunction(x_WTD.permute(1, 0, 2).flatten(1)[None])[0]
            y_TD = self.group.all_reduce_for(len(part_TD)).all_reduce(part_TD)
            if self._conjunction_bias_D is not None:
                y_TD = y_TD + self._conjunction_bias_D
        logits_TV = self._head(self._ln_f(y_TD[None]))[0]
        if self.device.type == "cpu":  # only some CPU kernels give float32, and all ranks must gather one type
            logits_TV = logits_TV.float()
        logits_TV = self.group.all_reduce_for(len(logits_TV)).gather_columns(logits_TV)
        return logits_TV[:, : self.num_ids].float() if self.part.rank == 0 else logits_TV


@dataclass(frozen=True, slots=True)
class _LayerInput:
    """The input of a layer."""

    x_WTD: Tensor
    normed: Normed | None
    """The layer's `ln_1` of x; None after the last layer."""
    handle: Handle | None = None
    """The all-reduce of x in flight, if this layer or, in `kraken_delayed`, the next one reads the other ways."""


class _Layer:
    """One layer of this rank's ways; the equations are at the top of `kraken/model/architecture.py`."""

    def __init__(
        self,
        part: Part,
        weights: Weights,
        index: int,
        group: DeviceGroup,
        quantization: Quantization,
    ):
        config = part.config
        self.num_heads, self.head_size = part.heads_per_way, config.head_size
        self.gated = config.activation == "swiglu"
        self._group, self._kernels = group, group.kernels
        self._is_tensor_parallel, self._is_kraken = part.is_tensor_parallel, config.is_kraken
        self._num_ways = config.num_ways

        def take(name: str) -> tuple[Tensor, Tensor | None]:
            return weights.pop(f"h.{index}.{name}.weight"), weights.pop(f"h.{index}.{name}.bias", None)

        is_quantized = quantization == "fp8"

        def linear(name: str, activation: Activation = "none", gelu_before: bool = False) -> Linear:
            weight, bias = take(name)
            if part.is_tensor_parallel and part.rank > 0 and name.endswith("c_proj"):
                bias = None  # rank 0 adds it
            if is_quantized:
                return Fp8Linear(weight, bias, self._kernels, gelu_before)
            return self._kernels.linear(weight, bias, activation)

        self.ln_1 = Norm(*take("ln_1"), is_quantized)
        self.next_norm: Norm | None = None
        """`ln_1` of the next layer, computed in one kernel with this layer's last residual addition."""
        self.index, self.num_layers = index, config.num_layers
        self.reads_others = config.architecture == "kraken" and index > 0
        """The layer reads the sum over all ways. The first layer does not, since all ways start from one embedding."""
        self.ln_2 = None if config.has_one_norm else Norm(*take("ln_2"), is_quantized)
        self.c_attn, self.attn_proj = linear("attn.c_attn"), linear("attn.c_proj")
        # GELU is in the kernel of `c_fc`, or in the one that quantizes the inputs of `mlp_proj`
        self.c_fc = linear("mlp.c_fc", "none" if self.gated else "gelu")
        self.mlp_proj = linear("mlp.c_proj", gelu_before=not self.gated)

    def starts_all_reduce(self, selects_rows: bool) -> bool:
        """Whether the layer starts the all-reduce of its output, which the next layer reads.

        Args:
            selects_rows: the last layer starts its own all-reduce, over the rows whose logits are computed, so the
                layer before it does not.
        """
        last = self.num_layers - 1
        return self._is_kraken and self.index < (last - 1 if selects_rows else last)

    def __call__(
        self,
        state: _LayerInput,
        heads: Callable[[Tensor, Tensor, Tensor], Tensor],
        starts_all_reduce: bool,
        rows_R: Tensor | None = None,
    ) -> _LayerInput:
        """Run the layer; returns the input of the next one.

        Args:
            starts_all_reduce: start the all-reduce that the next layer reads, over all tokens.
            rows_R: in the last layer, the tokens whose logits are computed; of the others only keys and values are.
        """
        x_WTD, normed, handle = state.x_WTD, state.normed, state.handle
        assert normed is not None
        if rows_R is not None:
            x_WTD = x_WTD.index_select(1, rows_R)
            if self.reads_others and len(rows_R):
                handle = self._group.all_reduce_for(len(rows_R)).start(x_WTD)
        attended_WTD = self._attention(normed, heads, rows_R)
        if not attended_WTD.shape[1]:
            return _LayerInput(x_WTD, None)
        all_reduce = self._group.all_reduce_for(x_WTD.shape[1])
        if self.ln_2 is None:  # the parallel block
            normed = normed if rows_R is None else select(normed, rows_R)
            return _LayerInput(*all_reduce.all_reduce_add_norm(x_WTD, attended_WTD + self._mlp(normed), self.next_norm))
        if self._is_tensor_parallel:  # the next linear reads the sum, so both all-reduces are waited for
            a_WTD, normed = all_reduce.all_reduce_add_norm(x_WTD, attended_WTD, self.ln_2)
            assert normed is not None
            return _LayerInput(*all_reduce.all_reduce_add_norm(a_WTD, self._mlp(normed), self.next_norm))
        if handle is None:
            a_WTD, normed = self._kernels.add_norm(x_WTD, attended_WTD, self.ln_2)
        else:  # the all-reduce was in flight during attention
            a_WTD, normed = handle.add_norm(x_WTD, attended_WTD, self.ln_2)
        assert normed is not None
        if starts_all_reduce:
            return _LayerInput(*all_reduce.add_norm_start(a_WTD, self._mlp(normed), self.next_norm))
        return _LayerInput(*self._kernels.add_norm(a_WTD, self._mlp(normed), self.next_norm))

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


class _DelayedLayer(_Layer):
    """A layer of `kraken_delayed`: its input's all-reduce is in flight while all of the layer computes."""

    def starts_all_reduce(self, selects_rows: bool) -> bool:
        """The sum over the first layer's equal inputs is known, and no layer reads the sum over the last one's."""
        return self.index < self.num_layers - 2

    def __call__(
        self,
        state: _LayerInput,
        heads: Callable[[Tensor, Tensor, Tensor], Tensor],
        starts_all_reduce: bool,
        rows_R: Tensor | None = None,
    ) -> _LayerInput:
        """See `_Layer.__call__`. `state.normed` includes the other ways' inputs of the layer before."""
        x_WTD, normed = state.x_WTD, state.normed
        assert normed is not None
        attended_WTD = self._attention(normed, heads, rows_R)
        if rows_R is not None:
            x_WTD, normed = x_WTD.index_select(1, rows_R), select(normed, rows_R)
            if not len(rows_R):
                return _LayerInput(x_WTD, None)
        addend_WTD = attended_WTD + self._mlp(normed)
        if self.next_norm is None:
            return _LayerInput(*self._kernels.add_norm(x_WTD, addend_WTD, None))
        if state.handle is None:  # in the first layer all ways are equal
            total_1TD = self._num_ways * x_WTD[:1]
            out = self._kernels.add_reduced_norm(x_WTD, addend_WTD, self.next_norm, total_1TD, is_total=True)
        else:
            out = state.handle.add_norm(x_WTD, addend_WTD, self.next_norm)
        out_WTD, out_normed = out
        all_reduce = self._group.all_reduce_for(out_WTD.shape[1])
        return _LayerInput(out_WTD, out_normed, all_reduce.start(out_WTD) if starts_all_reduce else None)


def _side_by_side(x_WTNH: Tensor) -> Tensor:
    """The heads of all ways side by side, [T, N, H]."""
    return x_WTNH.permute(1, 0, 2, 3).flatten(1, 2)


def _apart(x_TNH: Tensor, num_ways: int) -> Tensor:
    """The inverse of `_side_by_side`."""
    return x_TNH.unflatten(1, (num_ways, -1)).permute(1, 0, 2, 3)


def _head_rows(wte_VD: Tensor, rows: range, num_ids: int) -> Tensor:
    """The embedding's rows for some ids, zeros beyond the last id."""
    rows_VD = wte_VD[rows.start : min(rows.stop, num_ids)]
    return rows_VD if len(rows_VD) == len(rows) else F.pad(rows_VD, (0, 0, 0, len(rows) - len(rows_VD)))
