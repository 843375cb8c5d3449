"""The engine's step, on a thread of its own: schedule, forward pass, sampling, and what each request gets from it.

`TorchEngine` starts `EngineCore.run` on the engine's thread, puts requests into the inbox from the event loop, and
receives each step's outputs through a callback.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kraken.engine.batch import ForwardOutput, StepBatch
from kraken.engine.distributed.worker_group import WorkerError
from kraken.engine.model_runner import ModelRunner
from kraken.engine.protocol import EngineError, Output, PromptOutput, TokenLogprobs, TokenOutput
from kraken.engine.request_state import RequestState
from kraken.engine.sampler import token_logprobs
from kraken.engine.scheduler import ScheduledTokens, Scheduler

MAX_FAILED_STEPS = 3
"""After so many steps in a row in which every request failed, the engine counts as broken instead of the requests."""


@dataclass(slots=True)
class StepOutputs:
    """The results of one step."""

    outputs: list[tuple[RequestState, Output]] = field(default_factory=list)
    finished: list[RequestState] = field(default_factory=list)
    failed: list[tuple[RequestState, Exception]] = field(default_factory=list)
    recompute: list[RequestState] = field(default_factory=list)
    """Requests that did not fail, but whose cache blocks a failed request should have written."""

    @property
    def has_first_token(self) -> bool:
        """Whether a request gets its first output."""
        return any(isinstance(output, PromptOutput) or state.num_generated == 1 for state, output in self.outputs)


class EngineCore:
    """Runs requests step by step on the calling thread. Everything but the inbox and `stop` belongs to that thread.

    Args:
        runner: the model on its device.
        send: takes a step's outputs to the event loop. Raises RuntimeError when the loop is closed.
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler, send: Callable[[StepOutputs], None]):
        self.runner = runner
        self.scheduler = scheduler
        self.inbox: deque[RequestState] = deque()
        """Requests to add, and deregistered ones to drop; filled by the event loop."""
        self._active: set[RequestState] = set()
        self._send = send
        self._unsent: StepOutputs | None = None
        self._num_failed_steps = 0
        self._wake = threading.Event()
        self._is_stopped = False

    def notify(self, state: RequestState) -> None:
        """Add a request, or drop it if it is deregistered, before the next step. Thread-safe."""
        self.inbox.append(state)
        self._wake.set()

    def stop(self) -> None:
        """Let `run` return after the current step. Thread-safe."""
        self._is_stopped = True
        self._wake.set()

    def run(self) -> None:
        """Run steps until `stop`, and wait while there is nothing to compute.

        Raises:
            Exception: the device or another rank failed, or no step succeeds any more. All blocks are free then.
        """
        try:
            while not self._is_stopped:
                if not self.step():
                    self._wake.wait()
                    self._wake.clear()
        finally:
            for state in [*self._active]:
                self._remove(state, invalidate=True)
            with contextlib.suppress(RuntimeError):  # the event loop is closed, so that no client waits
                self._send_unsent()

    def step(self) -> bool:
        """Compute one step. Returns False if there was nothing to compute."""
        self._admit_and_drop()
        scheduled = self.scheduler.schedule()
        if not scheduled:
            self._send_unsent()
            return False
        batch = self._prepare(scheduled)
        try:
            output = self.runner.forward(batch)
        except Exception as error:
            if _is_fatal(error):
                raise
            results = self._run_one_by_one(scheduled)
        else:
            self._send_unsent()  # of the step before: the event loop works while the device computes
            self.runner.join()
            self._num_failed_steps = 0
            results = StepOutputs()
            self._postprocess(scheduled, batch, output, results)
        self._free(results)
        self._unsent = results
        # a decoded token is sent during the next forward pass; a first token is not kept back
        if not self.runner.is_asynchronous or results.has_first_token:
            self._send_unsent()
        return True

    def _admit_and_drop(self) -> None:
        """Schedule new requests and free the blocks of those that were deregistered since the last step."""
        while self.inbox:
            state = self.inbox.popleft()
            if state.is_deregistered:
                self._remove(state)
            else:
                self._active.add(state)
                self.scheduler.add(state)

    def _prepare(self, scheduled: list[ScheduledTokens]) -> StepBatch:
        """The batch of a step, with a sampling input for every request whose known tokens it computes to the end."""
        sampling, sampled_rows, row = [], [], -1
        for part in scheduled:
            if part.state.started_at is None:
                part.state.started_at = time.monotonic()
            row += part.num_logits
            if _is_sampled(part):
                sampling.append(part.state.sampling_input)
                sampled_rows.append(row)
        return StepBatch.concatenate(
            [part.state.token_ids[part.first_position : part.end] for part in scheduled],
            [part.first_position for part in scheduled],
            [part.state.block_table.blocks for part in scheduled],
            [part.num_logits for part in scheduled],
            self.scheduler.pool.tokens_per_block,
            sampling,
            sampled_rows,
        )

    def _run_one_by_one(self, scheduled: list[ScheduledTokens]) -> StepOutputs:
        """Repeat a failed step with one request at a time, so that only requests that cannot be computed fail.

        Raises:
            Exception: `MAX_FAILED_STEPS` steps in a row had no request that could be computed.
        """
        self._send_unsent()
        results, invalid_blocks = StepOutputs(), set[int]()
        for part in scheduled:
            blocks = part.state.block_table.blocks
            if invalid_blocks.intersection(blocks):
                results.recompute.append(part.state)
                invalid_blocks.update(blocks)
                continue
            batch = self._prepare([part])
            try:
                output = self.runner.forward(batch)
                self.runner.join()
            except Exception as error:
                if _is_fatal(error):
                    raise
                results.failed.append((part.state, error))
                invalid_blocks.update(blocks)
            else:
                self._postprocess([part], batch, output, results)
        has_succeeded = len(results.failed) + len(results.recompute) < len(scheduled)
        self._num_failed_steps = 0 if has_succeeded else self._num_failed_steps + 1
        if self._num_failed_steps == MAX_FAILED_STEPS:
            raise results.failed[-1][1]
        return results

    def _postprocess(
        self, scheduled: list[ScheduledTokens], batch: StepBatch, output: ForwardOutput, results: StepOutputs
    ) -> None:
        """Score prompts, then sample a token for every request whose known tokens have been computed."""
        sampled: list[RequestState] = []
        indices: list[int] = []  # into the batch's sampling inputs
        row = index = 0
        for part in scheduled:
            first_row, row = row, row + part.num_logits
            index += _is_sampled(part)
            if part.state.scores_prompt:
                try:
                    self._score_prompt(part, output.logits_RV[first_row:row], results)
                except Exception as error:
                    if _is_fatal(error):
                        raise
                    results.failed.append((part.state, error))
                    continue
            if _is_sampled(part):
                sampled.append(part.state)
                indices.append(index - 1)
            elif part.is_last:  # max_tokens=0
                results.finished.append(part.state)
        if sampled:
            self._sample(sampled, indices, batch, output, results)

    def _score_prompt(self, part: ScheduledTokens, logits_TV: Tensor, results: StepOutputs) -> None:
        """Collect the scores of a chunk of the prompt; after the last chunk they become an output."""
        state, request = part.state, part.state.request
        if part.first_position == 0:  # also after a preemption
            state.prompt_logprobs, state.prompt_logits = [None], []
        next_ids = list(request.prompt_ids[part.first_position + 1 : part.end + 1])
        if request.prompt_logprobs and next_ids:
            state.prompt_logprobs += token_logprobs(logits_TV[: len(next_ids)], next_ids, request.num_logprobs or 0)
        if request.return_logits:
            state.prompt_logits.append(logits_TV.cpu().numpy())
        if part.is_last:
            state.scores_prompt = False
            logits = np.concatenate(state.prompt_logits) if request.return_logits else None
            logprobs = tuple(state.prompt_logprobs) if request.prompt_logprobs else ()
            state.prompt_logits = []
            results.outputs.append(
                (state, PromptOutput(logprobs=logprobs, logits_TV=logits, admission=state.take_admission()))
            )

    def _sample(
        self,
        states: list[RequestState],
        indices: list[int],
        batch: StepBatch,
        output: ForwardOutput,
        results: StepOutputs,
    ) -> None:
        """Append one token to each request. A row that cannot be sampled fails its own request only."""
        rows = output.select([batch.sampled_rows[index] for index in indices])
        try:
            token_ids = self.runner.sampler.sample(rows, [batch.sampling[index] for index in indices])
            logprobs = _logprobs(states, rows.logits_RV, token_ids)
        except Exception as error:
            if _is_fatal(error):
                raise
            if len(states) == 1:
                results.failed.append((states[0], error))
                return
            for state, index in zip(states, indices, strict=True):
                self._sample([state], [index], batch, output, results)
            return
        for row, (state, token_id) in enumerate(zip(states, token_ids, strict=True)):
            if token_id is None:
                num_tokens = len(state.token_ids)
                results.failed.append((state, EngineError(f"the logits after {num_tokens} tokens are not finite")))
                continue
            token = TokenOutput(
                token_id=token_id,
                logprobs=logprobs[row],
                logits_V=rows.logits_RV[row].cpu().numpy() if state.request.return_logits else None,
                finish_reason=state.append(token_id),
                admission=state.take_admission(),
            )
            results.outputs.append((state, token))
            if token.finish_reason is not None:
                results.finished.append(state)

    def _free(self, results: StepOutputs) -> None:
        """Free the blocks of requests that end, before their clients are told."""
        for state in results.finished:
            self._remove(state)
        for state, _ in results.failed:
            self._remove(state, invalidate=True)
        for state in reversed(results.recompute):  # each goes to the front of the queue
            self.scheduler.preempt(state, invalidate=True)

    def _remove(self, state: RequestState, invalidate: bool = False) -> None:
        """Remove a request from the scheduler. No-op if it was removed before."""
        if state in self._active:
            self._active.remove(state)
            self.scheduler.remove(state, invalidate)

    def _send_unsent(self) -> None:
        """Send the last step's outputs to the event loop. Calling it twice sends them once."""
        if self._unsent is not None:
            results, self._unsent = self._unsent, None
            self._send(results)


def _is_sampled(part: ScheduledTokens) -> bool:
    """Whether the request gets its next token after this step."""
    return part.is_last and part.state.request.sampling.max_tokens > 0


def _logprobs(states: list[RequestState], logits_BV: Tensor, token_ids: list[int | None]) -> list[TokenLogprobs | None]:
    """The log-probabilities that each request asked for, computed for all of them at once."""
    result: list[TokenLogprobs | None] = [None] * len(states)
    asked = {
        row: (token_id, state.request.num_logprobs)
        for row, (state, token_id) in enumerate(zip(states, token_ids, strict=True))
        if state.request.num_logprobs is not None and token_id is not None
    }
    if not asked:
        return result
    counts = [count or 0 for _, count in asked.values()]
    scores = token_logprobs(logits_BV[[*asked]], [token_id for token_id, _ in asked.values()], max(counts))
    for row, count, score in zip(asked, counts, scores, strict=True):
        result[row] = TokenLogprobs(token_id=score.token_id, logprob=score.logprob, top=score.top[:count])
    return result


def _is_fatal(error: Exception) -> bool:
    """Whether a device, its memory or another rank failed, so that no other request can be computed either."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | torch.AcceleratorError | WorkerError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's CPU allocator
