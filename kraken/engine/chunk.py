"""What a forward pass is told: tokens, positions and blocks, not requests, so that other processes can be told too."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
