"""What a machine's load is logged as, against the same numbers from the kernel's own files."""

import os
import socket
import sys
from pathlib import Path

import pytest

from pipelines.training.system_metrics import SystemMetrics


def test_a_machine_is_read_under_mlflows_names(tmp_path: Path) -> None:
    values = SystemMetrics("1/", str(tmp_path), is_first=True, gpu=None).read()
    assert 0 < values["system/1/system_memory_usage_percentage"] < 100
    assert values["system/1/disk_available_megabytes"] > 0
    assert values["system/1/network_receive_megabytes"] >= 0
    assert SystemMetrics("", str(tmp_path), is_first=False, gpu=None).read() == {}


@pytest.mark.skipif(sys.platform != "linux", reason="compares with the files of Linux's /proc")
def test_a_reading_agrees_with_the_kernels_own_numbers(tmp_path: Path) -> None:
    """The same numbers from /proc and statvfs, on a machine that others use too: hence the tolerances."""

    def received_and_sent() -> tuple[int, int]:
        interfaces = [line.split(":")[1].split() for line in Path("/proc/net/dev").read_text().splitlines()[2:]]
        return sum(int(fields[0]) for fields in interfaces), sum(int(fields[8]) for fields in interfaces)

    system_metrics = SystemMetrics("", str(tmp_path), is_first=True, gpu=None)
    before = received_and_sent()
    with socket.socket() as listener:  # 8 MB over loopback, which counts as received and as sent
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()) as client, listener.accept()[0] as server:
            for _ in range(128):
                client.sendall(bytes(2**16))
                server.recv(2**16, socket.MSG_WAITALL)
    values = system_metrics.read()
    after = received_and_sent()
    for name, start, end in zip(("receive", "transmit"), before, after, strict=True):
        assert values[f"system/network_{name}_megabytes"] == pytest.approx((end - start) / 1e6, rel=0.1, abs=0.5)

    lines = Path("/proc/meminfo").read_text().splitlines()
    kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":", 1) for line in lines)}
    used_mb = (kilobytes["MemTotal"] - kilobytes["MemAvailable"]) * 1024 / 1e6
    total_mb = kilobytes["MemTotal"] * 1024 / 1e6
    assert values["system/system_memory_usage_megabytes"] == pytest.approx(used_mb, abs=0.05 * total_mb)
    share = values["system/system_memory_usage_megabytes"] / total_mb * 100
    assert values["system/system_memory_usage_percentage"] == pytest.approx(share, rel=1e-3)

    disk = os.statvfs(tmp_path)
    assert values["system/disk_available_megabytes"] == pytest.approx(disk.f_bavail * disk.f_frsize / 1e6, rel=0.02)
