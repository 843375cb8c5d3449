"""Attention of a whole prompt on CUDA: a Triton kernel that also stores the prompt's keys and values in the paged
cache.

Called by CUDA graphs and by `CudaKernels.causal_attention`. A program computes some tokens of one head with an online
softmax over the keys up to its own (Dao et al., FlashAttention, 2022), then stores its own keys and values. Up to
`MAX_TOKENS` this is faster than torch's attention, which needs other kernels for storing; longer prompts use torch's.
The programs with the most keys start first.

Shape letters as in `kraken/engine/kernels/torch/attention.py`.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from kraken.engine.kernels.cuda.paged_attention import SequenceSlots, paged_store, slot_mapping_of, with_equal_strides
from kraken.model.architecture import FASTEST_ATTENTION_FIRST

MAX_TOKENS = 2048
"""Longest prompt for which the kernel is faster than torch's, on an H200."""
MAX_TOKENS_OF_OTHERS = 256
"""The same for head sizes that are no power of two, for which some lanes idle, and for float32."""
LOG2_E = 1.4426950408889634


@triton.jit
def _walk(  # type: ignore[no-untyped-def]
    q, out, largest, total, k_ptr, v_ptr, queries, channels, is_channel, first, end, num_tokens, stride, v_stride,
    scale, tile: tl.constexpr, is_masked: tl.constexpr,
):  # fmt: skip
    """Continue the online softmax over the keys from `first` to `end`."""
    for start in range(first, end, tile):
        keys = start + tl.arange(0, tile)
        places = keys.to(tl.int64)[:, None]
        mask = is_channel[None, :]
        if is_masked:
            mask = mask & (keys < num_tokens)[:, None]
        loaded = tl.load(k_ptr + places * stride + channels[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(loaded), input_precision="ieee") * scale
        if is_masked:
            scores = tl.where(queries[:, None] >= keys[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_largest[:, None])
        correction = tl.exp2(largest - new_largest)
        values = tl.load(v_ptr + places * v_stride + channels[None, :], mask=mask, other=0.0)
        total = total * correction + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(values.dtype), values, out * correction[:, None], input_precision="ieee")
        largest = new_largest
    return out, largest, total


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, out_ptr, keys_ptr, values_ptr, blocks_ptr, last_ptr,
    num_tokens, stride, head_stride, v_stride, v_head_stride, num_slots, num_heads, scale,
    tokens_per_block: tl.constexpr, head_size: tl.constexpr, padded_size: tl.constexpr, rows: tl.constexpr,
    tile: tl.constexpr, stores: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * rows
    queries = first + tl.arange(0, rows)
    channels = tl.arange(0, padded_size)
    is_channel = channels < head_size
    is_here = (queries < num_tokens)[:, None] & is_channel[None, :]
    k_ptr += head * head_stride
    v_ptr += head * v_head_stride
    places = queries.to(tl.int64)[:, None] * stride + channels[None, :]
    q_ptr += head * head_stride
    q = tl.load(q_ptr + places, mask=is_here, other=0.0)
    out = tl.zeros((rows, padded_size), tl.float32)
    largest = tl.full((rows,), -1e30, tl.float32)
    total = tl.zeros((rows,), tl.float32)
    out, largest, total = _walk(
        q, out, largest, total, k_ptr, v_ptr, queries, channels, is_channel, 0, first, num_tokens, stride, v_stride,
        scale, tile, False,
    )  # fmt: skip
    out, largest, total = _walk(
        q, out, largest, total, k_ptr, v_ptr, queries, channels, is_channel, first, first + rows, num_tokens,
        stride, v_stride, scale, tile, True,
    )  # fmt: skip
    out_places = (queries.to(tl.int64)[:, None] * num_heads + head) * head_size + channels[None, :]
    tl.store(out_ptr + out_places, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_here)
    if stores:
        slots, is_kept = slot_mapping_of(queries, blocks_ptr, last_ptr, tokens_per_block)
        mask = is_kept[:, None] & is_here
        targets = (head * num_slots + slots)[:, None] * head_size + channels[None, :]
        v_places = queries.to(tl.int64)[:, None] * v_stride + channels[None, :]
        tl.store(keys_ptr + targets, tl.load(k_ptr + places, mask=mask), mask=mask)
        tl.store(values_ptr + targets, tl.load(v_ptr + v_places, mask=mask), mask=mask)


def attend_prompt(
    q_TNH: Tensor,
    k_TNH: Tensor,
    v_TNH: Tensor,
    sequence_slots: SequenceSlots | None = None,
) -> Tensor:
    """Causal attention over a sequence's first T tokens. With `sequence_slots` their keys and values are stored.

    Returns:
        [T, N, H] in q's type.
    """
    T, N, H = q_TNH.shape
    padded_size = max(16, triton.next_power_of_2(H))
    most = MAX_TOKENS if padded_size == H and q_TNH.element_size() == 2 else MAX_TOKENS_OF_OTHERS
    if most < T:
        if sequence_slots is not None:
            paged_store(k_TNH, v_TNH, sequence_slots)
        q, k, v = (x.transpose(0, 1)[None] for x in (q_TNH, k_TNH, v_TNH))
        with sdpa_kernel(FASTEST_ATTENTION_FIRST, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)
    q, k = with_equal_strides(q_TNH, k_TNH)
    (v,) = with_equal_strides(v_TNH)
    out_TNH = torch.empty(T, N, H, dtype=q.dtype, device=q.device)
    # unused without `sequence_slots`
    held = SequenceSlots(out_TNH, out_TNH, out_TNH, out_TNH, 1) if sequence_slots is None else sequence_slots
    # tokens of a program, keys that it loads at a time, pipeline stages of its loads
    rows, tile, num_stages = (64, 64, 2 if T <= 2 * 64 else 3) if q.element_size() == 2 else (16, 16, 1)
    _attend[N, triton.cdiv(T, rows)](
        q, k, v, out_TNH, held.keys_NSH, held.values_NSH, held.blocks_M, held.last_1,
        T, q.stride(0), q.stride(1), v.stride(0), v.stride(1), held.keys_NSH.shape[1], N, H**-0.5 * LOG2_E,
        tokens_per_block=held.tokens_per_block, head_size=H, padded_size=padded_size, rows=rows, tile=tile,
        stores=sequence_slots is not None, num_warps=4, num_stages=num_stages,
    )  # fmt: skip
    return out_TNH
