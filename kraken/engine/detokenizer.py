"""From token ids to text while they are generated: never half a character, never a stop string.

    ids -> bytes -> characters (an incomplete one waits for its bytes) -> text (a possible stop string waits)

Where the token borders lie changes when text is released, never which text.
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


class Piece(NamedTuple):
    """Text that is final, and the tokens that go with it."""

    text: str
    starts: tuple[int, ...]
    """Where each released token begins: the characters of the text that were complete before it."""


class Detokenizer:
    """The text of one sequence of tokens. A token is released together with the first character it contributes to.

    Args:
        stop: strings that end the text. The one that is complete first counts (of several, the longest); neither it nor
            anything after it is released, nor are the tokens that lie wholly behind the cut.
        min_tokens: in the text of this many first tokens no stop string counts, or begins.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), min_tokens: int = 0):
        self.stopped = False
        self.num_released = 0
        """Characters released so far."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._num_stopless = min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._starts: deque[int] = deque()

    def push(self, token_id: int) -> Piece:
        """Take the next token; returns what is now final. Not after `stopped`."""
        assert not self.stopped, "the text has ended at a stop string"
        self._starts.append(self.num_released + len(self._held))
        self._held += self._decoder.decode(self._tokenizer.token_bytes(token_id))
        return self._release(is_end=False)

    def flush(self) -> Piece:
        """Release what was held back; the tokens have ended. An incomplete character becomes U+FFFD."""
        if self.stopped:
            return Piece("", ())
        self._held += self._decoder.decode(b"", final=True)
        return self._release(is_end=True)

    def _release(self, is_end: bool) -> Piece:
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
        return Piece(text, tuple(starts))

    def _find_stop(self) -> int | None:
        """Where the held text must be cut: the beginning of the stop string that is complete first."""
        found = [(start + len(stop), start) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _num_undecided(self) -> int:
        """Characters at the end of the held text that may yet become a stop string."""
        max_length = max((len(stop) for stop in self._stop), default=1) - 1
        for num_chars in range(min(max_length, len(self._held)), 0, -1):
            tail = self._held[-num_chars:]
            if any(stop.startswith(tail) for stop in self._stop):
                return num_chars
        return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TextToken:
    """A generated token and where its text begins."""

    token_id: int
    start: int
    """Characters of the completion before it."""
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOutput:
    """The next part of a completion; parts put together are the completion."""

    text: str
    tokens: tuple[TextToken, ...]
    """Tokens released with this text; a stop id is among them, though it has no text."""
    num_tokens: int
    """Tokens generated so far, also those whose text is held back or cut off by a stop string."""
    finish_reason: FinishReason | None
    """Set on the last part: `stop` for a stop id or a stop string, `length` otherwise."""


async def generate_text(
    engine: Engine, tokenizer: Tokenizer, request: Request, stop: Sequence[str] = ()
) -> AsyncGenerator[PromptOutput | TextOutput, None]:
    """Complete a prompt as text; ends the engine's request at a stop string or when left early.

    Raises:
        RequestError, EngineOverloaded, EngineError: as `Engine.generate`.
    """
    detokenizer = Detokenizer(tokenizer, stop, request.sampling.min_tokens)
    waiting: deque[TokenOutput] = deque()  # tokens whose text is not final yet
    num_tokens = 0
    try:
        async for output in engine.generate(request):
            if isinstance(output, PromptOutput):
                yield output
                continue
            num_tokens += 1
            waiting.append(output)
            is_stop_id = output.finish_reason == "stop"  # a token like others, but its text is not part of the text
            piece = Piece("", ()) if is_stop_id else detokenizer.push(output.token_id)
            if output.finish_reason:
                rest = detokenizer.flush()
                piece = Piece(piece.text + rest.text, piece.starts + rest.starts)
                if is_stop_id and not detokenizer.stopped:
                    piece = Piece(piece.text, (*piece.starts, detokenizer.num_released))
            finish_reason: FinishReason | None = "stop" if detokenizer.stopped else output.finish_reason
            if piece.text or piece.starts or finish_reason:
                yield TextOutput(
                    text=piece.text,
                    tokens=tuple(_text_token(waiting.popleft(), start) for start in piece.starts),
                    num_tokens=num_tokens,
                    finish_reason=finish_reason,
                )
            if finish_reason:
                return
        if request.sampling.max_tokens:
            raise EngineError(f"the engine ended the request after {num_tokens} tokens without a reason")
        yield TextOutput(text="", tokens=(), num_tokens=0, finish_reason="length")
    finally:
        engine.abort(request.id)


def _text_token(output: TokenOutput, start: int) -> TextToken:
    return TextToken(token_id=output.token_id, start=start, logprobs=output.logprobs)
