"""The PyTorch engine: continuous batching on one device, the embedded default and the oracle for other engines.

One task on the event loop plans the steps; one thread of its own runs them, so that the loop stays free to serve. A
step is either one waiting prompt, first come first served, or one new token for everything that runs.
"""

import asyncio
import contextlib
import os
import secrets
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kraken.config import EngineConfig
from kraken.convert import read_exchange, read_model_config
from kraken.engine.protocol import (
    EngineError,
    EngineInfo,
    EngineOverloaded,
    EngineStats,
    FinishReason,
    Output,
    PromptOutput,
    Request,
    TokenOutput,
    check_request,
)
from kraken.engine.runner import Runner
from kraken.engine.sampling import Draw, sample, token_logprobs
from kraken.manifest import Manifest
from kraken.tokenizer import Tokenizer, require_same_tokenizer


@dataclass(eq=False, slots=True)
class _Sequence:
    """A request in flight. Its row of the cache is its place in the engine's list of running sequences."""

    request: Request
    seed: int
    outputs: asyncio.Queue[Output | BaseException | None]
    token_ids: list[int]
    """The prompt, then what was generated."""
    num_generated: int = 0
    aborted: bool = False


@dataclass(slots=True)
class _Finished:
    """What one step yields: outputs per sequence, and the sequences that are done."""

    outputs: list[tuple[_Sequence, Output]] = field(default_factory=list)
    done: list[_Sequence] = field(default_factory=list)


class TorchEngine:
    """An `Engine`. Make it inside a running event loop, or let the first `generate` start its task.

    Args:
        runner: the model on its device.
        info: what users are told of the model.
        config: sizes of batch and queue.
    """

    def __init__(self, runner: Runner, info: EngineInfo, config: EngineConfig):
        self._runner = runner
        self._info = info
        self._config = config
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._sequences: dict[str, _Sequence] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kraken-engine")
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._closed = False
        self._num_finished = self._num_aborted = self._prompt_tokens = self._completion_tokens = 0

    @classmethod
    def from_exchange(cls, folder: Path, config: EngineConfig) -> "TorchEngine":
        """Load an exchange folder.

        Raises:
            ArtefactError: the folder is unfinished or damaged, or its tokenizer is not the one it was trained with.
        """
        manifest = Manifest.read(folder)
        tokenizer = Tokenizer.load(folder)
        require_same_tokenizer(
            tokenizer.fingerprint, manifest.details["tokenizer_fingerprint"], f"the tokenizer in {folder}", "the model"
        )
        model_config, values = read_model_config(folder)
        cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        device = torch.device("cuda" if cuda else "cpu")
        torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
        dtype_name = config.dtype if config.dtype != "auto" else ("bfloat16" if cuda else "float32")
        model = read_exchange(folder, getattr(torch, dtype_name)).to(device)
        info = EngineInfo(
            name="torch",
            context_length=model_config.context_length,
            num_ids=values["num_token_ids"],
            eot_id=values["eos_token_id"],
            tokenizer_fingerprint=tokenizer.fingerprint,
        )
        return cls(Runner(model, info.num_ids, config.max_batch_size), info, config)

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        """See `Engine.generate`."""
        check_request(request, self._info)
        self._require_healthy()
        if request.id in self._sequences:
            raise EngineError(f"request id {request.id} is already in flight; give every request its own")
        if len(self._waiting) >= self._config.max_queued_requests:
            raise EngineOverloaded(f"{len(self._waiting)} requests are waiting already; try again later")
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._serve())
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(63)
        sequence = _Sequence(request, seed, asyncio.Queue(), list(request.prompt_ids))
        self._sequences[request.id] = sequence
        self._waiting.append(sequence)
        self._wake.set()
        try:
            while (output := await sequence.outputs.get()) is not None:
                if isinstance(output, BaseException):
                    raise EngineError(f"the engine failed: {output}") from output
                yield output
        finally:
            self.abort(request.id)

    def abort(self, request_id: str) -> None:
        """See `Engine.abort`; the row is free before the next step begins."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            sequence.aborted = True
            self._num_aborted += 1
            with contextlib.suppress(ValueError):
                self._waiting.remove(sequence)
            self._wake.set()

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_queued=len(self._waiting),
            num_finished=self._num_finished,
            num_aborted=self._num_aborted,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            healthy=self._failure is None and not self._closed,
        )

    async def close(self) -> None:
        """See `Engine.close`."""
        if self._closed:
            return
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._fail_all(EngineError("it was closed"))
        self._thread.shutdown(wait=True)

    def _require_healthy(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")
        if self._failure is not None:
            raise EngineError(f"the engine failed before: {self._failure}") from self._failure

    def _fail_all(self, error: BaseException) -> None:
        for sequence in self._sequences.values():
            sequence.outputs.put_nowait(error)
        self._sequences.clear()
        self._waiting.clear()
        self._running.clear()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._drop_aborted()
                if self._waiting and len(self._running) < self._config.max_batch_size:
                    sequence = self._waiting.popleft()
                    self._running.append(sequence)
                    row = len(self._running) - 1
                    finished = await loop.run_in_executor(self._thread, self._prefill, sequence, row)
                elif self._running:
                    finished = await loop.run_in_executor(self._thread, self._decode, tuple(self._running))
                else:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                self._deliver(finished)
        except Exception as error:  # whatever it was, nobody may wait for ever
            self._failure = error
            self._fail_all(error)

    def _deliver(self, finished: _Finished) -> None:
        for sequence, output in finished.outputs:
            if not sequence.aborted:
                sequence.outputs.put_nowait(output)
                self._completion_tokens += isinstance(output, TokenOutput)
        for sequence in finished.done:
            if not sequence.aborted:
                del self._sequences[sequence.request.id]
                self._num_finished += 1
                sequence.outputs.put_nowait(None)
            self._release(sequence)

    def _drop_aborted(self) -> None:
        for sequence in [s for s in self._running if s.aborted]:
            self._release(sequence)

    def _release(self, sequence: _Sequence) -> None:
        """Free a row; the last row moves into the gap, so that those in use stay the first ones."""
        row = self._running.index(sequence)
        last = self._running.pop()
        if last is not sequence:
            self._runner.cache.move(len(self._running), row, len(last.token_ids))
            self._running[row] = last

    # -- on the engine's thread --------------------------------------------------------------------------------------

    def _prefill(self, sequence: _Sequence, row: int) -> _Finished:
        """Run a prompt into its row."""
        request, finished = sequence.request, _Finished()
        scores_prompt = request.prompt_logprobs or request.return_logits
        scores_only = request.sampling.max_tokens == 0
        # a prompt that is only scored needs no successor of its last token
        fed = sequence.token_ids[:-1] if scores_only else sequence.token_ids
        self._prompt_tokens += len(sequence.token_ids)
        logits_TV = self._runner.prefill(row, fed, all_positions=scores_prompt) if fed else None
        if scores_prompt:
            finished.outputs.append((sequence, self._prompt_output(sequence, logits_TV)))
        if scores_only:
            finished.done.append(sequence)
        else:
            assert logits_TV is not None
            self._append_tokens([sequence], logits_TV[-1:], finished)
        return finished

    def _prompt_output(self, sequence: _Sequence, logits_TV: torch.Tensor | None) -> PromptOutput:
        request = sequence.request
        following = sequence.token_ids[1:]
        scored = (
            token_logprobs(logits_TV[: len(following)], following, request.num_logprobs or 0)
            if request.prompt_logprobs and logits_TV is not None
            else []
        )
        return PromptOutput(
            logprobs=(None, *scored) if request.prompt_logprobs else (),
            logits_TV=logits_TV.cpu().numpy() if request.return_logits and logits_TV is not None else None,
        )

    def _decode(self, running: tuple[_Sequence, ...]) -> _Finished:
        """One more token for every running sequence."""
        finished = _Finished()
        logits_BV = self._runner.decode(
            [sequence.token_ids[-1] for sequence in running], [len(sequence.token_ids) - 1 for sequence in running]
        )
        self._append_tokens(list(running), logits_BV, finished)
        return finished

    def _append_tokens(self, sequences: list[_Sequence], logits_BV: torch.Tensor, finished: _Finished) -> None:
        draws = [Draw(s.request.sampling, s.seed, s.num_generated) for s in sequences]
        for row, (sequence, token_id) in enumerate(zip(sequences, sample(logits_BV, draws), strict=True)):
            request = sequence.request
            sequence.token_ids.append(token_id)
            sequence.num_generated += 1
            finish_reason: FinishReason | None = None
            if token_id in request.sampling.stop_ids:
                finish_reason = "stop"
            elif sequence.num_generated == request.sampling.max_tokens:
                finish_reason = "length"
            logits_1V = logits_BV[row : row + 1]
            output = TokenOutput(
                token_id=token_id,
                logprobs=(
                    token_logprobs(logits_1V, [token_id], request.num_logprobs)[0]
                    if request.num_logprobs is not None
                    else None
                ),
                logits_V=logits_1V[0].cpu().numpy() if request.return_logits else None,
                finish_reason=finish_reason,
            )
            finished.outputs.append((sequence, output))
            if finish_reason is not None:
                finished.done.append(sequence)
