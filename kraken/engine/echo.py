"""An engine without a model, which completes a prompt with the prompt itself: for tests of serving and evaluation.

Its log-probabilities come from a distribution in closed form: after token p, the id p + r (modulo the number of ids)
has probability 2 ** -(r + 1). The completion is not sampled from it.
"""

import asyncio
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Callable
from itertools import pairwise

import numpy as np

from kraken.config import ConfigError, EngineConfig
from kraken.engine.inbox import submit_by_generate
from kraken.engine.protocol import (
    Admission,
    EngineError,
    EngineInfo,
    EngineOverloaded,
    EngineStats,
    Item,
    Output,
    PromptOutput,
    Request,
    RequestError,
    TokenLogprobs,
    TokenOutput,
    check_request,
)

HONOURED = frozenset({"kind", "max_batch_size", "max_queued_requests"})
"""Fields of `EngineConfig` that may be set."""


class EchoEngine:
    """Completes a prompt with its own ids in a cycle, at any temperature.

    Args:
        info: of the model that it stands for.
        token_delay_s: pause before every token, so that tests can observe and cancel a stream.
        config: limits of batch and queue, honoured as a real engine would; no other setting may differ from its default
            but the kind, which chooses between real engines.

    Raises:
        ConfigError: another setting is given, which cannot have an effect here.
    """

    def __init__(self, info: EngineInfo, token_delay_s: float = 0.0, config: EngineConfig | None = None):
        self.info = info
        self.token_delay_s = token_delay_s
        self._config = config or EngineConfig()
        for spec in dataclasses.fields(self._config):
            value = getattr(self._config, spec.name)
            if spec.name not in HONOURED and value != spec.default:
                raise ConfigError(
                    f"engine.{spec.name}={value} has no effect with the echo engine, which has no model; leave it out"
                )
        self._running: dict[str, asyncio.Future[None]] = {}  # by id, with the turn that is its call's own
        self._queued: dict[str, asyncio.Future[None]] = {}  # in order of arrival
        self._num_finished = self._num_aborted = 0
        self._prompt_tokens = self._completion_tokens = 0
        self._closed = False

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        check_request(request, self.info)
        if request.id in self._running or request.id in self._queued:
            raise RequestError(f"id={request.id!r} is in flight already; give every request its own")
        self._require_open()
        arrived_at = time.monotonic()
        turn = self._take_turn(request.id)
        try:
            await turn  # also ends when the request is aborted, which is then in neither collection
            admission: Admission | None = Admission(queue_s=time.monotonic() - arrived_at)
            if self._has_ended(request.id, turn):
                return
            self._prompt_tokens += len(request.prompt_ids)
            if request.prompt_logprobs or request.return_logits:
                yield dataclasses.replace(self._prompt_output(request), admission=admission)
                admission = None
            num_tokens = request.sampling.max_tokens
            for step in range(num_tokens):
                await asyncio.sleep(self.token_delay_s)
                if self._has_ended(request.id, turn):
                    return
                output = dataclasses.replace(self._token_output(request, step), admission=admission)
                admission = None
                self._completion_tokens += 1
                if output.finish_reason:  # before the yield: the caller may never ask for more
                    self._finish(request.id)
                yield output
                if output.finish_reason:
                    return
            if num_tokens == 0:
                self._finish(request.id)
        finally:
            # by turn and not by id, which may belong to a later request by now
            if turn in (self._running.get(request.id), self._queued.get(request.id)):
                self.abort(request.id)

    def submit(self, request: Request, receive: Callable[[Item], None]) -> Callable[[], None]:
        return submit_by_generate(self, request, receive)

    def abort(self, request_id: str) -> None:
        if request_id in self._running or request_id in self._queued:
            self._num_aborted += 1
            self._leave(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_queued=len(self._queued),
            num_finished=self._num_finished,
            num_aborted=self._num_aborted,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            healthy=not self._closed,
        )

    async def close(self) -> None:
        self._closed = True
        for request_id in [*self._queued, *self._running]:
            self.abort(request_id)

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")

    def _has_ended(self, request_id: str, turn: asyncio.Future[None]) -> bool:
        """Whether the request was aborted. Raises: EngineError: the engine was closed."""
        if self._running.get(request_id) is turn:
            return False
        self._require_open()
        return True

    def _take_turn(self, request_id: str) -> asyncio.Future[None]:
        """A place in the batch or in the queue; the future is done when it is one in the batch."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if len(self._running) < self._config.max_batch_size:
            self._running[request_id] = turn
            turn.set_result(None)
            return turn
        if len(self._queued) >= self._config.max_queued_requests:
            raise EngineOverloaded(f"{len(self._queued)} requests are waiting already; try again later")
        self._queued[request_id] = turn
        return turn

    def _finish(self, request_id: str) -> None:
        self._num_finished += 1
        self._leave(request_id)

    def _leave(self, request_id: str) -> None:
        """Remove a running or queued request, and admit the next one."""
        self._running.pop(request_id, None)
        turns = [self._queued.pop(request_id, None)]
        while self._queued and len(self._running) < self._config.max_batch_size and not self._closed:
            next_id = next(iter(self._queued))
            self._running[next_id] = self._queued.pop(next_id)
            turns.append(self._running[next_id])
        for turn in turns:
            if turn is not None and not turn.done():  # already done if the waiting task was cancelled
                turn.set_result(None)

    def _token_output(self, request: Request, step: int) -> TokenOutput:
        prompt_ids, sampling = request.prompt_ids, request.sampling
        token_id = prompt_ids[step % len(prompt_ids)]
        previous_id = prompt_ids[(step - 1) % len(prompt_ids)]
        is_last = step + 1 == sampling.max_tokens
        stops = token_id in sampling.stop_ids and step >= sampling.min_tokens
        return TokenOutput(
            token_id=token_id,
            logprobs=self._logprobs(previous_id, token_id, request.num_logprobs),
            logits_V=self._logits_V(previous_id) if request.return_logits else None,
            finish_reason="stop" if stops else "length" if is_last else None,
        )

    def _prompt_output(self, request: Request) -> PromptOutput:
        ids = request.prompt_ids
        logprobs: tuple[TokenLogprobs | None, ...] = ()
        if request.prompt_logprobs:
            logprobs = (None, *(self._logprobs(p, i, request.num_logprobs or 0) for p, i in pairwise(ids)))
        logits_TV = None
        if request.return_logits:
            fed_ids = ids[:-1] if request.sampling.max_tokens == 0 else ids
            rows = [self._logits_V(i) for i in fed_ids]
            logits_TV = np.stack(rows) if rows else np.empty((0, self.info.num_ids), dtype=np.float32)
        return PromptOutput(logprobs=logprobs, logits_TV=logits_TV)

    def _logprobs(self, previous_id: int, token_id: int, num_logprobs: int | None) -> TokenLogprobs | None:
        if num_logprobs is None:
            return None
        num_ids = self.info.num_ids
        return TokenLogprobs(
            token_id=token_id,
            logprob=_logprob_of_rank((token_id - previous_id) % num_ids),
            top=tuple(((previous_id + rank) % num_ids, _logprob_of_rank(rank)) for rank in range(num_logprobs)),
        )

    def _logits_V(self, previous_id: int) -> np.ndarray:
        ranks_V = (np.arange(self.info.num_ids) - previous_id) % self.info.num_ids
        return (-(ranks_V + 1) * math.log(2)).astype(np.float32)


def _logprob_of_rank(rank: int) -> float:
    """Rounded to float32, as a real engine's are, so that it is bit-equal to the logits."""
    return float(np.float32(-(rank + 1) * math.log(2)))
