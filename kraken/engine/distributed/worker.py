"""A worker: a rank other than 0, which loads its part of the model and runs the steps that rank 0 sends.

`python -m kraken.engine.distributed.worker` is a worker that rank 0 has started. A process that exists already, for
example a Ray actor, calls `run_worker`.
"""

import contextlib
import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

import torch
from torch._C._distributed_c10d import Store, TCPStore

from kraken.engine.batch import GraphSizes, StepBatch
from kraken.engine.distributed.control_channel import Connection, ConnectionLost, Kind
from kraken.engine.distributed.device_group import DeviceGroup
from kraken.engine.distributed.partition import Part, empty_weights
from kraken.engine.distributed.rendezvous import JoinToken, connect
from kraken.engine.distributed.setup import RankSetup, WeightSource, device_of
from kraken.engine.model.network import Network
from kraken.engine.model_runner import ModelRunner


def run_worker(token: JoinToken, group_type: type[DeviceGroup] = DeviceGroup) -> None:
    """Be a worker of an engine until rank 0 ends it.

    Raises:
        ConnectionLost: rank 0 is gone.
        Exception: this rank failed, and has sent rank 0 the reason.
    """
    connection = connect(token)
    group: DeviceGroup | None = None
    runner: ModelRunner | None = None
    try:
        setup = RankSetup.from_json(connection.receive_json())
        network, store = _load(connection, token.rank, setup, group_type)
        group = network.group
        if network.device.type == "cuda":
            setup.choose_backend(store, network)
            connection.send_json({"ready": True})
        cache = connection.receive_json()
        runner = ModelRunner(network, cache["num_blocks"], cache["tokens_per_block"])
        connection.send_json({"ready": True})
        if cache["graph_sizes"] is not None:
            runner.capture_graphs(GraphSizes(**cache["graph_sizes"]))
        while (frame := connection.receive(spins=runner.is_asynchronous))[0] is Kind.STEP:
            runner.forward(StepBatch.from_bytes(frame[1]))
    except ConnectionLost:
        if runner is not None:
            runner.drop_graphs()  # otherwise NCCL would wait for them
        if group is not None:
            group.abort()  # otherwise this device would wait for that of rank 0
        raise
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send_json({"error": f"{type(error).__name__}: {error}"})
        raise
    finally:
        connection.close()
        if runner is not None:
            runner.close()


def _load(connection: Connection, rank: int, setup: RankSetup, group_type: type[DeviceGroup]) -> tuple[Network, Store]:
    """Join the group and load this rank's weights."""
    torch.set_num_threads(setup.num_threads)
    part = Part(setup.model, rank, setup.size)
    device = device_of(rank, setup.size, setup.device, on_one_host=False)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = TCPStore(setup.store_host, setup.store_port, None, False, timedelta(seconds=setup.timeout_s))
    group = setup.join(store, rank, connection.local_address, device, group_type)
    if setup.is_sent:
        assert group.process_group is not None
        weights = empty_weights(part, setup.torch_dtype, device)
        for _, weight in sorted(weights.items()):
            group.process_group.receive(weight, 0)
    else:
        source = WeightSource(config=setup.model, folder=None if setup.folder is None else Path(setup.folder))
        weights = source.weights(part, setup.torch_dtype, device)
    network = Network(part, weights, setup.num_ids, group, setup.quantization)
    connection.send_json({"ready": True})
    return network, store


def main(group_type: type[DeviceGroup] = DeviceGroup) -> None:
    """A worker that rank 0 has started: its token is a line of stdin, and stdin ends when rank 0 does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which then ends the workers
    token = JoinToken.from_json(sys.stdin.readline())
    threading.Thread(target=_exit_with_rank_0, daemon=True).start()
    status = 0
    try:
        run_worker(token, group_type)
    except Exception:  # rank 0 reports it
        status = 1
    os._exit(status)  # an orderly exit would wait for what is left in a process group


def _exit_with_rank_0() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
