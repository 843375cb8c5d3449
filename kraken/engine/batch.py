"""The batch of one step: everything that a forward pass and the sampler need to know, without requests.

`EngineCore` prepares a `StepBatch` from what the scheduler chose; `ModelRunner`, attention, CUDA graphs and the sampler
read it, and the worker group sends it to the other ranks. `ForwardOutput` is what comes back.

Shape letters: B sequences of the step, T tokens of all of them one after the other, R tokens whose logits are computed.
"""

import hashlib
import struct
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from torch import Tensor

from kraken.engine.protocol import SamplingParams

Integers = Sequence[int] | np.ndarray
"""A list of integers, an `array("i")`, or an int32 array."""
SEED_AND_INDEX = struct.Struct("<qQ")


def uniform(seed: int, token_index: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(SEED_AND_INDEX.pack(seed, token_index), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53  # as many bits as a float holds


@dataclass(frozen=True, slots=True)
class SamplingInput:
    """How the next token of one row of logits is sampled."""

    params: SamplingParams
    seed: int
    token_index: int
    """Number of tokens that this request has generated before."""
    seen_ids: Collection[int] = ()
    """Distinct ids of the prompt and the completion so far; read only where there is a repetition penalty."""
    counts: Mapping[int, int] = field(default_factory=dict)
    """How often each id occurs in the completion so far; read only where there is a presence or frequency penalty."""
    uniform: float = field(init=False)
    """The random number that selects the token; 0 for a greedy request, which needs none."""

    def __post_init__(self) -> None:
        is_greedy = self.params.temperature == 0.0
        object.__setattr__(self, "uniform", 0.0 if is_greedy else uniform(self.seed, self.token_index))

    @property
    def is_truncated(self) -> bool:
        """Whether a random token is sampled from a part of the distribution only."""
        p = self.params
        return p.temperature > 0.0 and (p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0)

    @property
    def temperature_and_uniform(self) -> tuple[float, float]:
        """What the CUDA sampling kernel reads. Temperature 0 means greedy, which also stands for truncated sampling:
        the kernel cannot truncate, and the sampler replaces its result."""
        return (0.0, 0.0) if self.is_truncated else (self.params.temperature, self.uniform)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step. Sequences lie one after the other in T; each begins at its first position that is not in the cache."""

    token_ids_T: np.ndarray
    """int32."""
    first_positions: Sequence[int]
    """[B]: position of each sequence's first token of this step; all earlier ones are in the KV cache."""
    num_tokens: Sequence[int]
    """[B]: tokens of each sequence in this step."""
    num_logits: Sequence[int]
    """[B]: of how many of its last tokens the logits are computed."""
    block_tables: Sequence[Integers]
    """[B]: ids of the cache's blocks of each sequence, from position 0 to at least the last token of this step."""
    tokens_per_block: int
    sampling: Sequence[SamplingInput] = ()
    """For each row of `sampled_rows`. Rank 0 only."""
    sampled_rows: Sequence[int] = ()
    """Rows of the logits [R] from which a token is sampled."""

    @classmethod
    def concatenate(
        cls,
        token_ids: Sequence[Integers],
        first_positions: Sequence[int],
        block_tables: Sequence[Integers],
        num_logits: Sequence[int],
        tokens_per_block: int,
        sampling: Sequence[SamplingInput] = (),
        sampled_rows: Sequence[int] = (),
    ) -> "StepBatch":
        """A batch of sequences whose token ids are given one by one."""
        ids_T = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in token_ids])
        num_tokens = [len(ids) for ids in token_ids]
        return cls(
            ids_T, first_positions, num_tokens, num_logits, block_tables, tokens_per_block, sampling, sampled_rows
        )

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.num_tokens)

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one token, of which the logits are computed."""
        return all(num == 1 for num in self.num_tokens) and all(num == 1 for num in self.num_logits)

    @property
    def ends(self) -> list[int]:
        """[B]: where each sequence ends in T."""
        return list(accumulate(self.num_tokens))

    def positions(self) -> np.ndarray:
        """int64 [T]."""
        pairs = zip(self.first_positions, self.num_tokens, strict=True)
        return np.concatenate([np.arange(first, first + num) for first, num in pairs])

    def slot_mapping(self) -> np.ndarray:
        """int64 [T]: the slot of the KV cache in which each token's key and value are stored."""
        size, slots = self.tokens_per_block, []
        for first, num, blocks in zip(self.first_positions, self.num_tokens, self.block_tables, strict=True):
            positions = np.arange(first, first + num)
            slots.append(np.asarray(blocks, dtype=np.int64)[positions // size] * size + positions % size)
        return np.concatenate(slots)

    def logit_rows(self) -> list[int]:
        """[R]: the tokens in T whose logits are computed."""
        return [row for end, num in zip(self.ends, self.num_logits, strict=True) for row in range(end - num, end)]

    def to_bytes(self) -> bytes:
        """int32: number of sequences, tokens per block; of each sequence its first position, tokens, blocks and logits;
        then all token ids and all block tables. Sampling stays on rank 0."""
        numbers = array("i", (len(self), self.tokens_per_block))
        num_blocks = [len(blocks) for blocks in self.block_tables]
        for header in zip(self.first_positions, self.num_tokens, num_blocks, self.num_logits, strict=True):
            numbers.extend(header)
        numbers.frombytes(self.token_ids_T.tobytes())
        for blocks in self.block_tables:
            numbers.extend(blocks)
        return numbers.tobytes()

    @classmethod
    def from_bytes(cls, payload: bytes) -> "StepBatch":
        """The inverse of `to_bytes`."""
        numbers = np.frombuffer(payload, dtype=np.int32).copy()
        ids_at = 2 + 4 * int(numbers[0])
        headers = numbers[2:ids_at].reshape(-1, 4)
        first_positions, num_tokens, num_blocks, num_logits = (column.tolist() for column in headers.T)
        blocks_at = ids_at + sum(num_tokens)
        block_tables = np.split(numbers[blocks_at:], np.cumsum(num_blocks[:-1])) if num_blocks else []
        ids_T = numbers[ids_at:blocks_at]
        return cls(ids_T, first_positions, num_tokens, num_logits, block_tables, int(numbers[1]))


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """The result of a forward pass on rank 0; the next pass may overwrite it."""

    logits_RV: Tensor
    """float32 [rows, ids of the tokenizer]."""
    next_ids_R: Tensor | None = None
    """int64 [rows] in pinned host memory: the ids that a CUDA graph sampled by `temperature_and_uniform`, -1 where the
    logits are not finite. The host may read it only after the stream has been synchronised. None where the pass did not
    sample."""

    def select(self, rows: Sequence[int]) -> "ForwardOutput":
        """Some rows, in ascending order. Sampled ids are kept only if these are all rows: the graph may still be
        running, and an indexed copy on the host would read ids that have not been written yet."""
        return self if len(rows) == len(self.logits_RV) else ForwardOutput(self.logits_RV[rows])


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """The steps that are captured as CUDA graphs."""

    max_batch_size: int
    """Most sequences that decode together."""
    max_prompt_tokens: int
    """Longest prompt that runs in one step."""
    max_blocks: int
    """Most blocks of one sequence."""
    chosen: Sequence[int] = ()
    """Numbers of tokens to capture, both of decoding sequences and of prompts; empty takes a spacing that wastes
    little."""

    @property
    def batch_sizes(self) -> list[int]:
        """Numbers of sequences that decode together for which there is a graph, in ascending order."""
        return self._up_to(self.max_batch_size, smallest=1)

    @property
    def prompt_lengths(self) -> list[int]:
        """Lengths of prompts for which there is a graph, in ascending order."""
        return self._up_to(self.max_prompt_tokens, smallest=16)

    def _up_to(self, largest: int, smallest: int) -> list[int]:
        if self.chosen:
            return sorted({size for size in self.chosen if size <= largest})
        return [size for size in sizes_up_to(largest) if size >= min(smallest, largest)]


def sizes_up_to(largest: int) -> list[int]:
    """1, 2, 4, then steps of 4 up to 32, then four steps to each power of two, until `largest`. From 16 on rounding up
    to the next size wastes at most a fifth."""
    sizes = [1, 2, 4]
    step = 4
    while sizes[-1] < largest:
        if sizes[-1] >= 8 * step:
            step *= 2
        sizes.append(sizes[-1] + step)
    return [size for size in sizes if size < largest] + [largest]
