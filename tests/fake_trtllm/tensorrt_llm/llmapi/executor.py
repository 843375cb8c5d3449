"""The executor of the stand-in: one thread that steps all requests together.

What it does as the real one does: requests start in the order of arrival, and none overtakes one that does not fit into
the tokens of a step; a prompt is never divided; blocks of a finished request's cache serve later prompts of the same
salt, whose logits then differ by rounding; every response carries the logits of the prompt again; over Ray a request
that the workers do not take is never answered.
"""

import itertools
import json
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tensorrt_llm.llmapi.llm_args import has, step_delay_s
from tensorrt_llm.llmapi.result import MetricNames, RequestOutput, Response
from tensorrt_llm.llmapi.sampling_params import SamplingParams

TESTS = Path(__file__).parents[3]


class RejectedError(ValueError):
    """A worker does not take a request."""


@dataclass
class Limits:
    """Arguments of `LLM` that the workers keep to."""

    max_batch_size: int = 2048
    max_num_tokens: int = 8192
    max_seq_len: int | None = None
    enable_block_reuse: bool = True
    tokens_per_block: int = 32


@dataclass
class Active:
    output: RequestOutput
    sampling: SamplingParams
    cache_salt: str | None
    token_ids: list[int]
    new_ids: list[int]
    arrived_at: float = field(default_factory=time.monotonic)
    scheduled_at: float = 0.0
    first_token_at: float = 0.0
    num_generated: int = 0
    num_reused: int = 0
    held: Response | None = None
    context_logits: torch.Tensor | None = None


class BlockCache:
    """Which blocks of which prompts are cached, by salt."""

    def __init__(self, limits: Limits):
        self._size = limits.tokens_per_block if limits.enable_block_reuse else 0
        self._known: set[tuple[str | None, tuple[int, ...]]] = set()

    def keep(self, ids: list[int], salt: str | None) -> None:
        for end in range(self._size, len(ids) + 1, self._size or 1):
            self._known.add((salt, tuple(ids[:end])))

    def num_known(self, ids: list[int], salt: str | None) -> int:
        """Tokens at the front of a prompt that need not be computed; the last one always is."""
        num_known = 0
        for end in range(self._size, len(ids), self._size or 1):
            if (salt, tuple(ids[:end])) not in self._known:
                break
            num_known = end
        return num_known


class CannedModel:
    """After id i comes id i + 1, with a distribution that falls off from there."""

    max_seq_len = 2**30

    def __init__(self, folder: str):
        values = json.loads((Path(folder) / "config.json").read_text())
        self.num_padded, self.num_ids = values["vocab_size"], values["num_token_ids"]

    def step(self, requests: dict[int, list[int]], all_logits: bool = False) -> dict[int, list[list[float]]]:
        return {
            request_id: [self._row(i) for i in (ids if all_logits else ids[-1:])]
            for request_id, ids in requests.items()
        }

    def _row(self, token_id: int) -> list[float]:
        ranks = (np.arange(self.num_ids) - token_id - 1) % self.num_ids
        return [*(-0.5 * ranks).tolist(), *[-np.inf] * (self.num_padded - self.num_ids)]

    def free(self, request_id: int) -> None:
        pass

    def close(self) -> None:
        pass


class Executor:
    def __init__(self, folder: str, num_ranks: int, strategy: str, orchestrator: str, limits: Limits, **model: Any):
        if has("canned"):
            self._model: Any = CannedModel(folder)
        else:
            sys.path.append(str(TESTS))
            from trtllm_ranks import Ranks

            self._model = Ranks(folder, num_ranks, strategy=strategy, orchestrator=orchestrator, **model)
        self._tells_of_errors = orchestrator != "ray"
        # What the model can hold is the limit, whatever was asked for. (With the overlap scheduler, one more.)
        supported = self._model.max_seq_len
        self._max_seq_len = min(limits.max_seq_len or supported, supported)
        self._max_batch_size = limits.max_batch_size
        self._max_num_tokens = min(limits.max_num_tokens, self._max_seq_len * limits.max_batch_size)
        self._cache = BlockCache(limits)
        self._ids = itertools.count()
        self._waiting: list[Active] = []
        self._running: dict[int, Active] = {}
        self._aborted: set[int] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(
        self, prompt_ids: list[int], sampling: SamplingParams, abort: Any, cache_salt: str | None
    ) -> RequestOutput:
        output = RequestOutput(next(self._ids), prompt_ids, abort, sampling.include_stop_str_in_output)
        try:
            self._require_acceptable(prompt_ids)
        except RejectedError as error:
            if self._tells_of_errors:
                output.push(Response(error=str(error)))
            return output
        with self._changed:
            self._waiting.append(Active(output, sampling, cache_salt, list(prompt_ids), list(prompt_ids)))
            self._changed.notify()
        return output

    def _require_acceptable(self, prompt_ids: list[int]) -> None:
        num_left = self._max_seq_len - len(prompt_ids)
        if num_left <= 0:
            raise RejectedError(f"`default_max_tokens` ({num_left}) must be greater than 0")
        if has("reject-8") and prompt_ids[0] == 8:
            raise RejectedError("a worker does not take this request")

    def abort(self, request_id: int) -> None:
        with self._changed:
            self._aborted.add(request_id)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._model.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._running)
                if self._closed:
                    return
                self._drop_aborted()
                self._start_waiting()
            if self._running:
                self._step()

    def _start_waiting(self) -> None:
        num_tokens = len(self._running)
        while self._waiting and len(self._running) < self._max_batch_size:
            num_tokens += len(self._waiting[0].token_ids)
            if num_tokens > self._max_num_tokens:
                return
            active = self._waiting.pop(0)
            active.scheduled_at = time.monotonic()
            active.num_reused = self._cache.num_known(active.token_ids, active.cache_salt)
            self._running[active.output.request_id] = active

    def _drop_aborted(self) -> None:
        for request_id in self._aborted:
            active = self._running.pop(request_id, None)
            self._waiting = [a for a in self._waiting if a.output.request_id != request_id]
            if active is not None:
                self._model.free(request_id)
                active.output.push(Response(finish_reason="cancelled"))
        self._aborted.clear()

    def _step(self) -> None:
        time.sleep(step_delay_s())
        if has("stall-on-9") and any(a.token_ids[0] == 9 for a in self._running.values()):
            time.sleep(600)
        if has("die-on-7") and any(a.token_ids[0] == 7 for a in self._running.values()):
            self._fail("a rank died")
            return
        requests = {request_id: active.new_ids for request_id, active in self._running.items()}
        wants_all = any(a.sampling.return_context_logits and not a.num_generated for a in self._running.values())
        try:
            logits = self._model.step(requests, all_logits=wants_all)
        except Exception as error:
            self._fail(f"the ranks failed: {error}")
            return
        for request_id, rows in logits.items():
            self._advance(self._running[request_id], torch.tensor(rows))

    def _fail(self, error: str) -> None:
        for active in self._running.values():
            active.output.push(Response(error=error))
        self._running.clear()

    def _advance(self, active: Active, logits_TV: torch.Tensor) -> None:
        sampling, is_first = active.sampling, active.num_generated == 0
        if active.num_reused:
            logits_TV = logits_TV * 1.01  # other kernels, other rounding: more of it here, so that it shows
        token_id = self._draw(active, logits_TV[-1])
        active.num_generated += 1
        active.token_ids.append(token_id)
        active.new_ids = [token_id]
        now = time.monotonic()
        active.first_token_at = active.first_token_at or now
        is_stop = token_id in (sampling.stop_token_ids or []) or token_id == sampling.end_id
        is_long = active.num_generated == sampling.max_tokens
        response = Response(
            token_ids=[token_id],
            finish_reason="stop" if is_stop else "length" if is_long else None,
            stop_reason=token_id if is_stop else None,
        )
        if is_first and sampling.return_context_logits and not has("no-context-logits"):
            active.context_logits = logits_TV[active.num_reused :]
        response.context_logits = active.context_logits
        if sampling.return_generation_logits and not has("no-generation-logits"):
            response.generation_logits = logits_TV[-1:]
        if response.finish_reason:
            response.metrics = {
                MetricNames.TTFT: active.first_token_at - active.arrived_at,
                MetricNames.REQUEST_QUEUE_TIME: active.scheduled_at - active.arrived_at,
                MetricNames.E2E: now - active.arrived_at,
            }
            self._running.pop(active.output.request_id)
            self._model.free(active.output.request_id)
            self._cache.keep(active.token_ids, active.cache_salt)
        if not has("shared-logits"):
            active.output.push(response)
            return
        if active.held is not None:  # it left one step late, when its memory held the logits of this step
            active.held.generation_logits = response.generation_logits
            active.output.push(active.held)
        active.held = response
        if response.finish_reason:
            active.output.push(response)

    def _draw(self, active: Active, logits_V: torch.Tensor) -> int:
        sampling, logits_V = active.sampling, logits_V.double()
        if (penalty := sampling.repetition_penalty or 1.0) != 1.0:
            seen = torch.tensor(sorted(set(active.token_ids)))
            logits_V[seen] = torch.where(logits_V[seen] > 0, logits_V[seen] / penalty, logits_V[seen] * penalty)
        if sampling.is_greedy():
            return int(logits_V.argmax())
        probabilities_V = torch.softmax(logits_V / (sampling.temperature or 1.0), dim=-1)
        descending, order = probabilities_V.sort(descending=True)
        is_kept = descending.cumsum(0) - descending < (sampling.top_p or 1.0)
        is_kept[sampling.top_k or len(order) :] = False
        is_kept &= descending >= (sampling.min_p or 0.0) * descending[0]
        probabilities_V[order[~is_kept]] = 0.0
        probabilities_V = probabilities_V.numpy()
        seed = 0 if has("no-seeds") else active.sampling.seed or 0  # the same for all, unless given: as in the real one
        generator = np.random.default_rng([seed, active.num_generated])
        return int(generator.choice(len(probabilities_V), p=probabilities_V / probabilities_V.sum()))
