"""A request's state inside the engine. `TorchEngine` creates it, and the scheduler and `EngineCore` advance it on their
thread; only `receive` and `is_deregistered` belong to the event loop."""

import secrets
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kraken.engine.batch import SamplingInput
from kraken.engine.kv_cache import BlockTable
from kraken.engine.protocol import Admission, FinishReason, Item, Request, TokenLogprobs


@dataclass(eq=False, slots=True)
class RequestState:
    """One request from its arrival to its last token."""

    request: Request
    receive: Callable[[Item], None]
    """Takes the outputs and the end; see `Engine.submit`."""
    is_deregistered: bool = False
    """Set on the event loop when the request has finished, failed or was aborted: nothing more is sent to the
    client."""
    token_ids: "array[int]" = field(init=False)
    """int32, copied to the device as they are: the prompt, then the generated tokens. A prompt that is only scored
    lacks its last token, which is never fed to the model."""
    scores_prompt: bool = field(init=False)
    """Whether the prompt's logits are still to be reported, at every position. Such a prompt reuses no prefix."""
    seed: int = field(init=False)
    seen_ids: set[int] = field(default_factory=set)
    """Ids of prompt and completion; kept only for requests with a repetition penalty."""
    counts: Counter[int] = field(default_factory=Counter)
    """How often the completion has each id; kept only for requests with a presence or frequency penalty."""
    block_table: BlockTable = field(default_factory=BlockTable)
    num_computed: int = 0
    """Tokens in the KV cache, or written to it by the step that runs now."""
    num_generated: int = 0
    num_cached: int = 0
    """Prompt tokens that were in the cache when the request was first admitted."""
    arrived_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    """When the first step with this request began."""
    was_admitted: bool = False
    """Whether the request has left the queue once; a preempted one waits without counting as queued."""
    is_admission_told: bool = False
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    prompt_logits: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        request, sampling = self.request, self.request.sampling
        self.token_ids = array("i", request.prompt_ids if sampling.max_tokens else request.prompt_ids[:-1])
        self.scores_prompt = request.prompt_logprobs or request.return_logits
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        if sampling.repetition_penalty != 1.0:
            self.seen_ids.update(request.prompt_ids)

    @property
    def num_remaining(self) -> int:
        """Known tokens that have not been computed."""
        return len(self.token_ids) - self.num_computed

    @property
    def max_length(self) -> int:
        """Most tokens that the cache will hold of it; the last generated token is never fed to the model."""
        return len(self.request.prompt_ids) + max(self.request.sampling.max_tokens - 1, 0)

    @property
    def sampling_input(self) -> SamplingInput:
        return SamplingInput(self.request.sampling, self.seed, self.num_generated, self.seen_ids, self.counts)

    def take_admission(self) -> Admission | None:
        """The admission, for the request's first output; None from the second call on."""
        if self.is_admission_told or self.started_at is None:
            return None
        self.is_admission_told = True
        return Admission(queue_s=self.started_at - self.arrived_at, num_cached_tokens=self.num_cached)

    def append(self, token_id: int) -> FinishReason | None:
        """Add a generated token; returns why it is the last one, or None."""
        sampling = self.request.sampling
        self.token_ids.append(token_id)
        self.num_generated += 1
        if sampling.repetition_penalty != 1.0:
            self.seen_ids.add(token_id)
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts[token_id] += 1
        if token_id in sampling.stop_ids:
            return "stop"
        return "length" if self.num_generated == sampling.max_tokens else None
