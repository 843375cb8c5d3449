"""Attention over the paged KV cache with torch's operators.

Shape letters as in `kraken/model/architecture.py`, and: L layers, S slots (blocks times tokens per block), N the
heads of all ways side by side, T the tokens of all sequences one after the other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.engine.batch import Integers, StepBatch

PagedAttend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer index, q_TNH, k_TNH, v_TNH) -> out_TNH, for the sequences of one step. Stores k and v first."""


@dataclass(frozen=True, slots=True)
class _SequenceView:
    """One sequence of the step."""

    rows: slice
    """Its tokens among T."""
    slots: tuple[slice, ...]
    """Runs of neighbouring slots that hold its keys, from position 0 to its last token of this step."""
    is_causal: bool
    mask_TS: Tensor | None
    """Which keys each token sees, unless it is all of them or `is_causal` says it."""


def paged_attention(keys_LNSH: Tensor, values_LNSH: Tensor, batch: StepBatch) -> PagedAttend:
    """Attention of one step. All keys of a layer are stored before any is read, so that one sequence may hold blocks
    that another one of the same step fills."""
    device = keys_LNSH.device
    slots_T = torch.from_numpy(batch.slot_mapping()).to(device)
    views = [_view(batch, index, end, device) for index, end in enumerate(batch.ends)]

    def attend(layer: int, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
        keys_NSH, values_NSH = keys_LNSH[layer], values_LNSH[layer]
        keys_NSH.index_copy_(1, slots_T, k_TNH.transpose(0, 1))
        values_NSH.index_copy_(1, slots_T, v_TNH.transpose(0, 1))
        q_NTH = q_TNH.transpose(0, 1)
        out = [_attend(q_NTH[:, view.rows], keys_NSH, values_NSH, view) for view in views]
        return out[0] if len(out) == 1 else torch.cat(out)

    return attend


def _view(batch: StepBatch, index: int, end: int, device: torch.device) -> _SequenceView:
    first, num_tokens = batch.first_positions[index], batch.num_tokens[index]
    num_keys = first + num_tokens
    mask_TS = None
    if first > 0 and num_tokens > 1:
        mask_TS = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=device).tril(diagonal=first)
    return _SequenceView(
        rows=slice(end - num_tokens, end),
        slots=tuple(_runs(batch.block_tables[index], num_keys, batch.tokens_per_block)),
        is_causal=first == 0 and num_tokens > 1,
        mask_TS=mask_TS,
    )


def _runs(blocks: Integers, num_keys: int, tokens_per_block: int) -> list[slice]:
    """The slots of a sequence's first keys, as few slices."""
    used = np.asarray(blocks[: -(-num_keys // tokens_per_block)], dtype=np.int64)
    breaks = np.flatnonzero(np.diff(used) != 1) + 1
    firsts, lasts = [0, *breaks.tolist()], [*breaks.tolist(), len(used)]
    runs = []
    for first, last in zip(firsts, lasts, strict=True):
        start = int(used[first]) * tokens_per_block
        runs.append(slice(start, start + min(last * tokens_per_block, num_keys) - first * tokens_per_block))
    return runs


def _attend(q_NTH: Tensor, keys_NSH: Tensor, values_NSH: Tensor, view: _SequenceView) -> Tensor:
    """Attention of one sequence, [T, N, H]. Keys in one run of slots are read in place, others are gathered."""
    keys, values = (
        cache[:, view.slots[0]] if len(view.slots) == 1 else torch.cat([cache[:, run] for run in view.slots], dim=1)
        for cache in (keys_NSH, values_NSH)
    )
    out_1NTH = F.scaled_dot_product_attention(
        q_NTH[None], keys[None], values[None], attn_mask=view.mask_TS, is_causal=view.is_causal
    )
    return out_1NTH[0].transpose(0, 1)
