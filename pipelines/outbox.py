"""The outbox of a run: records leave from one thread, in order, so that no caller waits for a server."""

import logging
import re
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_METRICS_PER_BATCH = 1000
"""MLflow's limit."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0
"""Pauses between two tries, doubling, while the server is away."""
MAX_WAITING = 20_000
"""Most metrics held in memory while the server is away."""


def persist(
    call: Callable[[], T], is_passing: Callable[[Exception], bool], pause: Callable[[float, Exception], bool]
) -> T:
    """Repeat a call while the server is away; raises what the server refuses.

    Args:
        is_passing: whether another try can help.
        pause: sleeps, given the seconds and the error; False to give up, which raises the error.
    """
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return call()
        except Exception as error:
            if not is_passing(error) or not pause(pause_s, error):
                raise
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def one_line(error: BaseException) -> str:
    """An error for a tag or a warning, without passwords."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):  # a RayTaskError, whose own text is a traceback
        error = cause
    lines = [type(error).__name__, *str(error).strip().splitlines()]
    return without_password(": ".join(lines[:2]))[:500]


def without_password(text: str) -> str:
    """The text with the user part of every URI hidden."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)


class Metrics(NamedTuple):
    """Metrics of one optimizer step."""

    values: dict[str, float]
    step: int
    timestamp_ms: int


class Outbox:
    """Delivers records in order from one thread, trying again while the server is away.

    Args:
        name: the run's, for the warnings.
        open_run: called before anything is delivered; when the server refuses it, nothing is.
        send: delivers a batch of metrics.
        is_passing: whether another try can help after an error.
    """

    def __init__(
        self,
        name: str,
        open_run: Callable[[], None],
        send: Callable[[list[Metrics]], None],
        is_passing: Callable[[Exception], bool],
    ):
        self.settled = threading.Event()
        """Set once the run is open, or refused."""
        self.closed = False
        self.reason = "the server is slow"
        """Why something is missing: the last error."""
        self._name = name
        self._open_run = open_run
        self._send = send
        self._is_passing = is_passing
        self._changed = threading.Condition()
        self._waiting: deque[Metrics | Callable[[], object]] = deque()
        self._num_in_flight = 0
        self._num_lost = 0
        self._is_closing = False
        self._is_away = False
        # A daemon, so that a call that hangs cannot keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"mlflow {name}", daemon=True)
        self._thread.start()

    def put(self, item: Metrics | Callable[[], object], *, first: bool = False) -> None:
        """Take metrics or a call to make; what comes when the queue is full or closed is lost, and counted."""
        with self._changed:
            if self.closed or (isinstance(item, Metrics) and len(self._waiting) >= MAX_WAITING):
                self._lose(1)
            elif first:
                self._waiting.appendleft(item)
            else:
                self._waiting.append(item)
            self._changed.notify_all()

    def flush(self, limit_s: float) -> bool:
        """Wait until everything taken so far is delivered or refused; False when that takes too long."""
        done = threading.Event()
        self.put(done.set)
        return not self.closed and done.wait(limit_s)

    def close(self, limit_s: float) -> None:
        """Deliver what waits, within the limit; give up the rest, and say how much is missing."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join(limit_s)
        with self._changed:
            self.closed = True
            self._changed.notify_all()
            num_lost = self._num_lost + self._num_in_flight + len(self._waiting)
        if num_lost:
            logger.warning("MLflow run %s lacks %d records (%s)", self._name, num_lost, self.reason)

    def _work(self) -> None:
        try:
            persist(self._open_run, self._is_passing, self._pause)
        except Exception as error:
            self.reason = one_line(error)
            if not self.closed:
                logger.warning("MLflow run %s cannot be opened, nothing is recorded (%s)", self._name, self.reason)
            self.closed = True
        self.settled.set()
        while deliver := self._take():
            try:
                persist(deliver, self._is_passing, self._pause)
            except Exception as error:
                if self.closed:
                    return  # `close` has counted what was in flight
                self.reason = one_line(error)
                with self._changed:
                    self._lose(self._num_in_flight)
            with self._changed:
                self._num_in_flight = 0
            self._is_away = False

    def _lose(self, num_records: int) -> None:
        if not self._num_lost and not self.closed:
            logger.warning("MLflow run %s begins to lose records (%s)", self._name, self.reason)
        self._num_lost += num_records

    def _take(self) -> Callable[[], object] | None:
        """Wait for the next delivery: a call, or the metrics at the front up to a batch; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing or self.closed)
            if not self._waiting or self.closed:
                return None
            item = self._waiting.popleft()
            self._num_in_flight = 1
            if not isinstance(item, Metrics):
                return item
            batch = [item]
            room = MAX_METRICS_PER_BATCH - len(item.values)
            while self._waiting and isinstance(item := self._waiting[0], Metrics) and len(item.values) <= room:
                batch.append(item)
                room -= len(item.values)
                self._waiting.popleft()
            self._num_in_flight = len(batch)
            return partial(self._send, batch)

    def _pause(self, pause_s: float, error: Exception) -> bool:
        """Wait for the next try, never long while closing; False once closed."""
        self.reason = one_line(error)
        if not self._is_away:
            self._is_away = True
            logger.warning("MLflow is away, records of run %s wait in memory (%s)", self._name, self.reason)
        with self._changed:
            is_closing = self._is_closing
            self._changed.wait_for(
                lambda: self.closed or self._is_closing != is_closing, FIRST_PAUSE_S if is_closing else pause_s
            )
            return not self.closed
