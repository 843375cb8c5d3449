"""A request's state inside the engine. `TorchEngine` creates it, and the scheduler and `EngineCore` advance it on their
thread; only `outputs` and `is_deregistered` belong to the event loop."""

import asyncio
import secrets
from array import array
from dataclasses import dataclass, field

import numpy as np

from kraken.engine.batch import SamplingInput
from kraken.engine.kv_cache import BlockTable
from kraken.engine.protocol import EngineError, FinishReason, Output, Request, TokenLogprobs


@dataclass(eq=False, slots=True)
class RequestState:
    """One request from its arrival to its last token."""

    request: Request
    outputs: asyncio.Queue[Output | EngineError | None] = field(default_factory=asyncio.Queue)
    """What the client of `generate` has not taken yet; None ends the stream."""
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
    block_table: BlockTable = field(default_factory=BlockTable)
    num_computed: int = 0
    """Tokens in the KV cache, or written to it by the step that runs now."""
    num_generated: int = 0
    was_admitted: bool = False
    """Whether the request has left the queue once; a preempted one waits without counting as queued."""
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
        return SamplingInput(self.request.sampling, self.seed, self.num_generated, self.seen_ids)

    def append(self, token_id: int) -> FinishReason | None:
        """Add a generated token; returns why it is the last one, or None."""
        sampling = self.request.sampling
        self.token_ids.append(token_id)
        self.num_generated += 1
        if sampling.repetition_penalty != 1.0:
            self.seen_ids.add(token_id)
        if token_id in sampling.stop_ids:
            return "stop"
        return "length" if self.num_generated == sampling.max_tokens else None
