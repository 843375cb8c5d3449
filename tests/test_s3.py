"""A storage on a real S3 API, that of moto's server on loopback."""

import importlib.util
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from survival import wait_until
from test_clean import artefact

from kraken.storage import Storage
from pipelines import clean, local_head

pytestmark = pytest.mark.slow


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
