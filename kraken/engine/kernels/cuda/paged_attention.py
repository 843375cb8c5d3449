"""Paged attention of decoding sequences on CUDA, and storing keys and values in the paged cache: Triton kernels.

Called by CUDA graphs. In attention a program computes one head of one sequence: it stores the new token's key and
value, then goes over the sequence's blocks with an online softmax (Milakov and Gimelshein, 2018). If sequences and
heads are too few to fill the device, the keys of a head are split among several programs, and a second kernel combines
the splits (Dao et al., Flash-Decoding, 2023). The host reads nothing back and no shape depends on the lengths, as CUDA
graphs require.

Shape letters as in `kraken/engine/kernels/torch/attention.py`, and: B sequences, M blocks of a block table.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS_PER_TILE = 32
"""Keys that a program holds at a time."""
TOKENS_PER_STORE = 16
"""Tokens of one head that a program stores; with 64 channels of 16 bits that is 16 bytes per thread."""


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, tables_ptr, lengths_ptr, out_ptr, weight_ptr,
    scale, token_stride, head_stride, num_slots, num_blocks,
    num_heads: tl.constexpr, head_size: tl.constexpr, padded_size: tl.constexpr, num_splits: tl.constexpr,
    tokens_per_block: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channels = tl.arange(0, padded_size)
    is_channel = channels < head_size
    length = tl.load(lengths_ptr + row)  # with the new token; 0 marks a row that pads the batch
    source = row * token_stride + head * head_stride + channels
    q = tl.load(q_ptr + source, mask=is_channel, other=0.0).to(tl.float32) * scale
    new_key = tl.load(k_ptr + source, mask=is_channel, other=0.0)
    new_value = tl.load(v_ptr + source, mask=is_channel, other=0.0)
    head_start = head.to(tl.int64) * num_slots * head_size
    last = tl.maximum(length - 1, 0)
    if (split == 0) & (length > 0):
        block = tl.load(tables_ptr + row * num_blocks + last // tokens_per_block).to(tl.int64)
        target = head_start + (block * tokens_per_block + last % tokens_per_block) * head_size + channels
        tl.store(keys_ptr + target, new_key, mask=is_channel)
        tl.store(values_ptr + target, new_value, mask=is_channel)
    # the new token is taken from registers: its stores may not be visible to other programs yet
    own_score = tl.sum(q * new_key.to(tl.float32), axis=0)
    has_own = (split == 0) & (length > 0)
    largest = tl.where(has_own, own_score, float("-inf"))
    total = tl.where(has_own, 1.0, 0.0)
    out = tl.where(has_own, 1.0, 0.0) * new_value.to(tl.float32)
    tiles = tl.cdiv(last, tile)
    tiles_per_split = tl.cdiv(tiles, num_splits)
    for index in range(split * tiles_per_split, tl.minimum((split + 1) * tiles_per_split, tiles)):
        positions = index * tile + tl.arange(0, tile)
        is_past = positions < last
        blocks = tl.load(tables_ptr + row * num_blocks + positions // tokens_per_block, mask=is_past, other=0)
        slots = blocks.to(tl.int64) * tokens_per_block + positions % tokens_per_block
        places = head_start + slots[:, None] * head_size + channels[None, :]
        mask = is_past[:, None] & is_channel[None, :]
        keys = tl.load(keys_ptr + places, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(values_ptr + places, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(is_past, tl.sum(q[None, :] * keys, axis=1), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=0))
        correction = tl.exp(largest - new_largest)
        weights = tl.exp(scores - new_largest)
        total = total * correction + tl.sum(weights, axis=0)
        out = out * correction + tl.sum(weights[:, None] * values, axis=0)
        largest = new_largest
    place = (row * num_heads + head) * num_splits + split
    if num_splits == 1:
        tl.store(out_ptr + place * head_size + channels, out / tl.maximum(total, 1e-38), mask=is_channel)
    else:
        tl.store(out_ptr + place * head_size + channels, out, mask=is_channel)
        tl.store(weight_ptr + place * 2, largest)
        tl.store(weight_ptr + place * 2 + 1, total)


@triton.jit
def _combine_splits(  # type: ignore[no-untyped-def]
    split_ptr, weight_ptr, out_ptr,
    head_size: tl.constexpr, padded_size: tl.constexpr, num_splits: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    channels, splits = tl.arange(0, padded_size), tl.arange(0, num_splits)
    is_channel = channels < head_size
    largest = tl.load(weight_ptr + (place * num_splits + splits) * 2)
    totals = tl.load(weight_ptr + (place * num_splits + splits) * 2 + 1)
    top = tl.maximum(tl.max(largest, axis=0), -1e30)  # finite also for a row that pads the batch
    weights = tl.exp(largest - top)
    source = (place * num_splits + splits)[:, None] * head_size + channels[None, :]
    outs = tl.load(split_ptr + source, mask=is_channel[None, :], other=0.0)
    out = tl.sum(weights[:, None] * outs, axis=0) / tl.maximum(tl.sum(weights * totals, axis=0), 1e-38)
    tl.store(out_ptr + place * head_size + channels, out, mask=is_channel)


@triton.jit
def slot_mapping_of(tokens, blocks_ptr, last_ptr, tokens_per_block: tl.constexpr):  # type: ignore[no-untyped-def]
    """The cache slots of some positions of a sequence, and which of the positions are not behind its end."""
    is_here = tokens <= tl.load(last_ptr)
    blocks = tl.load(blocks_ptr + tokens // tokens_per_block, mask=is_here, other=0).to(tl.int64)
    return blocks * tokens_per_block + tokens % tokens_per_block, is_here


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    k_ptr, v_ptr, keys_ptr, values_ptr, blocks_ptr, last_ptr,
    token_stride, head_stride, num_slots,
    tokens_per_block: tl.constexpr, head_size: tl.constexpr, padded_size: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    channels = tl.arange(0, padded_size)
    slots, is_here = slot_mapping_of(tokens, blocks_ptr, last_ptr, tokens_per_block)
    mask = is_here[:, None] & (channels < head_size)[None, :]
    sources = tokens[:, None] * token_stride + head * head_stride + channels[None, :]
    targets = (head * num_slots + slots)[:, None] * head_size + channels[None, :]
    keys, values = tl.load(k_ptr + sources, mask=mask), tl.load(v_ptr + sources, mask=mask)
    tl.store(keys_ptr + targets, keys, mask=mask)
    tl.store(values_ptr + targets, values, mask=mask)


@dataclass(frozen=True, slots=True)
class SequenceSlots:
    """The slots of one sequence in one layer's cache.

    Args:
        blocks_M: int32 block table.
        last_1: int32, position of the sequence's last token. Tokens behind it, which pad a graph's prompt, are not
            stored.
    """

    keys_NSH: Tensor
    values_NSH: Tensor
    blocks_M: Tensor
    last_1: Tensor
    tokens_per_block: int


def paged_store(k_TNH: Tensor, v_TNH: Tensor, sequence_slots: SequenceSlots) -> None:
    """Store the keys and values of a prompt."""
    k, v = with_equal_strides(k_TNH, v_TNH)
    T, N, H = k.shape
    _store[triton.cdiv(T, TOKENS_PER_STORE), N](
        k, v, sequence_slots.keys_NSH, sequence_slots.values_NSH, sequence_slots.blocks_M, sequence_slots.last_1,
        k.stride(0), k.stride(1), sequence_slots.keys_NSH.shape[1], tokens_per_block=sequence_slots.tokens_per_block,
        head_size=H, padded_size=triton.next_power_of_2(H), tile=TOKENS_PER_STORE, num_warps=4,
    )  # fmt: skip


def with_equal_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied unless their strides are equal and the last dimension is contiguous."""
    first = tensors[0]
    if first.stride(-1) == 1 and all(x.stride() == first.stride() for x in tensors):
        return tensors
    return tuple(x.contiguous() for x in tensors)


def num_splits_for(num_rows: int, num_heads: int, num_multiprocessors: int) -> int:
    """Number of programs among which a head's keys are split: a power of two up to 16 that about fills the device."""
    num_splits = 1
    while num_splits < 16 and num_rows * num_heads * num_splits * 2 <= 2 * num_multiprocessors:
        num_splits *= 2
    return num_splits


def paged_decode(
    q_BNH: Tensor,
    k_BNH: Tensor,
    v_BNH: Tensor,
    keys_NSH: Tensor,
    values_NSH: Tensor,
    tables_BM: Tensor,
    lengths_B: Tensor,
    tokens_per_block: int,
    num_splits: int,
) -> Tensor:
    """Store each row's key and value at the end of its sequence, and compute its attention over the sequence.

    Args:
        tables_BM: int32 block tables.
        lengths_B: int32 tokens of each sequence, including the new one; 0 stores nothing and returns zeros.
        num_splits: a power of two; see `num_splits_for`.

    Returns:
        [B, N, H] in q's type, contiguous.
    """
    B, N, H = q_BNH.shape
    q, k, v = with_equal_strides(q_BNH, k_BNH, v_BNH)
    out_BNH = torch.empty(B, N, H, dtype=q_BNH.dtype, device=q_BNH.device)
    padded_size = triton.next_power_of_2(H)
    splits, weights = out_BNH, lengths_B  # unused if there is one split
    if num_splits > 1:
        splits = torch.empty(B, N, num_splits, H, dtype=torch.float32, device=q_BNH.device)
        weights = torch.empty(B, N, num_splits, 2, dtype=torch.float32, device=q_BNH.device)
    _attend[B, N, num_splits](
        q, k, v, keys_NSH, values_NSH, tables_BM, lengths_B, splits, weights,
        H**-0.5, q.stride(0), q.stride(1), keys_NSH.shape[1], tables_BM.shape[1],
        num_heads=N, head_size=H, padded_size=padded_size, num_splits=num_splits,
        tokens_per_block=tokens_per_block, tile=TOKENS_PER_TILE, num_warps=4,
    )  # fmt: skip
    if num_splits > 1:
        _combine_splits[(B * N,)](
            splits, weights, out_BNH, head_size=H, padded_size=padded_size, num_splits=num_splits, num_warps=1
        )
    return out_BNH
