"""The scheduler: which tokens of which requests the next step computes. Policy only, without tensors or clocks; called
by `EngineCore`.

First come, first served. A step takes one token of every request that decodes, then fills its budget with the next
chunks of prompts, oldest request first. A request is admitted when the cache has room for all its known tokens. When
the cache is full and an older request needs a block, the newest one is preempted: it loses its blocks and recomputes
them later. The oldest request therefore always advances, and none starves.
"""

from collections import deque
from dataclasses import dataclass

from kraken.engine.kv_cache import BlockPool, BlockTable
from kraken.engine.request_state import RequestState


@dataclass(frozen=True, slots=True)
class ScheduledTokens:
    """One step's work for one request: `num_tokens` tokens from `first_position` on."""

    state: RequestState
    first_position: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.first_position + self.num_tokens

    @property
    def is_last(self) -> bool:
        """Whether every known token has been computed after this step, so that the next one can be sampled."""
        return self.end == len(self.state.token_ids)

    @property
    def num_logits(self) -> int:
        """Number of last tokens whose logits are needed."""
        return self.num_tokens if self.state.scores_prompt else int(self.is_last)


class Scheduler:
    """Holds every request that waits or runs, and the pool of their cache blocks.

    Args:
        max_step_tokens: most tokens of a step; at least `max_running`.
        max_step_logits: most prompt positions of a step whose logits are computed, which bounds the logits' memory.
    """

    def __init__(self, pool: BlockPool, max_running: int, max_step_tokens: int, max_step_logits: int):
        self.pool = pool
        self.waiting: deque[RequestState] = deque()
        self.running: list[RequestState] = []  # in order of arrival
        self.num_preempted = 0
        self.num_reused_tokens = 0
        self.num_prompt_tokens = 0
        self._max_running = max_running
        self._max_step_tokens = max_step_tokens
        self._max_step_logits = max_step_logits

    def add(self, state: RequestState) -> None:
        """Queue a request."""
        self.waiting.append(state)

    def remove(self, state: RequestState, invalidate: bool = False) -> None:
        """Remove a request and free its blocks. No-op if it is not scheduled.

        Args:
            invalidate: its blocks may lack what they should hold, so that no later prompt may reuse them.
        """
        if state in self.waiting:
            self.waiting.remove(state)
        if state in self.running:
            self.running.remove(state)
        self.pool.release(state.block_table, invalidate)

    def preempt(self, state: RequestState, invalidate: bool = False) -> None:
        """Free a running request's blocks and put it at the front of the queue. `invalidate` as for `remove`."""
        self.running.remove(state)
        self.pool.release(state.block_table, invalidate)
        state.num_computed = 0
        self.num_preempted += 1
        self.waiting.appendleft(state)

    def schedule(self) -> list[ScheduledTokens]:
        """The next step's work; empty when nothing waits or runs. The tokens count as computed from now on."""
        step: list[ScheduledTokens] = []
        for state in [state for state in self.running if state.num_remaining == 1]:
            if state in self.running and self._extend_or_preempt(state):
                step.append(self._take(state, 1))
        budget = self._max_step_tokens - len(step)
        logits_left = self._max_step_logits
        prefilling = [state for state in self.running if state.num_remaining > 1]
        while budget > 0 and logits_left > 0:
            candidate = prefilling.pop(0) if prefilling else self._admit()
            if candidate is None:
                break
            limit = min(budget, logits_left) if candidate.scores_prompt else budget
            num_tokens = min(limit, candidate.num_remaining)
            budget -= num_tokens
            logits_left -= num_tokens if candidate.scores_prompt else 0
            step.append(self._take(candidate, num_tokens))
        return step

    def _take(self, state: RequestState, num_tokens: int) -> ScheduledTokens:
        first_position = state.num_computed
        state.num_computed += num_tokens
        # published before the step has run: attention stores all keys of a layer before it reads any, so that another
        # request of the same step may already reuse these blocks
        self.pool.publish(state.block_table, state.token_ids, state.num_computed)
        return ScheduledTokens(state, first_position, num_tokens)

    def _extend_or_preempt(self, state: RequestState) -> bool:
        """Allocate a block for the next token, preempting the newest requests if the cache is full. Returns False if
        the request itself had to be preempted."""
        num_missing = self.pool.blocks_for(len(state.token_ids)) - len(state.block_table.blocks)
        while self.pool.num_free < num_missing:
            newest = self.running[-1]
            self.preempt(newest)
            if newest is state:
                return False
        self.pool.extend(state.block_table, len(state.token_ids))
        return True

    def _admit(self) -> RequestState | None:
        """Admit the request that waits longest, if the batch has a place and the cache has room for its known
        tokens."""
        if not self.waiting or len(self.running) == self._max_running:
            return None
        state = self.waiting[0]
        prefix = BlockTable() if state.scores_prompt else self.pool.find_prefix(state.token_ids)
        num_tokens = len(state.token_ids)
        # one free block per running request is kept back, otherwise the next step could preempt what was just admitted
        if self.pool.num_needed(prefix, num_tokens) + len(self.running) > self.pool.num_free:
            return None
        self.waiting.popleft()
        self.running.append(state)
        state.num_computed = len(prefix.blocks) * self.pool.tokens_per_block
        state.block_table = self.pool.allocate(prefix, num_tokens, state.max_length)
        self.num_reused_tokens += state.num_computed
        if not state.was_admitted:
            state.was_admitted = True
            state.num_cached = state.num_computed
            self.num_prompt_tokens += len(state.request.prompt_ids)
        return state
