"""The scheduler: which tokens of which requests the next step computes. Policy only; no tensors, no clock.

First come, first served. A step takes one token of everything that decodes, then fills its budget with the next parts
of prompts, oldest request first. A request is let in when the cache has room for all of it that is known; when the
cache is full and an older one needs a block, the newest loses its blocks, and computes them again when there is room.
The oldest therefore always goes on, and nobody waits for ever.
"""

from array import array
from collections import deque
from dataclasses import dataclass, field

from kraken.engine.kv_cache import BlockPool, BlockTable
from kraken.engine.protocol import Request


@dataclass(eq=False, slots=True)
class Sequence:
    """A request in flight, as far as planning goes."""

    request: Request
    token_ids: "array[int]"
    """int32, which is copied to the device as it is. What is fed: the prompt, then what was generated; of a prompt that
    is only scored, all but its last token."""
    scores_prompt: bool
    """Every position of the prompt is read out, and has not been yet; such a prompt reuses no prefix."""
    table: BlockTable = field(default_factory=BlockTable)
    num_computed: int = 0
    """Tokens in the cache, or on their way into it in the step that runs."""
    was_admitted: bool = False

    @property
    def num_remaining(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def max_length(self) -> int:
        """Tokens that it can grow to; the last one generated is never fed."""
        return len(self.request.prompt_ids) + max(self.request.sampling.max_tokens - 1, 0)


@dataclass(frozen=True, slots=True)
class ScheduledTokens:
    """Tokens `start` to `end` of a sequence, to be computed now."""

    sequence: Sequence
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether the sequence's next token can be drawn afterwards."""
        return self.end == len(self.sequence.token_ids)

    @property
    def num_logits(self) -> int:
        return self.end - self.start if self.sequence.scores_prompt else int(self.is_last)


class Scheduler:
    """Holds every sequence that waits or runs, and the pool that their blocks come from.

    Args:
        max_step_tokens: most tokens of a step; at least `max_running`.
        max_step_logits: most tokens of prompts that are read out in one step, which bounds the memory of logits.
    """

    def __init__(self, pool: BlockPool, max_running: int, max_step_tokens: int, max_step_logits: int):
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self.num_preempted = 0
        self.num_reused_tokens = 0
        self.num_prompt_tokens = 0
        self._max_running = max_running
        self._max_step_tokens = max_step_tokens
        self._max_step_logits = max_step_logits

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence, invalidate: bool = False) -> None:
        """A sequence has ended, however: its blocks are free at once.

        Args:
            forget: the cache may not hold what it should; nobody may reuse these blocks.
        """
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        self.pool.release(sequence.table, invalidate)

    def preempt(self, sequence: Sequence, invalidate: bool = False) -> None:
        """Take a running sequence's blocks away; it is first in the queue again. `invalidate`: as for `remove`."""
        self.running.remove(sequence)
        self.pool.release(sequence.table, invalidate)
        sequence.num_computed = 0
        self.num_preempted += 1
        self.waiting.appendleft(sequence)

    def schedule(self) -> list[ScheduledTokens]:
        """The next step; empty when nothing waits or runs. What it holds counts as computed from now on."""
        step: list[ScheduledTokens] = []
        for sequence in [sequence for sequence in self.running if sequence.num_remaining == 1]:
            if sequence in self.running and self._make_room(sequence):
                self._advance(sequence, 1, step)
        budget = self._max_step_tokens - len(step)
        logits_left = self._max_step_logits
        candidates = [sequence for sequence in self.running if sequence.num_remaining > 1]
        while budget > 0 and logits_left > 0:
            found = candidates.pop(0) if candidates else self._admit()
            if found is None:
                break
            sequence = found
            limit = min(budget, logits_left) if sequence.scores_prompt else budget
            num_tokens = min(limit, sequence.num_remaining)
            budget -= num_tokens
            logits_left -= num_tokens if sequence.scores_prompt else 0
            self._advance(sequence, num_tokens, step)
        return step

    def _advance(self, sequence: Sequence, num_tokens: int, step: list[ScheduledTokens]) -> None:
        start = sequence.num_computed
        sequence.num_computed += num_tokens
        # before the step has run: a piece later in it may read what this one stores, layer by layer
        self.pool.publish(sequence.table, sequence.token_ids, sequence.num_computed)
        step.append(ScheduledTokens(sequence, start, sequence.num_computed))

    def _make_room(self, sequence: Sequence) -> bool:
        """A block for the next token, at the cost of the newest if need be; False when that is the sequence itself."""
        num_missing = self.pool.blocks_for(len(sequence.token_ids)) - len(sequence.table.blocks)
        while self.pool.num_free < num_missing:
            newest = self.running[-1]
            self.preempt(newest)
            if newest is sequence:
                return False
        self.pool.extend(sequence.table, len(sequence.token_ids))
        return True

    def _admit(self) -> Sequence | None:
        """Let the longest waiting sequence in, if a place and blocks for all its known tokens are free."""
        if not self.waiting or len(self.running) == self._max_running:
            return None
        sequence = self.waiting[0]
        found = BlockTable() if sequence.scores_prompt else self.pool.find(sequence.token_ids)
        num_tokens = len(sequence.token_ids)
        # one block for each that runs: what is let in is not to be thrown out at the next step
        if self.pool.num_needed(found, num_tokens) + len(self.running) > self.pool.num_free:
            return None
        self.waiting.popleft()
        self.running.append(sequence)
        sequence.num_computed = len(found.blocks) * self.pool.tokens_per_block
        sequence.table = self.pool.take(found, num_tokens, sequence.max_length)
        self.num_reused_tokens += sequence.num_computed
        if not sequence.was_admitted:
            sequence.was_admitted = True
            self.num_prompt_tokens += len(sequence.request.prompt_ids)
        return sequence
