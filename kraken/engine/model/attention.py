"""Attention over paged keys and values, for a batch of pieces of sequences of any lengths.

Shape letters as in `kraken/model.py`, and: L layers, S slots (blocks times tokens per block), N the heads of all ways
side by side, T the tokens of all pieces one after the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.engine.batch import Numbers
from kraken.engine.kernels.cpu.kernels import cpu_kernels, zeros_in_huge_pages

PagedAttend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer index, q_TNH, k_TNH, v_TNH) -> out_TNH; stores k and v first."""


MAX_FEW_QUERIES = 2
"""Tokens of one sequence up to which each attends alone: for more it pays to arrange the keys first."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one sequence, the earlier ones of which are in the cache."""

    start: int
    """Position of the first of them."""
    num_tokens: int
    blocks: Numbers
    """The sequence's blocks from its first token on, enough for these tokens."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a piece's tokens are in the batch, and where in the cache all that they see."""

    rows: slice
    slots: tuple[slice, ...]
    """Runs of neighbouring slots that hold the sequence from its first token to the piece's last."""
    is_causal: bool
    mask_TS: Tensor | None
    """What each token sees, where neither everything nor the causal triangle says it."""


class PagedKVCache:
    """Keys and values of every block, on one device."""

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_size: int,
        num_blocks: int,
        tokens_per_block: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (num_layers, num_heads, num_blocks * tokens_per_block, head_size)
        self.tokens_per_block = tokens_per_block
        self._kernels = cpu_kernels(device, dtype)
        if self._kernels is None:
            self.keys_LNSH = torch.zeros(shape, dtype=dtype, device=device)
            self.values_LNSH = torch.zeros(shape, dtype=dtype, device=device)
        else:
            self.keys_LNSH, self.values_LNSH = zeros_in_huge_pages(shape, dtype), zeros_in_huge_pages(shape, dtype)

    def attend(self, pieces: Sequence[Piece]) -> PagedAttend:
        """Attention for one batch. Pieces are stored before any of them reads, so one may hold another's blocks."""
        device = self.keys_LNSH.device
        ends = list(accumulate(piece.num_tokens for piece in pieces))
        slots_T = torch.from_numpy(np.concatenate([self._new_slots(piece) for piece in pieces])).to(device)
        if self._kernels is not None:
            return self._attend_by_kernels(pieces, ends, slots_T)
        places = [self._place(piece, end) for piece, end in zip(pieces, ends, strict=True)]

        def attend(layer: int, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
            keys_NSH, values_NSH = self.keys_LNSH[layer], self.values_LNSH[layer]
            keys_NSH.index_copy_(1, slots_T, k_TNH.transpose(0, 1))
            values_NSH.index_copy_(1, slots_T, v_TNH.transpose(0, 1))
            q_NTH = q_TNH.transpose(0, 1)
            out = [_attend(q_NTH[:, place.rows], keys_NSH, values_NSH, place) for place in places]
            return out[0] if len(out) == 1 else torch.cat(out)

        return attend

    def _attend_by_kernels(self, pieces: Sequence[Piece], ends: list[int], slots_T: Tensor) -> PagedAttend:
        """Few tokens of every sequence in one call, longer parts of prompts one by one."""
        kernels = self._kernels
        assert kernels is not None
        size = self.tokens_per_block
        few: list[tuple[int, int, Numbers]] = []  # each token's row, how many keys it sees, its blocks
        many: list[tuple[slice, int, Tensor]] = []  # each part's rows, its start, its blocks
        for piece, end in zip(pieces, ends, strict=True):
            first = end - piece.num_tokens
            if piece.num_tokens <= MAX_FEW_QUERIES:
                few += [(first + i, piece.start + i + 1, piece.blocks) for i in range(piece.num_tokens)]
            else:
                many.append((slice(first, end), piece.start, torch.from_numpy(np.array(piece.blocks, dtype=np.int32))))
        rows_B = torch.tensor([row for row, _, _ in few], dtype=torch.int64)
        lengths_B = torch.tensor([length for _, length, _ in few], dtype=torch.int64)
        num_blocks = [-(-length // size) for _, length, _ in few]
        tables_BM = torch.zeros(len(few), max(num_blocks, default=0), dtype=torch.int32)
        for table_M, (_, _, blocks), num in zip(tables_BM.numpy(), few, num_blocks, strict=True):
            table_M[:num] = blocks[:num]

        def attend(layer: int, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
            keys_NSH, values_NSH = self.keys_LNSH[layer], self.values_LNSH[layer]
            if k_TNH.stride() != v_TNH.stride() or k_TNH.stride(2) != 1:
                k_TNH, v_TNH = k_TNH.contiguous(), v_TNH.contiguous()
            kernels.store(k_TNH, v_TNH, keys_NSH, values_NSH, slots_T)
            q_TNH = q_TNH if q_TNH.stride(2) == 1 else q_TNH.contiguous()
            out_TNH = q_TNH.new_empty(q_TNH.shape)
            if few:
                kernels.attend(q_TNH, keys_NSH, values_NSH, rows_B, tables_BM, lengths_B, size, out_TNH)
            for rows, start, blocks_M in many:
                kernels.attend_prompt_chunk(q_TNH[rows], keys_NSH, values_NSH, blocks_M, start, size, out_TNH[rows])
            return out_TNH

        return attend

    def _new_slots(self, piece: Piece) -> np.ndarray:
        positions_T = np.arange(piece.start, piece.start + piece.num_tokens)
        blocks_T = np.asarray(piece.blocks, dtype=np.int64)[positions_T // self.tokens_per_block]
        return blocks_T * self.tokens_per_block + positions_T % self.tokens_per_block

    def _place(self, piece: Piece, end: int) -> _Place:
        num_seen = piece.start + piece.num_tokens
        mask = None
        if piece.start > 0 and piece.num_tokens > 1:
            mask = torch.ones(piece.num_tokens, num_seen, dtype=torch.bool, device=self.keys_LNSH.device)
            mask = mask.tril(diagonal=piece.start)
        return _Place(
            rows=slice(end - piece.num_tokens, end),
            slots=tuple(self._runs(piece.blocks, num_seen)),
            is_causal=piece.start == 0 and piece.num_tokens > 1,
            mask_TS=mask,
        )

    def _runs(self, blocks: Numbers, num_tokens: int) -> list[slice]:
        """The slots of a sequence's first tokens as few runs."""
        size = self.tokens_per_block
        used = np.asarray(blocks[: -(-num_tokens // size)], dtype=np.int64)
        breaks = np.flatnonzero(np.diff(used) != 1) + 1
        firsts, lasts = [0, *breaks.tolist()], [*breaks.tolist(), len(used)]
        runs = []
        for first, last in zip(firsts, lasts, strict=True):
            start = int(used[first]) * size
            runs.append(slice(start, start + min(last * size, num_tokens) - first * size))
        return runs


def _attend(q_NTH: Tensor, keys_NSH: Tensor, values_NSH: Tensor, place: _Place) -> Tensor:
    """One piece's attention, [T, N, H]; what it sees is read in place where it is one run."""
    keys, values = (
        cache[:, place.slots[0]] if len(place.slots) == 1 else torch.cat([cache[:, run] for run in place.slots], dim=1)
        for cache in (keys_NSH, values_NSH)
    )
    out_1NTH = F.scaled_dot_product_attention(
        q_NTH[None], keys[None], values[None], attn_mask=place.mask_TS, is_causal=place.is_causal
    )
    return out_1NTH[0].transpose(0, 1)
