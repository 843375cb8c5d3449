"""From generated token ids to a stream of text without half characters and without stop strings. Called by serving.

    ids -> bytes -> characters (an incomplete one waits for its bytes) -> text (a possible stop string waits)

How the text is divided into tokens affects when a part of it is released, but not the text.
"""

import codecs
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kraken.engine.protocol import (
    Engine,
    EngineError,
    FinishReason,
    PromptOutput,
    Request,
    TokenLogprobs,
    TokenOutput,
)
from kraken.tokenizer import Tokenizer


class TextPiece(NamedTuple):
    """Text that no later token can change, and its tokens."""

    text: str
    starts: tuple[int, ...]
    """For each released token the number of characters of the text before it."""


class Detokenizer:
    """Turns the tokens of one sequence into text. A token is released with the first character that it contributes to.

    Args:
        stop: strings that end the text. The text is cut before the stop string whose last character comes first; if
            several end at that character, before the longest. Neither that string nor the text and the tokens behind
            the cut are released.
        min_tokens: a stop string may not begin in the text of so many first tokens.
        skipped_ids: ids that have no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        skipped_ids: frozenset[int] = frozenset(),
    ):
        self.stopped = False
        self.num_released = 0
        """Characters released so far."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._num_stopless = min_tokens
        self._skipped_ids = skipped_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._starts: deque[int] = deque()

    def push(self, token_id: int) -> TextPiece:
        """Add the next token; returns the text that has become final. Must not be called once `stopped` is True."""
        assert not self.stopped, "the text has ended at a stop string"
        self._starts.append(self.num_released + len(self._held))
        if token_id not in self._skipped_ids:
            self._held += self._decoder.decode(self._tokenizer.token_bytes(token_id))
        return self._release(is_end=False)

    def flush(self) -> TextPiece:
        """Release all held text after the last token. An incomplete character becomes U+FFFD."""
        if self.stopped:
            return TextPiece("", ())
        self._held += self._decoder.decode(b"", final=True)
        return self._release(is_end=True)

    def _release(self, is_end: bool) -> TextPiece:
        is_stopless, self._num_stopless = self._num_stopless > 0, max(self._num_stopless - 1, 0)
        cut = None if is_stopless else self._find_stop()
        if cut is not None:
            self.stopped = True
        else:
            cut = len(self._held) - (0 if is_end or is_stopless else self._num_undecided())
        text, self._held = self._held[:cut], self._held[cut:]
        self.num_released += len(text)
        starts = []
        while self._starts and (self._starts[0] < self.num_released or (is_end and not self.stopped)):
            starts.append(self._starts.popleft())
        return TextPiece(text, tuple(starts))

    def _find_stop(self) -> int | None:
        """The index in the held text at which the stop string that is complete first begins."""
        found = [(start + len(stop), start) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _num_undecided(self) -> int:
        """Length of the end of the held text that could be the beginning of a stop string."""
        max_length = max((len(stop) for stop in self._stop), default=1) - 1
        for num_chars in range(min(max_length, len(self._held)), 0, -1):
            tail = self._held[-num_chars:]
            if any(stop.startswith(tail) for stop in self._stop):
                return num_chars
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TextToken:
    """A generated token and the position of its text."""

    token_id: int
    start: int
    """Number of characters of the completion before it."""
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOutput:
    """The next part of a completion. The parts concatenated are the completion."""

    text: str
    tokens: tuple[TextToken, ...]
    """Tokens released with this text, including a stop id, which has no text."""
    num_tokens: int
    """Number of tokens generated so far, including those whose text is held back or cut off by a stop string."""
    finish_reason: FinishReason | None
    """Set on the last part: `stop` for a stop id or a stop string, otherwise `length`."""


class CompletionText:
    """From the output tokens of one request to the parts of its completion. Knows nothing of engines and waits for
    nothing: the caller pushes every token, and stops the request once `finish_reason` is set.

    Args:
        stop, skipped_ids: see `Detokenizer`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        stop: Sequence[str] = (),
        skipped_ids: frozenset[int] = frozenset(),
    ):
        self.finish_reason: FinishReason | None = None
        self.num_tokens = 0
        """Tokens pushed so far."""
        self._max_tokens = request.sampling.max_tokens
        self._detokenizer = Detokenizer(tokenizer, stop, request.sampling.min_tokens, skipped_ids)
        self._waiting: deque[TokenOutput] = deque()  # tokens whose text has not been released

    def push(self, output: TokenOutput) -> TextOutput | None:
        """Add the next token; returns what is final with it, if anything is."""
        detokenizer = self._detokenizer
        self.num_tokens += 1
        self._waiting.append(output)
        is_stop_id = output.finish_reason == "stop"  # reported as a token, but without text
        piece = TextPiece("", ()) if is_stop_id else detokenizer.push(output.token_id)
        if output.finish_reason:
            rest = detokenizer.flush()
            piece = TextPiece(piece.text + rest.text, piece.starts + rest.starts)
            if is_stop_id and not detokenizer.stopped:
                piece = TextPiece(piece.text, (*piece.starts, detokenizer.num_released))
        self.finish_reason = "stop" if detokenizer.stopped else output.finish_reason
        if not (piece.text or piece.starts or self.finish_reason):
            return None
        return TextOutput(
            text=piece.text,
            tokens=tuple(_text_token(self._waiting.popleft(), start) for start in piece.starts),
            num_tokens=self.num_tokens,
            finish_reason=self.finish_reason,
        )

    def end(self) -> TextOutput:
        """The last part of a request that the engine has ended without a token that says so.

        Raises:
            EngineError: the request was to generate tokens.
        """
        if self._max_tokens:
            raise EngineError(f"the engine ended the request after {self.num_tokens} tokens without a reason")
        self.finish_reason = "length"
        return TextOutput(text="", tokens=(), num_tokens=0, finish_reason="length")


async def generate_text(
    engine: Engine, tokenizer: Tokenizer, request: Request, stop: Sequence[str] = ()
) -> AsyncGenerator[PromptOutput | TextOutput, None]:
    """Complete a prompt as text. Aborts the engine's request at a stop string, or if the caller leaves early.

    Raises:
        RequestError, EngineOverloaded, EngineError: as `Engine.generate`.
    """
    text = CompletionText(tokenizer, request, stop)
    try:
        async for output in engine.generate(request):
            part = output if isinstance(output, PromptOutput) else text.push(output)
            if part is not None:
                yield part
            if text.finish_reason:
                return
        yield text.end()
    finally:
        engine.abort(request.id)


def _text_token(output: TokenOutput, start: int) -> TextToken:
    return TextToken(token_id=output.token_id, start=start, logprobs=output.logprobs)
