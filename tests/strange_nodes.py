"""What the preflight's task might find on nodes that are not as they should be; light, since nodes import it."""

import time

from pipelines.preflight import Probe
from pipelines.preflight import _look as look


def unshared(probe: Probe, node: str) -> tuple[str, int]:
    """A node on which the storage is another folder of the same name."""
    return look(Probe("/nonexistent/storage", "probe"), node)


def forgetful(probe: Probe, node: str) -> tuple[str, int]:
    """A node whose writes stay there."""
    return "", 0


def silent(probe: Probe, node: str) -> tuple[str, int]:
    """A node that does not answer in time."""
    time.sleep(60)
    return "", 0


def late(probe: Probe, node: str) -> tuple[str, int]:
    """A good node that takes its time."""
    time.sleep(2)
    return look(probe, node)
