"""The forward pass of one rank: weights, KV cache, and CUDA graphs. `EngineCore` calls it on rank 0, the worker group
on the other ranks.
"""

from typing import TYPE_CHECKING

import torch

from kraken.engine.batch import ForwardOutput, GraphSizes, StepBatch
from kraken.engine.kernels.choose import choose_kernels
from kraken.engine.model.attention import PagedKVCache
from kraken.engine.model.network import Network
from kraken.engine.sampler import Sampler

if TYPE_CHECKING:
    from kraken.engine.cuda_graphs import CudaGraphRunner


class ModelRunner:
    """Owns the weights and the KV cache of one device."""

    def __init__(self, network: Network, num_blocks: int, tokens_per_block: int):
        part, config = network.part, network.config
        self.network = network
        self.cache = PagedKVCache(
            config.num_layers,
            len(part.ways) * part.heads_per_way,
            config.head_size,
            num_blocks,
            tokens_per_block,
            network.dtype,
            network.device,
            network.kernels,
        )
        self.sampler = Sampler(choose_kernels(network.device, torch.float32))  # logits are float32 in every model
        self._graphs: CudaGraphRunner | None = None

    def capture_graphs(self, sizes: GraphSizes) -> None:
        """On CUDA, capture graphs for these steps. All ranks must call it at the same time: the graphs contain
        all-reduces."""
        if self.network.device.type == "cuda":
            from kraken.engine.cuda_graphs import CudaGraphRunner  # imports Triton, which only CUDA has

            self._graphs = CudaGraphRunner(self.network, self.cache, sizes)

    @property
    def is_asynchronous(self) -> bool:
        """Whether `forward` returns before the device has finished."""
        return self.network.device.type == "cuda"

    @property
    def failure(self) -> str:
        """Why no forward pass can succeed any more; empty if it can."""
        return ""

    def close(self) -> None:
        """Free the graphs and leave the process group. `forward` must not be called afterwards."""
        self.drop_graphs()
        self.network.group.close()

    def drop_graphs(self) -> None:
        """Free the graphs; later passes launch their kernels one by one."""
        if self._graphs is not None:
            self._graphs.close()
            self._graphs = None

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> ForwardOutput:
        """Compute one step. Only rank 0 gets logits."""
        if self._graphs is not None and (output := self._graphs.run(batch)) is not None:
            return output
        device = self.network.device
        ids_T = torch.from_numpy(batch.token_ids_T).long().to(device)
        positions_T = torch.from_numpy(batch.positions()).to(device)
        rows = batch.logit_rows()
        rows_R = None if len(rows) == len(ids_T) else torch.tensor(rows, dtype=torch.int64, device=device)
        return ForwardOutput(self.network(ids_T, positions_T, self.cache.attend(batch), rows_R))

    def join(self) -> None:
        """With several CUDA devices, wait until the pass has ended on all of them; must follow `forward` before any
        other work is launched. No-op on one device, where the sampler waits when it reads the results."""
