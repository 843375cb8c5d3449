"""What several test modules share: one small Ray cluster on loopback, the tokens of a tiny corpus, one thread."""

import functools
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

if not torch.cuda.is_available():
    # Before anything imports Triton: what it is made of is made for its interpreter, or not, at that moment.
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).parent
_CLUSTER = "ray_cluster"
"""The fixture that starts Ray."""

RAY_ENVIRONMENT = {
    # Serve kills a proxy that is not ready after five seconds, which a busy machine needs for its imports alone.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray starts its workers with niceness 15, with which they hardly run while another test worker is busy.
    "RAY_worker_niceness": "0",
    "HF_HUB_OFFLINE": "1",
}


def find_free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class _Scheduling(LoadScopeScheduling):
    """Keeps tests on one of several workers that share fixtures: those of a file, and those of all files that use the
    Ray cluster, which is then started once."""

    def _split_scope(self, nodeid: str) -> str:
        name = nodeid.partition("::")[0]
        return _CLUSTER if _uses_cluster(TESTS.parent / name) else name


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> _Scheduling:
    return _Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of the Ray cluster, which take longest, where others can run beside them."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1800))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not _uses_cluster(item.path))


@functools.cache
def _uses_cluster(path: Path) -> bool:
    return _CLUSTER in path.read_text()


@pytest.fixture(autouse=True, scope="session")
def _cores_are_shared() -> None:
    """Workers beside each other use one thread each, or they would fight for the cores."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    return find_free_port


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Ray with two CPUs; gives its address. Everything in it finds the repository and the tests by import."""
    import ray

    # Short: Ray puts Unix sockets below it, whose paths end at about 100 characters.
    folder = tempfile.mkdtemp(prefix="kr", dir="/tmp")
    paths = [str(TESTS.parent), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        # Before ray.init: the cluster's processes inherit it.
        for name, value in (RAY_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)}).items():
            patch.setenv(name, value)
        ray.init(
            num_cpus=2,
            include_dashboard=True,  # Ray Train cleans up through it
            dashboard_host="127.0.0.1",
            dashboard_port=find_free_port(),
            log_to_driver=False,
            object_store_memory=100 * 2**20,
            _temp_dir=folder,
        )
        try:
            yield ray.get_runtime_context().gcs_address
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus, prepared."""
    import tiny

    folder = tmp_path_factory.mktemp("tiny") / "data"
    tiny.prepared(folder)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums must not depend on how many threads share them, and processes of a mesh not fight for cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
