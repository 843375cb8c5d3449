"""The runner: one forward pass over pieces of any lengths, prompts and single tokens mixed."""

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from kraken.engine.batch import Chance, Chunk, ForwardOutput, GraphSizes
from kraken.engine.model.attention import PagedKVCache, Piece
from kraken.engine.model.network import Network

if TYPE_CHECKING:
    from kraken.engine.cuda_graphs import CudaGraphRunner


class ModelRunner:
    """Owns the weights and the cache of one device."""

    def __init__(self, network: Network, num_blocks: int, tokens_per_block: int):
        part, config = network.part, network.config
        self.network = network
        self.num_ids = network.num_ids
        self.cache = PagedKVCache(
            config.num_layers,
            len(part.ways) * part.heads_per_way,
            config.head_size,
            num_blocks,
            tokens_per_block,
            network.dtype,
            network.device,
        )
        self._graphs: CudaGraphRunner | None = None

    def record(self, sizes: GraphSizes) -> None:
        """On CUDA, record these steps as graphs; with several ranks, at the same time on all of them."""
        if self.network.device.type == "cuda":
            from kraken.engine import cuda_graphs as graphs  # which imports Triton, and only CUDA has that

            self._graphs = graphs.CudaGraphRunner(self.network, self.cache, sizes)

    @property
    def is_asynchronous(self) -> bool:
        """Whether `forward` returns before the pass has been computed."""
        return self.network.device.type == "cuda"

    @property
    def failure(self) -> str:
        """Why nothing can be computed any more; empty while it can."""
        return ""

    def close(self) -> None:
        """Give back what was recorded, and leave the group; nothing is computed afterwards."""
        self.drop_graphs()
        self.network.group.close()

    def drop_graphs(self) -> None:
        """Compute kernel by kernel from now on."""
        if self._graphs is not None:
            self._graphs.close()
            self._graphs = None

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], chances: Sequence[Chance] = ()) -> ForwardOutput:
        """Run every chunk, in this order as far as one reads what another stores.

        Args:
            chances: by which a pass of single tokens or of one prompt may draw the next id of each chunk.
        """
        if self._graphs is not None and (forward_output := self._graphs.run(chunks, chances)) is not None:
            return forward_output
        device = self.network.device
        ids = np.concatenate([np.asarray(chunk.token_ids, dtype=np.int64) for chunk in chunks])
        positions = np.concatenate([np.arange(chunk.start, chunk.start + len(chunk.token_ids)) for chunk in chunks])
        ends = accumulate(len(chunk.token_ids) for chunk in chunks)
        rows = [row for end, chunk in zip(ends, chunks, strict=True) for row in range(end - chunk.num_logits, end)]
        pieces = [Piece(chunk.start, len(chunk.token_ids), chunk.blocks) for chunk in chunks]
        ids_T, positions_T = (torch.from_numpy(values).to(device) for values in (ids, positions))
        rows_R = None if len(rows) == len(ids) else torch.tensor(rows, dtype=torch.int64, device=device)
        return ForwardOutput(self.network(ids_T, positions_T, self.cache.attend(pieces), rows_R))

    def join(self) -> None:
        """After `forward`, before anything else is launched: of several devices, until all have come to the end of the
        pass. Of one there is nothing to wait for but its results, which whoever reads them does.
        """
