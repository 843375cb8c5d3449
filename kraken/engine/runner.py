"""The runner: one forward pass over pieces of any lengths, prompts and single tokens mixed.

It knows tokens, positions and blocks, not requests, so that what it is told can be told to other processes too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kraken.engine.attention import PagedCache, Piece
from kraken.engine.network import Network
from kraken.model import Kraken


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence to run."""

    token_ids: Sequence[int]
    start: int
    """Position of the first of them; what comes before is in the cache."""
    blocks: Sequence[int]
    """The sequence's blocks, from its first token to at least the last of this chunk."""
    num_logits: int
    """Read out the logits of this many last tokens."""


class Runner:
    """Owns the weights and the cache on one device.

    Args:
        model: weights in the engine's type, on its device.
        num_ids: ids of the tokenizer; there are no logits for the padding ids beyond.
    """

    def __init__(self, model: Kraken, num_ids: int, num_blocks: int, tokens_per_block: int):
        config = model.config
        self.network = Network(model, num_ids)
        self.num_ids = num_ids
        self.cache = PagedCache(
            config.num_layers,
            config.num_heads,
            config.head_size,
            num_blocks,
            tokens_per_block,
            self.network.dtype,
            self.network.device,
        )

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Run every chunk, in this order as far as one reads what another stores.

        Returns:
            float32 logits [rows, ids]: the rows that each chunk asked for, one chunk after the other.
        """
        device = self.network.device
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for chunk in chunks:
            ids += chunk.token_ids
            positions += range(chunk.start, chunk.start + len(chunk.token_ids))
            rows += range(len(ids) - chunk.num_logits, len(ids))
        pieces = [Piece(chunk.start, len(chunk.token_ids), chunk.blocks) for chunk in chunks]
        ids_T, positions_T = torch.tensor(ids, device=device), torch.tensor(positions, device=device)
        hidden_TD = self.network.hidden(ids_T, positions_T, self.cache.attend(pieces))
        if len(rows) < len(ids):
            hidden_TD = hidden_TD[torch.tensor(rows, dtype=torch.int64, device=device)]
        if not rows:
            return torch.empty(0, self.num_ids, device=device)
        return self.network.logits(hidden_TD)
