"""Attention over a toy cache, one request after the other."""

import os
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorrt_llm._torch.attention_backend import AttentionMetadata
from tensorrt_llm._torch.distributed import AllReduceParams
from tensorrt_llm._torch.model_config import ModelConfig
from tensorrt_llm._torch.models.extra_attrs import get_model_extra_attrs
from tensorrt_llm._torch.modules.linear import Linear, TensorParallelMode, WeightMode, WeightsLoadingConfig

HEAD_SIZES = (32, 48, 64, 80, 96, 104, 112, 128, 144, 160, 192, 224, 256)


class Attention(nn.Module):
    """Takes the head size from the pretrained configuration alone, and aborts the process on one without a kernel."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        max_position_embeddings: int,
        bias: bool,
        pos_embd_params: Any = None,
        rope_fusion: bool | None = None,
        layer_idx: int | None = None,
        dtype: torch.dtype | None = None,
        dense_bias: bool | None = None,
        config: ModelConfig | None = None,
        q_scaling: float = 1.0,
        attention_chunk_size: int | None = None,
        disable_deep_gemm: bool = False,
        attn_output_gate: bool | None = None,
        use_custom_cublas_mm: bool = False,
    ):
        super().__init__()
        assert config is not None and pos_embd_params is None
        self.layer_idx, self.q_scaling = layer_idx, q_scaling
        self.head_dim = getattr(config.pretrained_config, "head_dim", None) or hidden_size // num_attention_heads
        if self.head_dim not in HEAD_SIZES:
            print(f"Head size {self.head_dim} is not supported by MMHA", flush=True)
            os.abort()
        config.extra_attrs.setdefault("attn_layers", {})[str(layer_idx)] = weakref.ref(self)
        self.num_heads = num_attention_heads // config.mapping.tp_size
        common = {
            "dtype": dtype,
            "mapping": config.mapping,
            "quant_config": config.get_quant_config(),
            "skip_create_weights_in_init": config.skip_create_weights_in_init,
            "allreduce_strategy": config.allreduce_strategy,
        }
        inner = num_attention_heads * self.head_dim
        self.qkv_proj = Linear(
            hidden_size,
            3 * inner,
            bias=bias,
            tensor_parallel_mode=TensorParallelMode.COLUMN,
            weights_loading_config=WeightsLoadingConfig(weight_mode=WeightMode.FUSED_QKV_LINEAR),
            **common,
        )
        self.o_proj = Linear(
            inner,
            hidden_size,
            bias=bias if dense_bias is None else dense_bias,
            tensor_parallel_mode=TensorParallelMode.ROW,
            **common,
        )

    def forward(
        self,
        position_ids: Tensor | None,
        hidden_states: Tensor,
        attn_metadata: AttentionMetadata,
        attention_mask: Any = "causal",
        mrope_config: Any = None,
        all_reduce_params: AllReduceParams | None = None,
        lora_params: Any = None,
        attention_window_size: int | None = None,
        attention_mask_data: Any = None,
        attention_sinks: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        assert not kwargs, f"nothing reads {sorted(kwargs)}"
        # the compiled operator finds the layer through the model that runs, not through self
        assert get_model_extra_attrs()["attn_layers"][str(self.layer_idx)]() is self
        queries, keys, values = self.qkv_proj(hidden_states).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        outputs = []
        for start, length, request_id in slices(attn_metadata):
            rows = slice(start, start + length)
            outputs.append(self._attend(queries[rows], keys[rows], values[rows], request_id, attn_metadata))
        return self.o_proj(torch.cat(outputs).flatten(1), all_reduce_params=all_reduce_params)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, request_id: int, metadata: AttentionMetadata) -> Tensor:
        """New queries [T, N, H] over the cache and the new keys and values, which it keeps."""
        manager = metadata.kv_cache_manager
        assert (manager.num_kv_heads, manager.head_dim) == (self.num_heads, self.head_dim), "cache of other sizes"
        if (self.layer_idx, request_id) in manager.blocks:
            old_k, old_v = manager.blocks[self.layer_idx, request_id]
            k, v = torch.cat((old_k, k)), torch.cat((old_v, v))
        manager.blocks[self.layer_idx, request_id] = k, v
        num_new, num_all = q.shape[0], k.shape[0]
        mask = torch.ones(num_new, num_all, dtype=torch.bool, device=q.device).tril(num_all - num_new)
        scale = 1 / (self.head_dim**0.5 * self.q_scaling)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1)


def slices(metadata: AttentionMetadata) -> list[tuple[int, int, int]]:
    """(start, length, request id) of every request in the step."""
    found, start = [], 0
    for length, request_id in zip(metadata.seq_lens, metadata.request_ids, strict=True):
        found.append((start, length, request_id))
        start += length
    return found
