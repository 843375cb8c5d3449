"""Several nodes of Ray on this machine, for tests that lose one: `python nodes.py CPUS [CPUS ...]`, the head's first.

A process of its own, since a Cluster changes Ray's state in its process. Prints a line of JSON with the address and
each node's id and raylet, and another after each command on standard input: `kill INDEX`, `add CPUS`. With
NODES_FOLDER in the environment every node has a temporary folder of its own below it, so that nodes share no cache.
"""

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from ray._private.utils import get_ray_address_file
from ray.cluster_utils import Cluster


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def describe(node: Any) -> dict[str, Any]:
    return {"id": node.node_id, "raylet": node.all_processes["raylet"][0].process.pid}


def kill(node: Any) -> None:
    """All at once, as when a machine loses power."""
    processes = [psutil.Process(info.process.pid) for infos in node.all_processes.values() for info in infos]
    children = [child for process in processes for child in process.children(recursive=True)]
    for process in children + processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def own_folder() -> dict[str, Any]:
    """Options of a node that shares no temporary folder with the others."""
    if not (parent := os.environ.get("NODES_FOLDER")):
        return {}
    return {"env_vars": {"TMPDIR": tempfile.mkdtemp(prefix="node", dir=parent)}}


def main() -> None:
    folder = tempfile.mkdtemp(prefix="kn", dir="/tmp")
    options = {"object_store_memory": 80 * 2**20}
    head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": free_port(), "temp_dir": folder}
    # a Cluster notes its address there, and does not make the folder
    Path(get_ray_address_file(None)).parent.mkdir(exist_ok=True)
    first, *others = (int(cpus) for cpus in sys.argv[1:])
    cluster = Cluster(initialize_head=True, head_node_args={**options, **head, **own_folder(), "num_cpus": first})
    try:
        nodes = [cluster.head_node, *(cluster.add_node(num_cpus=cpus, **options, **own_folder()) for cpus in others)]
        while True:
            print(json.dumps({"address": cluster.address, "nodes": [describe(node) for node in nodes]}), flush=True)
            if not (words := sys.stdin.readline().split()):
                return
            command, number = words[0], int(words[1])
            if command == "kill":
                kill(nodes[number])
            else:
                nodes.append(cluster.add_node(num_cpus=number, **options, **own_folder()))
    finally:
        cluster.shutdown()
        for _ in range(20):  # its processes write to the last
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.1)


if __name__ == "__main__":
    main()
