"""The KV cache's tensors on one device. Shape letters as in `kraken/model/architecture.py`, and: L layers, S slots
(blocks times tokens per block), N the heads of all ways side by side.
"""

import torch

from kraken.engine.batch import StepBatch
from kraken.engine.kernels.torch.attention import PagedAttend
from kraken.engine.kernels.torch.kernels import TorchKernels


class PagedKVCache:
    """Keys and values of every block of every layer. `ModelRunner` owns it; `BlockPool` allocates its blocks."""

    def __init__(
        self,
        num_layers: int,
        num_heads: int,
        head_size: int,
        num_blocks: int,
        tokens_per_block: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: TorchKernels,
    ):
        shape = (num_layers, num_heads, num_blocks * tokens_per_block, head_size)
        self.tokens_per_block = tokens_per_block
        self.keys_LNSH, self.values_LNSH = (kernels.zeros(shape, dtype, device) for _ in range(2))
        self._kernels = kernels

    def attend(self, batch: StepBatch) -> PagedAttend:
        """Attention of one step."""
        return self._kernels.paged_attention(self.keys_LNSH, self.values_LNSH, batch)
