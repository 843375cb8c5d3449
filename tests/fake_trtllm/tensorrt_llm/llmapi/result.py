"""What a request yields. One object for the whole request: every response changes it, and it yields itself."""

import asyncio
import enum
from dataclasses import dataclass, field
from typing import Any

import torch


class MetricNames(enum.Enum):
    TTFT = "ttft"
    TPOT = "tpot"
    E2E = "e2e"
    REQUEST_QUEUE_TIME = "request_queue_time"


@dataclass
class CompletionOutput:
    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Any] = field(default_factory=list)
    prompt_logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    generation_logits: torch.Tensor | None = None
    disaggregated_params: Any = None
    request_perf_metrics: Any = None
    text_diff: str = ""
    token_ids_diff: list[int] = field(default_factory=list)
    logprobs_diff: list[Any] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.token_ids)


@dataclass
class Response:
    """What the executor sends for one step of one request."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | None = None
    context_logits: torch.Tensor | None = None
    generation_logits: torch.Tensor | None = None
    metrics: dict[MetricNames, float] = field(default_factory=dict)
    error: str | None = None


class RequestOutput:
    def __init__(self, request_id: int, prompt_token_ids: list[int], abort: Any, include_stop: bool):
        self.request_id = request_id
        self.prompt: str | None = None
        self.prompt_token_ids = prompt_token_ids
        self.outputs = [CompletionOutput()]
        self.context_logits: torch.Tensor | None = None
        self.finished = False
        self.metrics_dict: dict[MetricNames, float] = {}
        self._abort, self._aborted, self._include_stop = abort, False, include_stop
        self._loop = asyncio.get_running_loop()  # in the real package too: no loop, no asynchronous use
        self._responses: asyncio.Queue[Response] = asyncio.Queue()

    def push(self, response: Response) -> None:
        """From the executor's thread."""
        self._loop.call_soon_threadsafe(self._responses.put_nowait, response)

    def abort(self) -> None:
        self._aborted = True
        self._abort(self.request_id)

    def aborted(self) -> bool:
        return self._aborted

    def result(self, timeout: float | None = None) -> "RequestOutput":
        raise RuntimeError("this request is asynchronous")

    async def aresult(self) -> "RequestOutput":
        async for _ in self:
            pass
        return self

    def __await__(self) -> Any:
        return self.aresult().__await__()

    def __aiter__(self) -> "RequestOutput":
        return self

    async def __anext__(self) -> "RequestOutput":
        if self.finished:
            raise StopAsyncIteration
        response = await self._responses.get()
        if response.error is not None:
            self.finished = True
            raise RuntimeError(response.error)
        output = self.outputs[0]
        output.token_ids.extend(response.token_ids)
        output.token_ids_diff = response.token_ids
        output.finish_reason, output.stop_reason = response.finish_reason, response.stop_reason
        output.generation_logits = response.generation_logits
        if response.finish_reason == "stop" and not self._include_stop:
            output.token_ids.pop()
        if response.context_logits is not None:
            self.context_logits = response.context_logits
        self.finished = response.finish_reason is not None
        self.metrics_dict |= response.metrics
        return self
