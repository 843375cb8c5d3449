"""Stage 5, deploy: the converted model behind an OpenAI-compatible endpoint; refused unless parity passed."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from kraken.config import ConfigError, RunConfig, ServeConfig
from kraken.engine.choose import choose
from kraken.manifest import ArtefactError, Manifest, Metric
from pipelines import cluster
from pipelines.local_cluster import require_bindable
from pipelines.stage import Outcome, Stage, Work, section_of
from pipelines.training.placement import ROUNDING

APPLICATION = "kraken"
HTTP_TIMEOUT_S = 5.0


def endpoint_url(serve: ServeConfig) -> str:
    """Base URL of the endpoint; where it listens on every address, with the one by which the cluster knows the head."""
    host = serve.host
    if host in ("0.0.0.0", "::"):
        host = cluster.head_node()["NodeManagerAddress"] if ray.is_initialized() else "127.0.0.1"
    return f"http://[{host}]:{serve.port}" if ":" in host else f"http://{host}:{serve.port}"


def health(serve: ServeConfig) -> dict[str, Any] | None:
    """What the endpoint says of itself; None when nothing of ours answers."""
    try:
        with urllib.request.urlopen(f"{endpoint_url(serve)}/health", timeout=HTTP_TIMEOUT_S) as response:
            answer = json.load(response)
            return answer if isinstance(answer, dict) else None
    except (OSError, ValueError):
        return None


def is_serving(config: RunConfig, manifest: Manifest) -> bool:
    """Whether the endpoint answers, healthy, with the very model that a deploy manifest records."""
    answer = cluster.call_on_head(health, config.serve) if ray.is_initialized() else health(config.serve)
    return (
        answer is not None
        and answer.get("status") == "ok"
        and answer.get("model") == config.serve.model_name
        and answer.get("exchange_fingerprint") == manifest.parents["convert"]
    )


def work(work: Work) -> Outcome:
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions

    from kraken.trtllm.proof import require_proven
    from serve.app import ServeArgs, build

    evaluation = work.parents["evaluate"]
    if evaluation.value("parity_passed") != 1.0:
        raise ArtefactError(
            f"deployment is refused: parity failed, the engine's log-probabilities differ from the trainer's by "
            f"{evaluation.value('parity_max_abs_diff'):.2e} and {evaluation.value('parity_tokens_different'):.0f} "
            "greedy tokens differ; raise evaluate.parity_tolerance only if the engine computes in a lower precision"
        )
    require_proven(work.parents["convert"])
    serve_config = work.config.serve
    require_free_port(serve_config)
    ray_serve.start(
        http_options=HTTPOptions(host=serve_config.host, port=serve_config.port),
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    args = ServeArgs(
        exchange=work.parent_location("convert"), engine_config=work.config.engine, serve_config=serve_config
    )
    ray_serve.run(build(args), name=APPLICATION, route_prefix="/")
    url = endpoint_url(serve_config)
    answer = health(serve_config)
    if answer is None or answer.get("exchange_fingerprint") != work.parents["convert"].fingerprint:
        raise ArtefactError(
            f"the endpoint at {url} does not answer with the new model; see the Serve logs of the cluster"
        )
    return {"replicas": Metric(serve_config.num_replicas, "replicas")}, {
        "endpoint": f"{url}/v1",
        "model_name": serve_config.model_name,
        "engine": answer["engine"],
    }


def require_possible(config: RunConfig) -> None:
    """Refuse before any work what the stage would refuse in the end; called by the driver, connected to the cluster.

    Raises:
        ConfigError: the API key is empty, the port is taken, the engine cannot run, or no node has room for a replica.
    """
    from serve.app import api_key_sha256, find_serving_machine

    api_key_sha256()
    cluster.call_on_head(require_free_port, config.serve)
    require_room(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    if config.engine.overlap == "none":
        raise ConfigError(
            "engine.overlap=none leaves out the sums between devices, so that every answer is wrong: it is for "
            "benchmarks only; choose overlapped or blocking"
        )
    if config.engine.kind == "tensorrt_llm":
        num_ways = config.model.num_ways
        choose("tensorrt_llm", num_ways, config.convert.tensorrt_llm, find_serving_machine(num_ways))


def require_room(config: RunConfig, nodes: Sequence[Mapping[str, float]]) -> None:
    """Compare what the replicas reserve with what the nodes have, free or not; Serve would wait for room for ever.

    Args:
        nodes: every node's resources, by Ray's names.
    """
    serve = config.serve
    if config.engine.device == "cuda" and not any(node.get("GPU", 0.0) for node in nodes):
        raise ConfigError("engine.device=cuda needs a GPU, and no node of the cluster has one; choose cpu or auto")
    needs = {
        "CPU": ("serve.cpus_per_replica", serve.cpus_per_replica),
        "GPU": ("serve.gpus_per_replica", serve.gpus_per_replica),
    }
    rooms = [
        min((int((node.get(name, 0.0) + ROUNDING) // need) for name, (_, need) in needs.items() if need), default=None)
        for node in nodes
    ]
    counted = [room for room in rooms if room is not None]
    if len(counted) == len(rooms) and sum(counted) < serve.num_replicas:
        each = " and ".join(f"{setting}={need:g}" for setting, need in needs.values() if need)
        have = ", ".join(f"{sum(node.get(name, 0.0) for node in nodes):g} {name}s" for name in needs)
        raise ConfigError(
            f"serve.num_replicas={serve.num_replicas} with {each} need more than the cluster has ({have} on "
            f"{len(nodes)} nodes, room for {sum(counted)} replicas); lower one of them, or add nodes"
        )


def require_free_port(serve: ServeConfig) -> None:
    """Called on the head, where Serve's proxy listens.

    Raises:
        ConfigError: another program listens on the port, or Serve runs on another one.
    """
    from ray import serve as ray_serve

    running = ray_serve.status().proxies
    if running:
        if health(serve) is None:
            raise ConfigError(
                f"serve.port={serve.port}: this cluster already serves on another address, and has one HTTP port; "
                "use that port, or stop the cluster first (make stop)"
            )
        return
    require_bindable(serve)


def complete(url: str, body: dict[str, Any]) -> str:
    """The text of a completion over HTTP.

    Raises:
        ArtefactError: the endpoint refuses or does not answer.
    """
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("KRAKEN_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return str(json.load(response)["choices"][0]["text"])
    except (OSError, ValueError, KeyError, IndexError) as error:
        detail = error.read().decode(errors="replace")[:300] if isinstance(error, urllib.error.HTTPError) else error
        raise ArtefactError(f"the endpoint at {url} did not complete a prompt: {detail}") from error


STAGE = Stage(
    "deploy",
    parents=("convert", "evaluate"),
    section=section_of("serve", "engine"),
    work=work,
    still_valid=is_serving,
)
