"""Passes the events of one completion to the record of its request and to the metrics."""

import time

from kraken.engine.protocol import Admission, Item, TokenOutput
from serve.metrics import EndpointMetrics
from serve.record import RequestRecord


class CallObserver:
    """One call of the completions API.

    Args:
        record: of the HTTP request.
        metrics: None counts nothing.
    """

    def __init__(self, record: RequestRecord | None = None, metrics: EndpointMetrics | None = None):
        self.record = record or RequestRecord()
        self._metrics = metrics
        self._last_token_at: dict[int, float] = {}
        self._reasons: set[str] = set()

    def came(self, index: int, item: Item) -> None:
        """The engine has yielded an output of a choice, or its end."""
        if not isinstance(item, TokenOutput):
            return
        now, last = time.monotonic(), self._last_token_at.get(index)
        self._last_token_at[index] = now
        if last is not None:
            if self._metrics:
                self._metrics.later_token(now - last)
            return
        if self.record.first_token_at is None:
            self.record.first_token_at = now
        if self._metrics:
            self._metrics.first_token(now - self.record.started_at)

    def admitted(self, admission: Admission | None, num_prompt_tokens: int) -> None:
        """A choice has its first output.

        Args:
            num_prompt_tokens: 0 for all but the first choice of a prompt.
        """
        record, num_cached_tokens = self.record, None
        record.num_prompt_tokens += num_prompt_tokens
        if admission is not None:
            record.queue_s = max(record.queue_s or 0.0, admission.queue_s)
            num_cached_tokens = admission.num_cached_tokens
            if self._metrics:
                self._metrics.admitted(admission.queue_s)
        if num_prompt_tokens:
            if num_cached_tokens is not None:
                record.num_cached_tokens = (record.num_cached_tokens or 0) + num_cached_tokens
            if self._metrics:
                self._metrics.prompt(num_prompt_tokens, num_cached_tokens)

    def tokens(self, count: int) -> None:
        """Generated tokens have become part of the response."""
        self.record.num_completion_tokens += count
        if self._metrics and count:
            self._metrics.tokens(count)

    def choice_ended(self, reason: str) -> None:
        """A choice has ended: `stop`, `length`, `abort` or `error`."""
        self._reasons.add(reason)
        self.record.reason = ",".join(sorted(self._reasons))
        if self._metrics:
            self._metrics.choice_ended(reason)
