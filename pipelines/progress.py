"""Progress of long work as lines, since a job's output is followed line by line, not on a terminal of its own."""

import time

from tqdm import tqdm

MIN_INTERVAL_S = 3.0


class ProgressLines:
    """A bar that prints a new line every few seconds, and always the last one.

    Args:
        label: what is being done.
        unit: what is counted; `B` is shown in KB, MB, GB.
    """

    def __init__(self, label: str, unit: str):
        self._label, self._unit = label, unit
        self._started_at = self._printed_at = time.monotonic()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if done < total and now - self._printed_at < MIN_INTERVAL_S:
            return
        self._printed_at = now
        bar = tqdm.format_meter(
            done,
            total,
            now - self._started_at,
            ncols=88,
            prefix=self._label,
            ascii=" =",
            unit=self._unit,
            unit_scale=self._unit == "B",
            postfix=note,
        )
        print(bar, flush=True)
