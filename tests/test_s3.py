"""The whole pipeline on a real S3 API, that of moto's server on loopback: nodes that share nothing but the bucket.

Training is killed on the way (SIGKILL of its driver); what the bucket then holds is whole, and the same command goes on
to two replicas on two nodes.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from survival import ROOT, Driver, Nodes, Server, wait_until
from test_clean import artefact

from kraken.storage import Storage
from pipelines import clean, local_head
from pipelines.registry import Registry

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SETTINGS = {
    "cluster__num_workers": 1,
    "serve__cpus_per_replica": 1,
    "serve__num_replicas": 2,
    "evaluate__max_windows": 4,
    "evaluate__parity_windows": 2,
    "evaluate__parity_tokens": 4,
}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, free_port: Callable[[], int]) -> Iterator[str]:
    """URI of a storage in a bucket of a server that lives as long as the test."""
    assert importlib.util.find_spec("moto"), "moto is a development dependency: see pyproject.toml"
    port = free_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def make() -> bool:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/kraken", method="PUT")
        try:
            return bool(urllib.request.urlopen(request, timeout=5).status == 200)
        except OSError:
            return False

    try:
        wait_until(make)
        yield f"s3://kraken/storage?scheme=http&endpoint_override=127.0.0.1:{port}"
    finally:
        local_head.end_tree(server.pid)
        server.wait(30)


@pytest.fixture
def nodes(bucket: str, tmp_path: Path) -> Iterator[Nodes]:
    """A head without CPUs and two nodes, each with a cache of its own; the environment holds the keys to the bucket."""
    (tmp_path / "nodes").mkdir()
    cluster = Nodes(0, 1, 1, folder=tmp_path / "nodes")
    yield cluster
    cluster.stop()


def finished(storage: Storage) -> set[str]:
    """Artefacts and checkpoints with a manifest, all of whose files are there with their sizes."""
    found = set()
    for kind in ("prepare", "pretrain", "convert", "evaluate", "deploy"):
        for folder in storage.list_folders(storage.root / kind):
            for place in [folder, *storage.list_folders(folder)]:
                if storage.read_text(place / "manifest.json") is not None:
                    storage.read_manifest(place)
                    found.add(place.relative_to(storage.root).as_posix())
    return found


def test_a_bucket_is_cleaned_as_a_folder_is(bucket: str, tmp_path: Path) -> None:
    writer, reader = (Storage(bucket, cache=tmp_path / name) for name in ("writer", "reader"))
    for digit in "12":
        for kind, parents in (("prepare", ()), ("pretrain", ("prepare",)), ("convert", ("prepare", "pretrain"))):
            writer.publish(artefact(writer.root, kind, digit, **dict.fromkeys(parents, digit)))
    damaged = writer.root / "pretrain" / ("1" * 16) / "step_000000004.damaged" / "rest"
    damaged.parent.mkdir()
    damaged.write_bytes(bytes(10))
    writer.publish_files([damaged])
    survey = clean.survey(reader, [f"convert/{'1' * 16}"])
    assert {(item.what, item.name.partition("/")[2]) for item in survey.items} == {
        ("unreferenced", "2" * 16),
        ("damaged", f"{'1' * 16}/step_000000004.damaged"),
    }
    assert all(item.age_s < 600 for item in survey.items)
    assert reader.find("convert", "2" * 64) is not None
    clean.remove(reader, survey.items, lambda item: None)
    assert not clean.survey(reader, [f"convert/{'1' * 16}"]).items
    assert reader.find("convert", "2" * 64) is None and not (reader.root / "convert" / ("2" * 16)).exists()
    another = Storage(bucket, cache=tmp_path / "another")
    assert another.find("convert", "1" * 64) is not None and another.find("convert", "2" * 64) is None


def test_the_whole_pipeline_on_s3(bucket: str, nodes: Nodes, tmp_path: Path, free_port: Callable[[], int]) -> None:
    server, port = Server(tmp_path, free_port()), free_port()
    (tmp_path / "driver").mkdir()
    environment = {"MLFLOW_TRACKING_URI": server.uri, "TMPDIR": str(tmp_path / "driver")}
    try:
        first = Driver(nodes.address, bucket, environment, job="end_to_end", serve__port=port, **SETTINGS)
        first.wait_for_step(45)
        first.process.kill()
        first.wait()
        storage = Storage(bucket, cache=tmp_path / "reader")
        before = finished(storage)
        assert any(name.startswith("prepare/") for name in before)
        assert any("/step_" in name for name in before), before
        assert not any(name.startswith(("convert/", "deploy/")) for name in before)

        second = Driver(nodes.address, bucket, environment, job="end_to_end", serve__port=port, **SETTINGS)
        assert second.wait(400) == 0, second.output
        assert second.steps[0] > 20, "it goes on from a checkpoint in the bucket"
        assert {name.partition("/")[0] for name in finished(storage)} == {
            *("prepare", "pretrain", "convert", "evaluate", "deploy")
        }
        assert not list((tmp_path / "nodes").glob("*/storage")), "nothing is written beside the bucket"
        replicas = {str(path.parents[4]) for path in (tmp_path / "nodes").glob("*/kraken-*/*/convert/*/manifest.json")}
        assert len(replicas) == 3, "both nodes have fetched the model, and the head, which deploys it"
        body = json.dumps({"model": "kraken", "prompt": "a", "max_tokens": 2}).encode()
        for _ in range(8):  # to both
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=30) as response:
                assert response.status == 200

        (tmp_path / "another").mkdir()
        generate = [sys.executable, "-m", "jobs.generate", "models:/kraken@champion", "--storage", bucket]
        result = subprocess.run(
            [*generate, "--prompt", "a", "--max-tokens", "2"],
            cwd=ROOT,
            env={**os.environ, **environment, "TMPDIR": str(tmp_path / "another")},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0 and "tokens, TTFT" in result.stderr, result.stderr

        registry = Registry(bucket, server.uri)
        referred = clean.references(bucket, registry)
        assert not clean.survey(storage, referred, now=time.time() + 1e6).items, "everything is in use"
        survey = clean.survey(storage, [name for name in referred if name.startswith("prepare/")])
        kinds = {item.name.partition("/")[0] for item in survey.items}
        assert kinds == {"pretrain", "convert", "evaluate", "deploy"}
        clean.remove(storage, survey.items, lambda item: None)
        assert {name.partition("/")[0] for name in finished(storage)} == {"prepare"}
    finally:
        server.stop()
