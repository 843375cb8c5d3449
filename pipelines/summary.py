"""The summary at the end: what was made, how good it is, and what to do with it; as text and as summary.json."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

from kraken.config import ConfigError, RunConfig
from kraken.manifest import ArtefactError, Metric, write_atomically
from kraken.storage import is_remote
from pipelines import cluster, deploy
from pipelines.end_to_end import StageResult
from pipelines.outbox import without_password
from pipelines.report.write import report_location, report_name
from pipelines.tracking_server import UI_PORT, TrackingServer, runs_page, tracking_uri, ui_command
from serve.api_key import API_KEY_VARIABLE, api_key

SUMMARY_NAME = "summary.json"
PROMPT = "import os\n\ndef "
MAX_COMPLETION_TOKENS = 32


def summarise(config: RunConfig, results: dict[str, StageResult]) -> dict[str, Any]:
    """The facts of a finished pipeline; the completion is fetched from the endpoint over HTTP."""

    def metric(kind: str, name: str) -> int | float:
        return results[kind].manifest.metrics[name].value

    endpoint = results["deploy"].manifest.details["endpoint"]
    completion = complete(config, endpoint)
    return {
        "stages": {
            kind: {"seconds": round(result.seconds, 2), "reused": result.reused} for kind, result in results.items()
        },
        "parameters": metric("pretrain", "parameters"),
        "train_tokens": metric("pretrain", "train_tokens"),
        "validation_loss": metric("evaluate", "validation_loss"),
        "validation_perplexity": metric("evaluate", "validation_perplexity"),
        "bits_per_byte": metric("evaluate", "bits_per_byte"),
        "unigram_entropy": metric("prepare", "unigram_entropy"),
        "unigram_bits_per_byte": unigram_bits_per_byte(results),
        "parity_max_abs_diff": metric("evaluate", "parity_max_abs_diff"),
        "tokens_per_second": metric("pretrain", "mean_tokens_per_second"),
        "endpoint": endpoint,
        "completion": completion,
        "runs": where_runs_are(config.storage, experiment_id(config)),
        "report": without_password(
            report_location(
                config.storage,
                report_name(config.name, {kind: result.manifest.fingerprint for kind, result in results.items()}),
            )
        ),
    }


def complete(config: RunConfig, endpoint: str) -> str:
    """A completion by the endpoint, asked from the head where this machine does not reach it.

    Raises:
        ArtefactError: the endpoint refuses, or does not answer the head either.
    """
    try:
        return deploy.complete(endpoint, request_body(config))
    except ArtefactError:
        if cluster.is_embedded(config):
            raise
        with cluster.connect(config):
            return cluster.call_on_head(deploy.complete, endpoint, request_body(config))


def request_body(config: RunConfig) -> dict[str, Any]:
    """The completion that the summary shows and asks for; short enough for a small context."""
    max_tokens = min(MAX_COMPLETION_TOKENS, config.model.context_length // 2)
    return {"model": config.serve.model_name, "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0.7, "seed": 1}


def unigram_bits_per_byte(results: dict[str, StageResult]) -> float:
    """The unigram entropy in the unit that compares across tokenizers."""
    metrics: dict[str, Metric] = results["evaluate"].manifest.metrics
    entropy = results["prepare"].manifest.metrics["unigram_entropy"].value
    return entropy / math.log(2) * metrics["scored_tokens"].value / metrics["scored_bytes"].value


def write(config: RunConfig, summary: dict[str, Any]) -> Path | None:
    """Write summary.json into the storage folder; a remote storage keeps the manifests only."""
    if is_remote(config.storage):
        return None
    path = Path(config.storage) / SUMMARY_NAME
    write_atomically(path, json.dumps(summary, indent=2) + "\n")
    return path


def render(config: RunConfig, summary: dict[str, Any]) -> str:
    """The summary as text for a person."""
    body = shlex.quote(json.dumps(request_body(config)))
    key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if api_key() else ""
    curl = f"curl {summary['endpoint']}/completions -H 'Content-Type: application/json'{key} -d {body}"
    stages = [
        f"  {kind:10} {stage['seconds']:8.1f} s  {'reused' if stage['reused'] else 'ran'}"
        for kind, stage in summary["stages"].items()
    ]
    return "\n".join(
        [
            "",
            f"Kraken {config.name}: {summary['parameters']:,} parameters, {summary['train_tokens']:,} tokens",
            *stages,
            f"  validation loss {summary['validation_loss']:.4f} nats/token "
            f"(unigram entropy of the same tokens: {summary['unigram_entropy']:.4f})",
            f"  perplexity      {summary['validation_perplexity']:.2f}",
            f"  bits per byte   {summary['bits_per_byte']:.4f} (unigram: {summary['unigram_bits_per_byte']:.4f})",
            f"  parity          {summary['parity_max_abs_diff']:.2e} nats, largest difference of trainer and engine",
            f"  completion      {json.dumps(PROMPT)} -> {json.dumps(summary['completion'])}",
            f"  endpoint        {summary['endpoint']}",
            f"    {curl}",
            f"  report          {summary['report']}",
            f"  runs            {summary['runs']}",
            "",
        ]
    )


def experiment_id(config: RunConfig) -> str | None:
    """MLflow's id of the run's experiment; None where the server is away by now."""
    try:
        return TrackingServer(config.storage).experiment_id(config.experiment)
    except ConfigError:
        return None


def where_runs_are(storage: str, experiment_id: str | None) -> str:
    """The list of runs on the MLflow server, or for a database the command that starts one; passwords are hidden.

    A job on a cluster prints this where another machine reads it, so the server's page comes without a command.
    """
    uri = tracking_uri(storage)
    is_server = uri.startswith("http")
    pages = uri if is_server else f"http://127.0.0.1:{UI_PORT}"
    page = without_password(pages) if experiment_id is None else runs_page(pages, experiment_id)
    if is_server:
        return page
    return f"make ui, or: {without_password(shlex.join(ui_command(storage)))}; then {page}"
