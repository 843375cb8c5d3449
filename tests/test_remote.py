"""A remote storage on nodes that share no folder: every stage, the replicas and the command lines fetch what they need.

The storage is a `file://` URI, which every node opens like `s3://`, and every node has a temporary folder, and so a
cache of the storage, of its own. The head has no CPU, so that the driver and the work are on different nodes.
"""

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from survival import ROOT, Driver, Nodes, wait_until

from kraken.manifest import Manifest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    (tmp_path / "nodes").mkdir()
    cluster = Nodes(0, 2, folder=tmp_path / "nodes")
    yield cluster
    cluster.stop()


def ask(port: int, limit_s: float) -> tuple[int, str | None, str]:
    """Status, Retry-After and body of a completion; fails when no answer comes within the limit."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=limit_s)
    body = json.dumps({"model": "kraken", "prompt": "a", "max_tokens": 2})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.headers["Retry-After"], response.read().decode()


def test_the_whole_pipeline_where_nothing_is_shared(nodes: Nodes, tmp_path: Path, free_port: Callable[[], int]) -> None:
    port, storage = free_port(), (tmp_path / "remote").as_uri()
    (tmp_path / "driver").mkdir()
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "TMPDIR": str(tmp_path / "driver")}
    driver = Driver(
        nodes.address,
        storage,
        environment,
        job="end_to_end",
        cluster__num_workers=1,
        serve__port=port,
        serve__cpus_per_replica=1,
        evaluate__max_windows=4,
        evaluate__parity_windows=2,
        evaluate__parity_tokens=4,
        train__steps=20,
    )
    assert driver.wait(400) == 0, driver.output
    [convert] = (tmp_path / "remote" / "convert").iterdir()
    Manifest.read(convert).verify(convert)
    assert ask(port, 20)[0] == 200

    generate = [sys.executable, "-m", "jobs.generate", f"{storage}/convert/{convert.name}", "--prompt", "a"]
    (tmp_path / "another").mkdir()
    result = subprocess.run(
        generate,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path / "another")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0 and "tokens, TTFT" in result.stderr, result.stderr

    nodes.do("kill 1")  # the only replica's
    wait_until(lambda: ask(port, 20)[0] == 503)
    status, retry_after, body = ask(port, 20)
    assert (status, retry_after) == (503, "5") and "no replica of this model is ready" in body
    nodes.do("add 2")  # has never seen the model
    started_at = time.monotonic()
    while (answer := ask(port, 20))[0] != 200:
        assert answer[:2] in ((503, "5"), (500, None)), answer
        assert time.monotonic() - started_at < 120, answer
    caches = list((tmp_path / "nodes").glob(f"*/kraken-*/*/convert/{convert.name}/manifest.json"))
    assert len(caches) >= 2
