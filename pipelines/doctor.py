"""The part of the doctor that needs Ray: a model served by TensorRT-LLM in a Serve replica, and what is left of it."""

import dataclasses
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from kraken.config import ConfigError, EngineConfig, ServeConfig
from kraken.engine.placement import Machine
from kraken.manifest import ArtefactError
from kraken.presets import quickstart
from kraken.trtllm.doctor import NUM_TOKENS, SERVED, TEXT, Check, Patient, judge, not_possible, why_impossible
from pipelines.errors import ClusterError
from pipelines.local_cluster import free_port

APPLICATION = "kraken-doctor"
RELEASE_TIMEOUT_S = 60.0
HTTP_TIMEOUT_S = 120.0


def examine_serving(machine: Machine, exchange: Path, patient: Patient) -> Iterator[Check]:
    """Serve an exchange folder that has been converted for TensorRT-LLM, ask it, and stop it.

    Args:
        exchange: its storage folder is its parent.
    """
    from pipelines.cluster import connect

    if reason := why_impossible(machine):
        yield from (not_possible(name, reason) for name in SERVED)
        return

    config = dataclasses.replace(quickstart(), storage=str(exchange.parent))
    try:
        with connect(config):
            yield from _examine(exchange, patient)
    except (ClusterError, ConfigError) as error:
        yield judge("Ray Serve: start", False, str(error))


def _examine(exchange: Path, patient: Patient) -> Iterator[Check]:
    import ray
    from ray import serve as ray_serve

    from serve.app import ServeArgs, build

    def num_free_gpus() -> float:
        return ray.available_resources().get("GPU", 0.0)

    gpus_before, port, started_at = num_free_gpus(), free_port(), time.monotonic()
    serve_config = ServeConfig(model_name="doctor", port=port)
    engine_config = EngineConfig(kind="tensorrt_llm", dtype=patient.dtype)
    ray_serve.start(http_options={"host": serve_config.host, "port": port})
    try:
        args = ServeArgs(exchange=exchange, engine_config=engine_config, serve_config=serve_config)
        ray_serve.run(build(args), name=APPLICATION, route_prefix="/")
        yield judge("Ray Serve: start", True, f"ready after {time.monotonic() - started_at:.0f} s")
        yield _compare(port, exchange)
        yield _time(port, patient)
    except (RuntimeError, ConfigError, ArtefactError, OSError, KeyError, ValueError) as error:
        found = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
        yield judge("Ray Serve: start", False, found)
    finally:
        ray_serve.shutdown()
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    while num_free_gpus() < gpus_before and time.monotonic() < deadline:
        time.sleep(0.5)
    is_free = num_free_gpus() >= gpus_before
    yield judge("Ray Serve: clean-up", is_free, f"{num_free_gpus():g} of {gpus_before:g} GPUs")


def _compare(port: int, exchange: Path) -> Check:
    """Greedy text over HTTP against our model's, whole and uncached; ties in bfloat16 may fall otherwise."""
    import torch

    from kraken.convert import read_exchange
    from kraken.tokenizer import Tokenizer

    tokenizer, model = Tokenizer.load(exchange), read_exchange(exchange, torch.float32)
    ids = tokenizer.encode(TEXT)[:32]
    choice = _complete(port, prompt=ids, max_tokens=NUM_TOKENS, logprobs=1)["choices"][0]
    found = [float(value) for value in choice["logprobs"]["token_logprobs"]]
    with torch.inference_mode():
        for _ in found:
            logits_V = model(torch.tensor([ids]))[0, -1, : tokenizer.num_ids]
            ids.append(int(logits_V.argmax()))
    ours = tokenizer.decode(ids[32:])
    is_same = ours == choice["text"]
    return judge("Ray Serve: same tokens", is_same, f"{choice['text']!r}, ours {ours!r}")


def _time(port: int, patient: Patient) -> Check:
    times_ms = []
    for number in range(patient.num_timed + 3):
        ids = [(number + 3 * i) % 256 for i in range(patient.num_prompt_tokens)]
        started_at = time.perf_counter()
        _complete(port, prompt=ids, max_tokens=1)
        times_ms.append((time.perf_counter() - started_at) * 1e3)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=HTTP_TIMEOUT_S) as response:
        stats = json.load(response)["stats"]
    told = f"{median(times_ms[3:]):.2f} ms median over HTTP, {stats['ttft_ms']:.2f} ms in the engine, of one token"
    return judge("Ray Serve: TTFT", True, told)


def _complete(port: int, **fields: Any) -> dict[str, Any]:
    body = json.dumps({"model": "doctor", "temperature": 0, **fields}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(
            f"the endpoint answers {error.code}: {error.read().decode(errors='replace')[:200]}"
        ) from error
