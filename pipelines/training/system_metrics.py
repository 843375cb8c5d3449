"""Load of a machine while it trains, under the names by which MLflow's UI shows system metrics.

Workers report them with their training metrics, so that the controller alone writes to MLflow and a restart logs no
step twice.
"""

import psutil

MEGABYTE = 1e6


class SystemMetrics:
    """Reads this process's machine, and its GPU; rates are since the reading before.

    Args:
        prefix: names the machine where there are several.
        disk: a folder on the disk to watch.
        is_first: whether this process speaks for its machine; the others speak for their GPU only.
        gpu: index of this process's GPU on its machine, None without one.
    """

    def __init__(self, prefix: str, disk: str, is_first: bool, gpu: int | None):
        self._prefix, self._disk, self._is_first, self._gpu = f"system/{prefix}", disk, is_first, gpu
        psutil.cpu_percent()  # the first reading is 0
        self._network = psutil.net_io_counters()

    def read(self) -> dict[str, float]:
        """Name -> value, in the unit at the end of the name."""
        values = {**(self._machine() if self._is_first else {}), **self._device()}
        return {self._prefix + name: value for name, value in values.items()}

    def _machine(self) -> dict[str, float]:
        memory, disk, before = psutil.virtual_memory(), psutil.disk_usage(self._disk), self._network
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / MEGABYTE,
        }
        self._network = now = psutil.net_io_counters()
        if before and now:  # a container may have no network
            values["network_receive_megabytes"] = (now.bytes_recv - before.bytes_recv) / MEGABYTE
            values["network_transmit_megabytes"] = (now.bytes_sent - before.bytes_sent) / MEGABYTE
        return values

    def _device(self) -> dict[str, float]:
        if self._gpu is None:
            return {}
        import torch

        free, total = torch.cuda.mem_get_info()
        return {
            f"gpu_{self._gpu}_memory_usage_megabytes": (total - free) / MEGABYTE,
            f"gpu_{self._gpu}_memory_usage_percentage": (total - free) / total * 100,
        }
