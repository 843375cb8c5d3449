"""Ending everything that a process started, however far it went away from its parent.

MPI starts its ranks through a daemon of its own, in other sessions and process groups, so that neither a group nor a
parent finds them all. A mark in the environment does: children inherit it.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

MARK = "KRAKEN_TRTLLM_TREE"
"""Variable that every process of one engine carries, with a value of its own."""


def environments(value: str) -> dict[int, dict[str, str]]:
    """Process id -> environment of every living process that carries the mark, this one left out."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            lines = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            variables = dict(line.partition("=")[::2] for line in lines if line)
            if variables.get(MARK) == value:
                found[int(folder.name)] = variables
    return found


def marked(value: str) -> list[int]:
    """Ids of the living processes that carry the mark, this one left out."""
    return list(environments(value))


def end_marked(value: str, timeout_s: float = 10.0) -> list[int]:
    """Kill every process that carries the mark, and those they start meanwhile.

    Returns:
        Ids that still live after the time limit; empty as a rule.
    """
    deadline = time.monotonic() + timeout_s
    while (left := marked(value)) and time.monotonic() < deadline:
        for process_id in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process_id, signal.SIGKILL)
        time.sleep(0.05)
    return left


def end_own_tree() -> None:
    """Kill every other process of the tree that this one belongs to."""
    if value := os.environ.get(MARK):
        end_marked(value)
