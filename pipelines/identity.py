"""Identity: which settings determine a stage's result, and therefore its fingerprint.

A setting that leaves the result as it is must not change the fingerprint: otherwise changing how often training logs
would train a model again from step 0. Every field of every section is decided here, once; a test asks for a decision
about each new one. A field without a decision counts as determining.

Results are equal to rounding: settings that only change the order of sums, as the number of workers does, do not count.
"""

from typing import Any

SECTIONS: dict[str, tuple[str, ...]] = {
    "prepare": ("data",),
    "pretrain": ("model", "train"),
    "convert": ("convert",),
    "evaluate": ("evaluate", "engine"),
    "deploy": ("serve", "engine", "gates"),
}
"""Stage -> the sections of the config that it reads and records."""

_ENGINE_RESULT = frozenset(
    # which code computes the numbers, on what and in which precision: parity is measured of exactly that
    {
        "engine.kind",
        "engine.device",
        "engine.dtype",
        "engine.quantization",
        "engine.num_devices",
        "engine.overlap",
        "engine.all_reduce",
        "engine.tokens_per_block",
        "engine.prefix_reuse",
        "engine.cuda_graphs",
    }
)
_ENGINE_OPERATION = frozenset(
    {
        # how long to wait
        "engine.startup_timeout_s",
        "engine.collective_timeout_s",
        # how much runs at once
        "engine.num_threads",
        "engine.max_batch_size",
        "engine.max_step_tokens",
        "engine.kv_cache_tokens",
        "engine.cuda_graph_sizes",
        "engine.max_queued_requests",
    }
)

DETERMINING: dict[str, frozenset[str]] = {
    "prepare": frozenset(
        {
            "data.corpus",
            "data.paths",
            "data.dataset",
            "data.dataset_config",
            "data.dataset_revision",
            "data.dataset_split",
            "data.text_field",
            "data.tokenizer",
            "data.num_trained_ids",
            "data.tokenizer_training_bytes",
            "data.validation_fraction",
            "data.bytes_per_piece",
        }
    ),
    "pretrain": frozenset(
        {
            "model.architecture",
            "model.num_layers",
            "model.width",
            "model.num_heads",
            "model.num_ways",
            "model.context_length",
            "model.vocab_size",
            "model.ffn_multiple",
            "model.activation",
            "model.positions",
            "model.rope_base",
            "model.bias",
            "train.steps",
            "train.sequences_per_step",
            "train.learning_rate",
            "train.optimizer",
            "train.final_learning_rate_fraction",
            "train.warmup_steps",
            "train.beta1",
            "train.beta2",
            "train.weight_decay",
            "train.clip_norm",
            "train.seed",
            "train.precision",
            # over which windows every validation loss is, and so which checkpoint is the best
            "train.validation_windows",
            # which steps are bad
            "train.max_loss_spike",
        }
    ),
    "convert": frozenset({"convert.tensorrt_llm"}),
    "evaluate": frozenset(
        {
            "evaluate.max_windows",
            "evaluate.parity_windows",
            "evaluate.parity_tokens",
            "evaluate.parity_tolerance",
        }
    )
    | _ENGINE_RESULT,
    # the result is an endpoint, and how it waits, queues and batches is what it is
    "deploy": frozenset(
        {
            "serve.host",
            "serve.port",
            "serve.model_name",
            "serve.registered_name",
            "serve.stream_interval_ms",
            "serve.api_keys_file",
            "serve.num_replicas",
            "serve.cpus_per_replica",
            "serve.gpus_per_replica",
            "serve.name",
        }
    )
    | _ENGINE_RESULT
    | _ENGINE_OPERATION,
}
"""Stage -> the fields that determine its result."""

NOT_DETERMINING: dict[str, frozenset[str]] = {
    # Without a bad document the tokens are the same. With one, `pipelines.prepare` compares how many were left out.
    "prepare": frozenset({"data.on_bad_document"}),
    "pretrain": frozenset(
        {
            # how a step is computed; the order of sums at most
            "train.sequences_per_microbatch",
            "train.compile",
            "train.recompute_activations",
            # what is reported and kept on the way
            "train.trace_step",
            "train.log_every",
            "train.validate_every",
            "train.checkpoint_every",
            "train.keep_checkpoints",
            "train.keep_best_checkpoint",
            "train.checkpoint_in_background",
            # Without a bad step the weights are the same. With one, the number of skipped steps is compared.
            "train.on_bad_step",
        }
    ),
    "convert": frozenset(),
    "evaluate": _ENGINE_OPERATION,
    "deploy": frozenset(
        {
            # says how to begin
            "serve.replace",
            # what is compared and why, before the endpoint is made
            "gates.max_perplexity_increase",
            "gates.max_latency_increase",
            "gates.same_tokenizer",
            "gates.force",
            "gates.reason",
        }
    ),
}
"""Stage -> the fields that do not."""

OF_NO_STAGE = frozenset({"name", "cluster", "storage", "experiment"})
"""Fields of `RunConfig` that no stage's result depends on: names, places, and the mesh, which changes no result."""


def determining(kind: str, section: dict[str, Any]) -> dict[str, Any]:
    """The part of a stage's settings that determines its result; the fingerprint is its hash.

    Args:
        section: what the stage records of the config, as `Stage.section` gives it.
    """
    left_out = NOT_DETERMINING[kind]
    return {
        name: {field: value for field, value in part.items() if f"{name}.{field}" not in left_out}
        if isinstance(part, dict)
        else part
        for name, part in section.items()
    }
