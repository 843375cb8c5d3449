"""What belongs to the model that runs now."""

import contextlib
from collections.abc import Iterator
from typing import Any

_running: list[dict[str, Any]] = []


@contextlib.contextmanager
def model_extra_attrs(attrs: dict[str, Any]) -> Iterator[None]:
    _running.append(attrs)
    try:
        yield
    finally:
        _running.pop()


def get_model_extra_attrs() -> dict[str, Any]:
    return _running[-1]
