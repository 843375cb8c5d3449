"""Forward passes as CUDA graphs: one launch instead of one for each of the hundreds of small kernels of a token.

`ModelRunner.capture_graphs` captures a graph for each of a few batch sizes of decoding sequences and for each of a few
lengths of a whole prompt; a step is padded to the next larger one. Other steps (chunks of prompts, prompts beside
decoding sequences, prompts whose every position is scored) run without a graph.

Shape letters as in `kraken/engine/kernels/torch/attention.py`, and: B decoding sequences, M blocks of the largest block
table, C inputs of one sequence.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kraken.engine.batch import ForwardOutput, GraphSizes, SamplingInput, StepBatch
from kraken.engine.kernels.cuda.paged_attention import SequenceSlots, num_splits_for, paged_decode
from kraken.engine.kernels.cuda.prompt_attention import attend_prompt
from kraken.engine.kernels.cuda.sampling import sample_ids
from kraken.engine.model.attention import PagedKVCache
from kraken.engine.model.network import Network

WARM_UP_RUNS = 2
"""Passes before a capture, in which kernels are compiled and tuned and workspaces allocated."""


class CudaGraphRunner:
    """The captured graphs of one rank.

    Capturing takes seconds. All ranks must capture at the same time, since the graphs contain all-reduces.
    """

    def __init__(self, network: Network, cache: PagedKVCache, sizes: GraphSizes):
        self._network, self._cache = network, cache
        self._num_multiprocessors = torch.cuda.get_device_properties(network.device).multi_processor_count
        self._pool = torch.cuda.graph_pool_handle()
        self._batch_sizes, self._prompt_lengths = sizes.batch_sizes, sizes.prompt_lengths
        self._decodes: dict[int, _CapturedGraph] = {}
        self._prompts: dict[int, _CapturedGraph] = {}
        try:
            # the largest first: the others then fit into its memory
            for size in reversed(self._batch_sizes):
                shape: tuple[int, ...] = (size, 2 + sizes.max_blocks)
                self._decodes[size] = self._capture(self._decode, shape, num_rows=size)
            for size in reversed(self._prompt_lengths):
                self._prompts[size] = self._capture(self._prompt, (2 * size + 1,), num_rows=1)
        except BaseException:
            self.close()
            raise

    def run(self, batch: StepBatch) -> ForwardOutput | None:
        """Replay the graph of a step; None if there is none."""
        if batch.is_decode:
            return self._run_decode(batch)
        if len(batch) == 1 and batch.first_positions[0] == 0 and batch.num_logits[0] == 1:
            return self._run_prompt(batch)
        return None

    def _run_decode(self, batch: StepBatch) -> ForwardOutput | None:
        index = bisect_left(self._batch_sizes, len(batch))
        if index == len(self._batch_sizes):
            return None
        graph = self._decodes[self._batch_sizes[index]]
        rows = graph.inputs()
        rows[len(batch) :, 1] = 0  # padding
        rows[: len(batch), 0] = batch.token_ids_T
        for row, first_position, blocks in zip(rows, batch.first_positions, batch.block_tables, strict=False):
            num_used = first_position // self._cache.tokens_per_block + 1
            row[1], row[2 : 2 + num_used] = first_position + 1, blocks[:num_used]
        return graph.replay(len(batch), batch.sampling)

    def _run_prompt(self, batch: StepBatch) -> ForwardOutput | None:
        num_tokens = batch.num_tokens[0]
        index = bisect_left(self._prompt_lengths, num_tokens)
        if index == len(self._prompt_lengths):
            return None
        size = self._prompt_lengths[index]
        graph = self._prompts[size]
        num_used = -(-num_tokens // self._cache.tokens_per_block)
        # the padding still holds an earlier prompt's ids: computed too, but no token of this prompt attends to them
        values = graph.inputs()
        values[:num_tokens] = batch.token_ids_T
        values[size : size + num_used] = batch.block_tables[0][:num_used]
        values[-1] = num_tokens - 1
        return graph.replay(1, batch.sampling)

    def close(self) -> None:
        """Free the graphs; a step that runs on the device still ends. NCCL's groups cannot be destroyed before this."""
        for graph in (*self._decodes.values(), *self._prompts.values()):
            graph.close()

    def _capture(self, forward: Callable[[Tensor], Tensor], shape: tuple[int, ...], num_rows: int) -> "_CapturedGraph":
        return _CapturedGraph(forward, shape, num_rows, self._pool, self._network.device, self._network.part.rank == 0)

    def _decode(self, inputs_BC: Tensor) -> Tensor:
        """One token of each sequence, from its id, the sequence's length including it, and the block table."""
        ids_B, lengths_B, tables_BM = inputs_BC[:, 0], inputs_BC[:, 1].contiguous(), inputs_BC[:, 2:].contiguous()

        def attend(layer: int, q_BNH: Tensor, k_BNH: Tensor, v_BNH: Tensor) -> Tensor:
            keys, values = self._cache.keys_LNSH[layer], self._cache.values_LNSH[layer]
            num_splits = num_splits_for(q_BNH.shape[0], q_BNH.shape[1], self._num_multiprocessors)
            size = self._cache.tokens_per_block
            return paged_decode(q_BNH, k_BNH, v_BNH, keys, values, tables_BM, lengths_B, size, num_splits)

        return self._network(ids_B, (lengths_B - 1).clamp(min=0), attend, None)

    def _prompt(self, inputs_C: Tensor) -> Tensor:
        """A whole prompt, from its ids, its block table, and its last token's index."""
        size, tokens_per_block = len(inputs_C) // 2, self._cache.tokens_per_block
        ids_T, blocks_M, last_1 = inputs_C[:size], inputs_C[size:-1], inputs_C[-1:]

        def attend(layer: int, q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
            keys, values = self._cache.keys_LNSH[layer], self._cache.values_LNSH[layer]
            return attend_prompt(q_TNH, k_TNH, v_TNH, SequenceSlots(keys, values, blocks_M, last_1, tokens_per_block))

        positions_T = torch.arange(size, device=inputs_C.device)
        return self._network(ids_T, positions_T, attend, last_1)


class _CapturedGraph:
    """One graph with its input and output memory.

    Args:
        forward: computes float32 logits [rows, ids] from inputs of `shape`.
        pool: memory shared by graphs that are never replayed at the same time.
        samples: whether the graph also samples the next ids; only on rank 0, which has the logits.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        num_rows: int,
        pool: Any,
        device: torch.device,
        samples: bool,
    ):
        num_sampling_bytes = 16 * num_rows
        self._host = torch.zeros(num_sampling_bytes + 4 * math.prod(shape), dtype=torch.uint8, pin_memory=True)
        self._on_device = torch.zeros_like(self._host, device=device)
        self._values = self._host[num_sampling_bytes:].view(torch.int32).view(shape).numpy()
        self._temperature_uniform = self._host[:num_sampling_bytes].view(torch.float64).view(num_rows, 2).numpy()
        self._inputs_were_read = torch.cuda.Event()
        self._next_ids_R = torch.empty(num_rows, dtype=torch.int64, pin_memory=True) if samples else None
        inputs = self._on_device[num_sampling_bytes:].view(torch.int32).view(shape)
        temperature_uniform_R2 = self._on_device[:num_sampling_bytes].view(torch.float64).view(num_rows, 2)

        def run() -> Tensor:
            logits_RV = forward(inputs)
            if self._next_ids_R is not None:
                # inside the graph: launched after it, sampling would cost the host more than some layers cost the
                # device
                self._next_ids_R.copy_(sample_ids(logits_RV, temperature_uniform_R2), non_blocking=True)
            return logits_RV

        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(WARM_UP_RUNS):
                run()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of the process may use the device during the capture
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"), torch.inference_mode():
            self._logits_RV = run()

    def inputs(self) -> np.ndarray:
        """Host memory of the inputs; write them here before `replay`. Waits until the last replay has copied it."""
        self._inputs_were_read.synchronize()
        return self._values

    def replay(self, num_rows: int, sampling: Sequence[SamplingInput]) -> ForwardOutput:
        """The first rows. The next replay of any graph of the pool overwrites the logits."""
        is_sampled = len(sampling) == num_rows  # else some row is only scored, and the sampler samples the others
        if is_sampled:
            self._temperature_uniform[:num_rows] = [row.temperature_and_uniform for row in sampling]
        self._on_device.copy_(self._host, non_blocking=True)
        self._inputs_were_read.record()
        self._graph.replay()
        next_ids_R = self._next_ids_R[:num_rows] if self._next_ids_R is not None and is_sampled else None
        return ForwardOutput(self._logits_RV[:num_rows], next_ids_R)

    def close(self) -> None:
        self._graph.reset()
