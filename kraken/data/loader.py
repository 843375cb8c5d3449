"""The loader: which windows a step trains on is a pure function of (seed, step), so that a position is one number.

An epoch cuts the tokens into windows at an offset of its own and visits each once, in an order of its own. Workers take
slices of a step's windows; how many workers there are never changes the global order.
"""

from functools import lru_cache

import numpy as np
import torch

from kraken.data.shards import TokenShards
from kraken.manifest import ArtefactError


class Loader:
    """Training batches by step number.

    Args:
        shards: the training split.
        context_length: tokens per window [T].
        sequences_per_step: windows per optimizer step, over all workers.
        seed: decides the order.

    Raises:
        ArtefactError: the split is shorter than one window.
    """

    def __init__(self, shards: TokenShards, context_length: int, sequences_per_step: int, seed: int):
        self.shards = shards
        self.context_length = context_length
        self.sequences_per_step = sequences_per_step
        self.seed = seed
        # One window more than fits at offset 0 is given up, so that every epoch's offset leaves as many windows.
        self.windows_per_epoch = (shards.num_tokens - 1) // context_length - 1
        if self.windows_per_epoch < 1:
            raise ArtefactError(
                f"the {shards.split} split of {shards.num_tokens} tokens is shorter than two windows of "
                f"model.context_length={context_length}; give more text or a shorter context"
            )
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)

    def _make_epoch_order(self, epoch: int) -> tuple[int, np.ndarray]:
        random = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        offset = int(random.integers(self.context_length))
        return offset, random.permutation(self.windows_per_epoch)

    def window_start(self, position: int) -> int:
        """First token of the `position`-th window ever trained on."""
        epoch, index = divmod(position, self.windows_per_epoch)
        offset, order = self._epoch_order(epoch)
        return offset + int(order[index]) * self.context_length

    def batch(self, step: int, rank: int = 0, num_ranks: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's share of a step's windows.

        Returns:
            (inputs_BT, targets_BT), int64, B = sequences_per_step / num_ranks; targets are the inputs' next tokens.
        """
        share = self.sequences_per_step // num_ranks
        first = step * self.sequences_per_step + rank * share
        windows = [
            self.shards.read(self.window_start(position), self.context_length + 1)
            for position in range(first, first + share)
        ]
        return split_windows(np.stack(windows))


def split_windows(windows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows [B, T+1] -> inputs and next-token targets, each int64 [B, T]."""
    tokens = torch.from_numpy(windows)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def sequential_windows(num_tokens: int, context_length: int) -> list[tuple[int, int]]:
    """(start, length) of windows that score every token but the first exactly once.

    A window of length T+1 predicts T tokens from T inputs; neighbours share one token. The last may be shorter.
    """
    return [(start, min(context_length + 1, num_tokens - start)) for start in range(0, num_tokens - 1, context_length)]
