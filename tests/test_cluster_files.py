"""The files that describe clusters and images: Ray's validator accepts them, and they are closed where they should be.

The Kubernetes manifests were checked against KubeRay's published resource definitions (v1). The names of fields that
they use are listed here, so that a misspelt one is noticed without those.
"""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import serve.unavailable
from kraken.config import ServeConfig
from serve.app import ServeArgs

ROOT = Path(__file__).parent.parent
LAUNCHER_FILES = ("ray_cluster.yaml", "ray_cluster_local.yaml")
MANIFESTS = sorted(path.name for path in (ROOT / "kubernetes").glob("*.yaml"))
DOCKERFILES = sorted(path.name for path in (ROOT / "docker").glob("*.Dockerfile"))
CLUSTER_FIELDS = {
    *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "gcsFaultToleranceOptions"),
    *("headGroupSpec", "workerGroupSpecs"),
}
FIELDS = {
    "RayCluster": CLUSTER_FIELDS,
    "RayJob": {
        *("entrypoint", "runtimeEnvYAML", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"),
        "rayClusterSpec",
    },
    "RayService": {
        *("serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold", "serveConfigV2"),
        "rayClusterConfig",
    },
}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def launcher(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return content


def manifests(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "kubernetes" / name).read_text()))


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod specification in a manifest."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_ray_accepts_the_launchers_file(name: str) -> None:
    config = prepare_config(launcher(name))
    validate_config(config)
    assert config["cluster_name"] and config["head_node_type"] in config["available_node_types"]


SPOILT: dict[str, Callable[[dict[str, Any]], object]] = {
    "an unknown key": lambda config: config.update(dashboard="public"),
    "an unknown key of a node": lambda config: config["available_node_types"]["cpu"].update(spot=True),
    "GPUs as text": lambda config: config["available_node_types"]["gpu"]["resources"].update(GPU="8"),
    "no head": lambda config: config.update(head_node_type="master"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_ray_refuses_a_spoilt_one(fault: str) -> None:
    """Otherwise the test above could not fail."""
    config = copy.deepcopy(launcher("ray_cluster.yaml"))
    SPOILT[fault](config)
    with pytest.raises(Exception):  # noqa: B017 - Ray raises several kinds
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_nodes_ask_for_a_token_and_the_dashboard_stays_inside(name: str) -> None:
    config = launcher(name)
    commands = {kind: " ".join(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker")}
    for command in commands.values():
        assert "RAY_AUTH_MODE=token" in command and "0.0.0.0" not in command
    assert "--dashboard-host 127.0.0.1" in commands["head"]
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]


def test_gpu_workers_have_eight_and_spot_comes_first() -> None:
    config = launcher("ray_cluster.yaml")
    types = config["available_node_types"]
    gpu = [name for name in types if types[name]["resources"].get("GPU")]
    assert gpu == ["gpu_spot", "gpu"] and all(types[name]["resources"]["GPU"] == 8 for name in gpu)
    markets = [types[name]["node_config"].get("InstanceMarketOptions", {}).get("MarketType") for name in gpu]
    assert markets == ["spot", None]
    assert config["idle_timeout_minutes"] > 0


def test_a_middleware_that_the_files_name_exists() -> None:
    texts = [(ROOT / name).read_text() for name in LAUNCHER_FILES]
    texts += [(ROOT / "kubernetes" / name).read_text() for name in MANIFESTS if name.startswith("ray_")]
    for text in texts:
        assert "serve.unavailable:proxy_middlewares" in text
    assert callable(serve.unavailable.proxy_middlewares)


@pytest.mark.parametrize("name", [name for name in MANIFESTS if name.startswith("ray_")])
def test_manifests_use_kuberays_fields(name: str) -> None:
    [manifest] = [each for each in manifests(name) if each["apiVersion"] == "ray.io/v1"]
    spec = manifest["spec"]
    assert set(spec) <= FIELDS[manifest["kind"]]
    cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    assert set(cluster) <= CLUSTER_FIELDS
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert set(cluster["headGroupSpec"]) <= GROUP_FIELDS
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= GROUP_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_service_serves_what_serve_can_build() -> None:
    [service] = [each for each in manifests("ray_service.yaml") if each["kind"] == "RayService"]
    [application] = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "serve.app:build"
    args = ServeArgs(**application["args"])
    assert isinstance(args.serve_config, ServeConfig) and args.serve_config.num_replicas == 2


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_not_root_and_hold_no_secret(name: str) -> None:
    for manifest in manifests(name):
        if manifest["kind"] == "Secret":
            assert manifest["metadata"]["name"] == "kraken-settings"
            assert all(not value or value == "s3://BUCKET/kraken" for value in manifest["stringData"].values())
        for pod in pods(manifest):
            assert pod["securityContext"]["runAsNonRoot"] is True
            for container in pod["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["resources"]["limits"]["memory"]
                image = container["image"]
                assert not image.endswith(":latest") and ":" in image
                for variable in container.get("env", ()):
                    if re.search("PASSWORD|KEY|SECRET", variable["name"]):
                        assert set(variable["valueFrom"]["secretKeyRef"]) == {"name", "key"}


def test_every_secret_that_is_read_is_in_the_example() -> None:
    [example] = manifests("secrets.example.yaml")
    used = {key for name in MANIFESTS for key in re.findall(r"kraken-settings, key: ([\w-]+)", _text(name))}
    assert used == set(example["stringData"])


def _text(name: str) -> str:
    return (ROOT / "kubernetes" / name).read_text()


@pytest.mark.parametrize("name", ["cpu.Dockerfile", "gpu.Dockerfile"])
def test_images_are_pinned_and_end_as_a_user(name: str) -> None:
    text = (ROOT / "docker" / name).read_text()
    assert re.search(r"^FROM python:3\.1[12]\.\d+-slim-\w+$", text, re.MULTILINE)
    assert re.findall(r"^USER (\w+)$", text, re.MULTILINE)[-1] == "1000"
    assert "constraints.txt" in text and ":latest" not in text
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "storage"} <= set(ignored)
