"""Stage 5, deploy: the converted model behind an OpenAI-compatible endpoint; refused unless parity passed."""

import json
import os
import socket
import urllib.error
import urllib.request
from typing import Any

from kraken.config import ConfigError, RunConfig, ServeConfig
from kraken.manifest import ArtefactError, Manifest, Metric
from pipelines.stage import Outcome, Stage, Work, section_of

APPLICATION = "kraken"
HTTP_TIMEOUT_S = 5.0


def endpoint_url(serve: ServeConfig) -> str:
    """Base URL of the endpoint, for clients on this machine when it listens on every address."""
    host = "127.0.0.1" if serve.host in ("0.0.0.0", "::") else serve.host
    return f"http://{host}:{serve.port}"


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
    answer = health(config.serve)
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
        exchange=work.parent_folder("convert"), engine_config=work.config.engine, serve_config=serve_config
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


def require_free_port(serve: ServeConfig) -> None:
    """Raises:
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
    family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((serve.host, serve.port))
        except OSError as error:
            raise ConfigError(
                f"serve.port={serve.port} on serve.host={serve.host} cannot be used ({error.strerror}); "
                f"choose another, for example --serve.port {serve.port + 1}"
            ) from error


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
