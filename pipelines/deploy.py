"""Stage 5, deploy: the converted model behind an OpenAI-compatible endpoint; refused unless it passes its gates.

A model that passes them becomes a version of the registry, and its champion once the endpoint answers.

A deployment is reused only where the endpoint itself shows the digest of the model, every setting, the code and the
owner, and lets in exactly those who should come in.
"""

import hashlib
import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray

import kraken
from kraken.choose_engine import choose
from kraken.config import ConfigError, RunConfig, ServeConfig
from kraken.manifest import ArtefactError, Manifest, Metric, library_versions, make_fingerprint
from pipelines import cluster
from pipelines.application import claimed, http_address, owner_of, require_no_others, require_own_name
from pipelines.approval import approve
from pipelines.identity import determining
from pipelines.local_cluster import require_bindable
from pipelines.stage import Outcome, Stage, Work, section_of
from pipelines.training.placement import ROUNDING
from serve.api_key import ApiKey, api_key

Q = TypeVar("Q")
T = TypeVar("T")

HTTP_TIMEOUT_S = 5.0
SWITCH_LIMIT_S = 30.0
"""How long Serve's proxies may take to send requests to the new replicas only."""
SERVED_CODE = ("kraken", "serve")
"""Folders whose code replicas run."""


def endpoint_url(serve: ServeConfig) -> str:
    """Base URL of the endpoint; where it listens on every address, with the one by which the cluster knows the head."""
    host = serve.host
    if host in ("0.0.0.0", "::"):
        host = cluster.head_node()["NodeManagerAddress"] if ray.is_initialized() else "127.0.0.1"
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{serve.port}{serve.route_prefix.rstrip('/')}"


def health(serve: ServeConfig, key: ApiKey | None = None) -> dict[str, Any] | None:
    """The endpoint's description of itself, which is short without its key; None if no endpoint of this project
    answers."""
    request = urllib.request.Request(f"{endpoint_url(serve)}/health", headers=authorization(key))
    try:
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as response:
            answer = json.load(response)
            return answer if isinstance(answer, dict) else None
    except (OSError, ValueError):
        return None


served_section = section_of("serve", "engine", "gates")
"""Settings that determine the deployment."""


def deployment_digest(config: RunConfig, exchange_fingerprint: str) -> str:
    """Digest of everything that decides what an endpoint serves, how, and for whom, except its key."""
    section = determining("deploy", served_section(config)) | {
        "libraries": library_versions(),
        "owner": owner_of(config).id,
    }
    return make_fingerprint("deployment", section, {"convert": exchange_fingerprint, "code": code_digest()})


def code_digest() -> str:
    """Digest of the code that a replica runs; it also differs where two checkouts of one commit do."""
    root = Path(kraken.__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for folder in SERVED_CODE:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".c", ".html"):
                content = path.read_bytes()
                digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
                digest.update(content)
    return digest.hexdigest()


def is_serving(config: RunConfig, manifest: Manifest) -> bool:
    """Whether the endpoint answers, healthy, as this config would deploy it, and lets in whom it should."""
    args = config.serve, deployment_digest(config, manifest.parents["convert"]), api_key()
    return (cluster.call_on_head(difference, *args) if ray.is_initialized() else difference(*args)) is None


def difference(serve: ServeConfig, digest: str, key: ApiKey | None) -> str | None:
    """The difference between the endpoint and a deployment with its clients' key, in words; None if there is none."""
    answer = health(serve, key)
    if answer is None:
        return "it does not answer"
    if answer.get("status") != "ok":
        return f"its status is {answer.get('status')}"
    if answer.get("deployment") != digest:
        return "it serves another deployment"
    return wrong_access(serve, key)


def wrong_access(serve: ServeConfig, key: ApiKey | None) -> str | None:
    """The client that is let in or refused wrongly, in words, found by requests; None if there is none."""
    if key is None:
        status = status_of_models(serve, None)
        return None if status == 200 else f"a request without a key gets status {status}, and no key is configured"
    wanted = (
        ("without a key", None, 401),
        ("with a wrong key", ApiKey(secrets.token_urlsafe()), 401),
        ("with the right key", key, 200),
    )
    for which, shown, status in wanted:
        if (found := status_of_models(serve, shown)) != status:
            return f"a request {which} gets status {found} instead of {status}"
    return None


def status_of_models(serve: ServeConfig, key: ApiKey | None) -> int | None:
    """HTTP status of a request for the list of models; None without an answer."""
    request = urllib.request.Request(f"{endpoint_url(serve)}/v1/models", headers=authorization(key))
    try:
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None


def authorization(key: ApiKey | None) -> dict[str, str]:
    """The header that shows a key."""
    return {} if key is None else {"Authorization": f"Bearer {key.value}"}


def work(work: Work) -> Outcome:
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions

    from kraken.trtllm.proof import require_proven
    from serve.app import ServeArgs, build

    approval = approve(work, partial(call_as_evaluation, work.config))
    require_proven(work.parents["convert"])
    serve_config = work.config.serve
    owner = owner_of(work.config)
    require_own_name(serve_config, owner)
    if (address := http_address()) and address[1] == serve_config.port and address[0] != serve_config.host:
        # Serve cannot move: it would go on listening on the old address and only warn.
        require_no_others(
            owner, f"serve.host={serve_config.host}: this cluster serves on {address[0]}, and must be restarted to move"
        )
        ray_serve.shutdown()
    require_free_port(serve_config)
    ray_serve.start(
        http_options=HTTPOptions(host=serve_config.host, port=serve_config.port),
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    digest = deployment_digest(work.config, work.parents["convert"].fingerprint)
    args = ServeArgs(
        exchange=work.parent_location("convert"),
        engine_config=work.config.engine,
        serve_config=serve_config,
        deployment=digest,
    )
    application = build(args)
    with claimed(serve_config, owner):
        ray_serve.run(application, name=serve_config.name, route_prefix=serve_config.route_prefix)
    answer = wait_until_served(serve_config, digest)
    endpoint = f"{endpoint_url(serve_config)}/v1"
    approval.promote(work, endpoint)
    return {"replicas": Metric(serve_config.num_replicas, "replicas")}, {
        "endpoint": endpoint,
        "model_name": serve_config.model_name,
        "engine": answer["engine"],
        **approval.details,
    }


def call_as_evaluation(config: RunConfig, function: Callable[[Q], T], question: Q) -> T:
    """Call a function in a task with the resources of an evaluation, where its engine has a device."""
    options: dict[str, Any] = {"name": "compare", **cluster.stage_resources(config, "evaluate")}
    task: Any = ray.remote(max_retries=0)(function).options(**options)
    result: T = cluster.result_of(task.remote(question))
    return result


def require_possible(config: RunConfig) -> None:
    """Refuse before any work what the stage would refuse in the end; called by the driver, connected to the cluster.

    Raises:
        ConfigError: the API key is empty, the name or the port is taken, the engine cannot run, or no node has room for
            a replica.
    """
    from serve.app import find_serving_machine

    api_key()
    require_own_name(config.serve, owner_of(config))
    cluster.call_on_head(require_free_port, config.serve)
    require_room(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
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


def wait_until_served(serve: ServeConfig, digest: str) -> dict[str, Any]:
    """Wait until the endpoint is this deployment and lets in the right clients; returns its description of itself.

    Raises:
        ArtefactError: it is not, after the time that Serve may take to switch over.
    """
    deadline = time.monotonic() + SWITCH_LIMIT_S
    while (wrong := difference(serve, digest, api_key())) and time.monotonic() < deadline:
        time.sleep(0.2)
    answer = health(serve, api_key())
    if wrong or answer is None:
        raise ArtefactError(
            f"the endpoint at {endpoint_url(serve)} is not what was deployed: {wrong}; see the Serve logs of the "
            "cluster"
        )
    return answer


def require_free_port(serve: ServeConfig) -> None:
    """Called on the head, where Serve's proxy listens.

    Raises:
        ConfigError: another program listens on the port, or Serve runs on another one.
    """
    from ray import serve as ray_serve

    if ray_serve.status().proxies:
        address = http_address()
        if address is not None and address[1] != serve.port:
            raise ConfigError(
                f"serve.port={serve.port}: this cluster already serves on port {address[1]}, and has one HTTP port; "
                f"use --serve.port {address[1]}, or stop the cluster first (make stop)"
            )
        return
    require_bindable(serve)


def complete(url: str, body: dict[str, Any]) -> str:
    """The text of a completion over HTTP.

    Raises:
        ArtefactError: the endpoint refuses or does not answer.
    """
    headers = {"Content-Type": "application/json"} | authorization(api_key())
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
    section=served_section,
    work=work,
    still_valid=is_serving,
)
