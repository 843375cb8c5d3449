"""What a forward pass is told, and what it answers.

It is told tokens, positions and blocks, not requests, so that other processes can be told too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

Numbers = Sequence[int] | np.ndarray
"""Integers, as a list or as an array."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence to run."""

    token_ids: Numbers
    start: int
    """Position of the first of them; what comes before is in the cache."""
    blocks: Numbers
    """The sequence's blocks, from its first token to at least the last of this chunk."""
    num_logits: int
    """Read out the logits of this many last tokens."""


Chance = tuple[float, float]
"""How the next id is drawn where nothing is truncated: the temperature, of which 0 takes the most likely id, and where
between 0 and 1 the draw falls in the distribution, walked in the order of the ids."""


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """What a pass reads out: the rows that each chunk asked for, one chunk after the other. The next pass may overwrite
    it. Of several devices only the first has it.
    """

    logits_RV: Tensor
    """float32 [rows, ids]."""
    next_ids_R: Tensor | None = None
    """int64 [rows], in the host's memory as soon as the device has come to the end of the pass: an id of each row, by
    the chance that was given for it; -1 where the logits are no numbers. None where the pass draws nothing."""

    def of(self, rows: Sequence[int]) -> "ForwardOutput":
        """Some rows, in ascending order; what was drawn for them only where these are all, since it may not be there
        yet to be copied."""
        return self if len(rows) == len(self.logits_RV) else ForwardOutput(self.logits_RV[rows])


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """Steps that are worth a CUDA graph."""

    max_batch_size: int
    """Most sequences that decode together."""
    max_prompt_tokens: int
    """Longest prompt that runs in one step."""
    max_blocks: int
    """Most blocks of one sequence."""
    chosen: Sequence[int] = ()
    """Numbers of tokens to record, of sequences that decode and of prompts; empty leaves it to the engine."""

    @property
    def batch_sizes(self) -> list[int]:
        """Numbers of sequences that decode together for which there is a graph, in ascending order."""
        return self._below(self.max_batch_size, least=1)

    @property
    def prompt_lengths(self) -> list[int]:
        """Lengths of prompts for which there is a graph, in ascending order."""
        return self._below(self.max_prompt_tokens, least=16)

    def _below(self, most: int, least: int) -> list[int]:
        if self.chosen:
            return sorted({size for size in self.chosen if size <= most})
        return [size for size in sizes_up_to(most) if size >= min(least, most)]


def sizes_up_to(most: int) -> list[int]:
    """1, 2, 4, then steps of 4 up to 32, then four steps to each power of two, until `most`; from 16 on rounding up
    wastes a fifth at most."""
    sizes = [1, 2, 4]
    step = 4
    while sizes[-1] < most:
        if sizes[-1] >= 8 * step:
            step *= 2
        sizes.append(sizes[-1] + step)
    return [size for size in sizes if size < most] + [most]
