"""The key-value cache: one row of a whole context per running request, the rows in use always the first ones.

Shape letters as in `kraken/model.py`; R rows (requests), C context length, L layers. The heads of all ways stand side
by side (W*N), so that attention is one call over all of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kraken.config import ModelConfig
from kraken.model import Attend


class KVCache:
    """Keys and values of at most `num_rows` requests."""

    def __init__(self, config: ModelConfig, num_rows: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_layers, num_rows, config.num_heads, config.context_length, config.head_size)
        self.keys_LRNCH = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LRNCH = torch.zeros(shape, dtype=dtype, device=device)

    def prefill(self, row: int) -> Attend:
        """Attention for one whole prompt [B=1]: causal among its own tokens, which are then in the row's cache."""

        def attend(layer: int, q_WBTNH: Tensor, k_WBTNH: Tensor, v_WBTNH: Tensor) -> Tensor:
            q, k, v = map(_heads_side_by_side, (q_WBTNH, k_WBTNH, v_WBTNH))
            num_tokens = k.shape[2]
            self.keys_LRNCH[layer, row, :, :num_tokens] = k[0]
            self.values_LRNCH[layer, row, :, :num_tokens] = v[0]
            return _ways_apart(F.scaled_dot_product_attention(q, k, v, is_causal=True), q_WBTNH.shape[0])

        return attend

    def decode(self, positions_R: Tensor) -> Attend:
        """Attention for one new token in each of the first rows [T=1], over its row up to its position."""
        num_rows = len(positions_R)
        rows_R = torch.arange(num_rows, device=positions_R.device)
        length = int(positions_R.max()) + 1
        visible_R11C = (torch.arange(length, device=positions_R.device) <= positions_R[:, None])[:, None, None]

        def attend(layer: int, q_WBTNH: Tensor, k_WBTNH: Tensor, v_WBTNH: Tensor) -> Tensor:
            q, k, v = map(_heads_side_by_side, (q_WBTNH, k_WBTNH, v_WBTNH))
            keys_RNCH, values_RNCH = self.keys_LRNCH[layer], self.values_LRNCH[layer]
            keys_RNCH[rows_R, :, positions_R] = k[:, :, 0]
            values_RNCH[rows_R, :, positions_R] = v[:, :, 0]
            seen = slice(num_rows), slice(None), slice(length)
            out = F.scaled_dot_product_attention(q, keys_RNCH[seen], values_RNCH[seen], attn_mask=visible_R11C)
            return _ways_apart(out, q_WBTNH.shape[0])

        return attend

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copy a row's first tokens into another row, to close the gap a finished request leaves."""
        for cache in (self.keys_LRNCH, self.values_LRNCH):
            cache[:, target, :, :num_tokens] = cache[:, source, :, :num_tokens]


def _heads_side_by_side(x_WBTNH: Tensor) -> Tensor:
    """[W, B, T, N, H] -> [B, W*N, T, H]."""
    return x_WBTNH.permute(1, 0, 3, 2, 4).flatten(1, 2)


def _ways_apart(out: Tensor, num_ways: int) -> Tensor:
    """[B, W*N, T, H] -> [W, B, T, N, H]."""
    return out.unflatten(1, (num_ways, -1)).permute(1, 0, 3, 2, 4)
