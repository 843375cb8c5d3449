"""Forward passes as CUDA graphs: one launch for the hundreds of small kernels of a token.

There is a graph for each of a few batch sizes of sequences that decode, and for each of a few lengths of a prompt that
begins; a step is rounded up to the next. Any other step (prompts in pieces, prompts beside sequences that decode,
prompts that are scored) is not for graphs.

Shape letters as in `kraken/engine/model/attention.py`, and: B sequences that decode, M blocks that a table has room
for.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kraken.engine.batch import Chance, Chunk, ForwardOutput, GraphSizes
from kraken.engine.kernels.cuda.paged_attention import SequenceSlots, num_splits_for, paged_decode
from kraken.engine.kernels.cuda.prompt_attention import attend_prompt
from kraken.engine.kernels.cuda.sampling import sample_ids
from kraken.engine.model.attention import PagedKVCache
from kraken.engine.model.network import Network

WARM_UP_RUNS = 2
"""Before a recording: kernels are compiled and chosen, and workspaces allocated."""


class CudaGraphRunner:
    """The recordings of one engine.

    Making it takes seconds. With several ranks all of them make theirs at once, since sums are in the graphs.
    """

    def __init__(self, network: Network, cache: PagedKVCache, sizes: GraphSizes):
        self._network, self._cache = network, cache
        self._num_multiprocessors = torch.cuda.get_device_properties(network.device).multi_processor_count
        self._pool = torch.cuda.graph_pool_handle()
        self._batch_sizes, self._prompt_sizes = sizes.batch_sizes, sizes.prompt_lengths
        self._decodes: dict[int, _CapturedGraph] = {}
        self._prompts: dict[int, _CapturedGraph] = {}
        try:
            # the largest first: the others then fit into its memory
            for size in reversed(self._batch_sizes):
                shape: tuple[int, ...] = (size, 2 + sizes.max_blocks)
                self._decodes[size] = self._record(self._decode, shape, num_rows=size)
            for size in reversed(self._prompt_sizes):
                self._prompts[size] = self._record(self._prompt, (2 * size + 1,), num_rows=1)
        except BaseException:
            self.close()
            raise

    def run(self, chunks: Sequence[Chunk], chances: Sequence[Chance]) -> ForwardOutput | None:
        """What a step reads out, and the next id of each chunk by its chance; None where no recording fits."""
        if all(len(chunk.token_ids) == chunk.num_logits == 1 for chunk in chunks):
            index = bisect_left(self._batch_sizes, len(chunks))
            if index == len(self._batch_sizes):
                return None
            recording = self._decodes[self._batch_sizes[index]]
            rows = recording.inputs()
            rows[len(chunks) :, 1] = 0
            for row, chunk in zip(rows, chunks, strict=False):
                length = chunk.start + 1
                num_used = -(-length // self._cache.tokens_per_block)
                row[0], row[1], row[2 : 2 + num_used] = chunk.token_ids[0], length, chunk.blocks[:num_used]
            return recording.replay(len(chunks), chances)
        if len(chunks) > 1 or chunks[0].start > 0 or chunks[0].num_logits != 1:
            return None
        (chunk,) = chunks
        num_tokens = len(chunk.token_ids)
        index = bisect_left(self._prompt_sizes, num_tokens)
        if index == len(self._prompt_sizes):
            return None
        size = self._prompt_sizes[index]
        recording = self._prompts[size]
        num_used = -(-num_tokens // self._cache.tokens_per_block)
        # what an earlier prompt left behind the end is computed, and read by nobody
        values = recording.inputs()
        values[:num_tokens] = chunk.token_ids
        values[size : size + num_used] = chunk.blocks[:num_used]
        values[-1] = num_tokens - 1
        return recording.replay(1, chances)

    def close(self) -> None:
        """Give everything back; a step that is on the device still ends. NCCL's groups cannot end before this."""
        for recording in (*self._decodes.values(), *self._prompts.values()):
            recording.close()

    def _record(self, forward: Callable[[Tensor], Tensor], shape: tuple[int, ...], num_rows: int) -> "_CapturedGraph":
        return _CapturedGraph(forward, shape, num_rows, self._pool, self._network.device, self._network.part.rank == 0)

    def _decode(self, inputs_BC: Tensor) -> Tensor:
        """One token of each sequence: its id, its length with it, its blocks."""
        ids_B, lengths_B, tables_BM = inputs_BC[:, 0], inputs_BC[:, 1].contiguous(), inputs_BC[:, 2:].contiguous()

        def attend(layer: int, q_BNH: Tensor, k_BNH: Tensor, v_BNH: Tensor) -> Tensor:
            keys, values = self._cache.keys_LNSH[layer], self._cache.values_LNSH[layer]
            num_splits = num_splits_for(q_BNH.shape[0], q_BNH.shape[1], self._num_multiprocessors)
            size = self._cache.tokens_per_block
            return paged_decode(q_BNH, k_BNH, v_BNH, keys, values, tables_BM, lengths_B, size, num_splits)

        return self._network(ids_B, (lengths_B - 1).clamp(min=0), attend, None)

    def _prompt(self, inputs_C: Tensor) -> Tensor:
        """A prompt from its first token on: ids, blocks, and the last token's index."""
        size, tokens_per_block = len(inputs_C) // 2, self._cache.tokens_per_block
        ids_T, blocks_M, last_1 = inputs_C[:size], inputs_C[size:-1], inputs_C[-1:]

        def attend(layer: int, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
            keys, values = self._cache.keys_LNSH[layer], self._cache.values_LNSH[layer]
            return attend_prompt(q_TNH, k_TNH, v_TNH, SequenceSlots(keys, values, blocks_M, last_1, tokens_per_block))

        positions_T = torch.arange(size, device=inputs_C.device)
        return self._network(ids_T, positions_T, attend, last_1)


class _CapturedGraph:
    """One graph, what it reads and what it writes.

    Args:
        forward: float32 logits [rows, ids] of inputs of that shape.
        pool: memory that recordings share which are never replayed at once.
        is_read: whether the next ids are drawn here, since this rank's logits are the engine's.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        num_rows: int,
        pool: Any,
        device: torch.device,
        is_read: bool,
    ):
        num_chance_bytes = 16 * num_rows
        self._host = torch.zeros(num_chance_bytes + 4 * math.prod(shape), dtype=torch.uint8, pin_memory=True)
        self._on_device = torch.zeros_like(self._host, device=device)
        self._values = self._host[num_chance_bytes:].view(torch.int32).view(shape).numpy()
        self._chances = self._host[:num_chance_bytes].view(torch.float64).view(num_rows, 2).numpy()
        self._were_read = torch.cuda.Event()
        self._next_R = torch.empty(num_rows, dtype=torch.int64, pin_memory=True) if is_read else None
        inputs = self._on_device[num_chance_bytes:].view(torch.int32).view(shape)
        chances_R2 = self._on_device[:num_chance_bytes].view(torch.float64).view(num_rows, 2)

        def run() -> Tensor:
            logits_RV = forward(inputs)
            if self._next_R is not None:
                # here, since afterwards it would cost the host more than some layers cost the device
                self._next_R.copy_(sample_ids(logits_RV, chances_R2), non_blocking=True)
            return logits_RV

        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(WARM_UP_RUNS):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # whatever else the process does with the device meanwhile
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"), torch.inference_mode():
            self._logits_RV = run()

    def inputs(self) -> np.ndarray:
        """To be filled before a replay; waits until the last one has read them."""
        self._were_read.synchronize()
        return self._values

    def replay(self, num_rows: int, chances: Sequence[Chance]) -> ForwardOutput:
        """The first rows; the logits are overwritten by the next replay of any recording of the pool."""
        if chances:
            self._chances[:num_rows] = chances
        self._on_device.copy_(self._host, non_blocking=True)
        self._were_read.record()
        self._graph.replay()
        next_ids_R = None if self._next_R is None or not chances else self._next_R[:num_rows]
        return ForwardOutput(self._logits_RV[:num_rows], next_ids_R)

    def close(self) -> None:
        self._graph.reset()
