"""Needs of a plan: devices, memory, disk and time of the stages that would run, for `--dry-run`. Nothing is started."""

import os
from dataclasses import dataclass

from kraken.config import EngineConfig, RunConfig
from kraken.manifest import MANIFEST_NAME, ArtefactError, Manifest
from kraken.plan import cost
from kraken.storage import Storage
from pipelines import end_to_end, memory
from pipelines.end_to_end import PlannedStage
from pipelines.table import columns, duration, size

UNKNOWN = "not known"
TOKENS_PER_BYTE = 0.27
"""Tokens of one byte of English text or code with a trained tokenizer or GPT-2's; a rough figure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What one stage needs, in words."""

    kind: str
    devices: str
    memory: str
    disk: str
    time: str

    @property
    def row(self) -> tuple[str, ...]:
        """Cells of a table."""
        return (self.kind, self.devices, self.memory, self.disk, self.time)


def of_plan(config: RunConfig, planned: list[PlannedStage]) -> list[Needs]:
    """What each stage that would run needs, in their order."""
    functions = {
        "prepare": _prepare,
        "pretrain": _pretrain,
        "convert": _convert,
        "evaluate": _evaluate,
        "deploy": _deploy,
    }
    return [functions[p.stage.kind](config, p) for p in planned if p.manifest is None]


def _prepare(config: RunConfig, planned: PlannedStage) -> Needs:
    text_bytes = _corpus_bytes(config)
    bytes_per_token = 2 if config.data.num_ids <= 2**16 else 4
    disk = UNKNOWN if text_bytes is None else f"{size(text_bytes * TOKENS_PER_BYTE * bytes_per_token)} of tokens"
    return Needs(
        kind="prepare",
        devices="the cluster's free CPUs, one for a piece of the corpus",
        memory=f"{size(6 * config.data.bytes_per_piece)} for a piece",
        disk=disk,
        time=UNKNOWN,
    )


def _corpus_bytes(config: RunConfig) -> int | None:
    """Bytes of the text; None where they are not known without reading it, as of a compressed file."""
    from kraken.data.corpora import open_corpus

    if config.data.corpus in ("huggingface", "nanogpt"):
        return None
    sizes = [piece.num_bytes for piece in open_corpus(config.data).pieces(config.data.bytes_per_piece)]
    return None if 0 in sizes else sum(sizes)


def _pretrain(config: RunConfig, planned: PlannedStage) -> Needs:
    cluster, train = config.cluster, config.train
    what, each = ("GPU", 1) if cluster.gpus_per_worker else ("CPU", cluster.cpus_per_worker)
    need = memory.of_worker(config)
    state = (need.weights + need.optimizer) * cluster.way_size * cluster.shard_size
    num_kept = train.keep_checkpoints + int(train.keep_best_checkpoint) + 1  # one is being written
    tokens = (train.steps - planned.first_step) * train.sequences_per_step * config.model.context_length
    flops = cost.training_flops_per_token(config.model) * tokens
    return Needs(
        kind="pretrain",
        devices=f"{cluster.num_workers} workers x {each} {what}",
        memory=f"{size(need.total)} a worker: {size(need.weights + need.gradients + need.optimizer)} of state, "
        f"{size(need.activations)} of activations",
        disk=f"{size(num_kept * state)}, {num_kept} checkpoints of {size(state)}",
        time=_training_time(config, flops),
    )


def _training_time(config: RunConfig, flops: float) -> str:
    """Of the plan's arithmetic at the speed of an earlier training here, else at the matrix rate of this machine."""
    num_workers = config.cluster.num_workers
    earlier = _newest_training(config)
    if earlier is not None:
        rate = earlier.value("training_flops_per_token") * earlier.value("mean_tokens_per_second")
        seconds = flops / (rate / earlier.value("num_workers") * num_workers)
        return f"{duration(seconds)} at the speed a worker had in training {earlier.fingerprint[:12]}"
    if config.cluster.gpus_per_worker:
        # no GPU need be here, and what a GPU reaches depends on the shape; docs/training.md has measured rates
        return f"{flops / 1e15:.3g} PFLOP: {duration(flops / num_workers / 1e14)} at 100 TFLOP/s a GPU"
    import torch

    from kraken.training.rate import matrix_rate

    rate = matrix_rate(torch.float32, torch.device("cpu")) * min(
        1.0, num_workers * config.cluster.cpus_per_worker / (os.cpu_count() or 1)
    )
    return f"{duration(flops / rate)} at the rate at which this machine multiplies matrices now"


def _newest_training(config: RunConfig) -> Manifest | None:
    """The newest finished training in the storage, one of the same model if there is any."""
    storage, found = Storage(config.storage), []
    for folder in storage.list_folders(storage.root / "pretrain"):
        text = storage.read_text(folder / MANIFEST_NAME)
        try:
            found.append(Manifest.parse(text or "", folder))
        except ArtefactError:
            continue
    usable = [m for m in found if {"mean_tokens_per_second", "num_workers"} <= m.metrics.keys()]
    same = cost.training_flops_per_token(config.model)
    return max(usable, key=lambda m: (m.value("training_flops_per_token") == same, m.created_at), default=None)


def _convert(config: RunConfig, planned: PlannedStage) -> Needs:
    weights = 4 * cost.num_parameters(config.model)
    padded = weights // 2 if config.convert.tensorrt_llm else 0
    return Needs(
        kind="convert",
        devices="1 CPU",
        memory=size(2 * weights),
        disk=size(weights + padded) + (", with TensorRT-LLM's" if padded else ""),
        time="seconds for each GB",
    )


def _evaluate(config: RunConfig, planned: PlannedStage) -> Needs:
    own = 4 * cost.num_parameters(config.model)  # parity runs the trainer's model beside the engine
    num = config.engine.num_devices
    on_gpus = config.engine.device == "cuda"
    devices = f"{num} GPU{'s' if num > 1 else ''}" if on_gpus else "the CPUs of training, and GPUs where there are any"
    return Needs(
        kind="evaluate",
        devices=devices,
        memory=f"{size(own + engine_bytes(config, on_gpus))} with the trainer's model",
        disk="under 1 MB",
        time=UNKNOWN,
    )


def _deploy(config: RunConfig, planned: PlannedStage) -> Needs:
    serve = config.serve
    parts = [f"{serve.cpus_per_replica:g} CPUs"] if serve.cpus_per_replica else []
    parts += [f"{serve.gpus_per_replica:g} GPUs"] if serve.gpus_per_replica else []
    each = " and ".join(parts) or "no CPU of its own"
    replicas = f"{serve.num_replicas} replica{'s' if serve.num_replicas > 1 else ''}"
    on_gpus = config.engine.device == "cuda" or serve.gpus_per_replica > 0
    return Needs(
        kind="deploy",
        devices=f"{replicas} x {each}",
        memory=f"{size(engine_bytes(config, on_gpus))} a replica",
        disk="under 1 MB",
        time="half a minute",
    )


def engine_bytes(config: RunConfig, on_gpus: bool) -> int:
    """Bytes of an engine's weights and KV cache, by the plan."""
    engine: EngineConfig = config.engine
    bytes_per_value = 2 if engine.dtype == "bfloat16" or (engine.dtype == "auto" and on_gpus) else 4
    weights = cost.num_parameters(config.model) * bytes_per_value
    if engine.quantization == "fp8":
        weights -= cost.layer_weights(config.model)  # one byte instead of two
    tokens = engine.kv_cache_tokens or engine.max_batch_size * config.model.context_length
    return weights + tokens * cost.kv_bytes_per_token(config.model, bytes_per_value)


def describe_plan(config: RunConfig, planned: list[PlannedStage]) -> str:
    """The graph as `end_to_end.describe` gives it, and below it what the stages that would run need."""
    graph, needs = end_to_end.describe(planned), of_plan(config, planned)
    if not needs:
        return graph
    rows = [("needs of", "devices", "memory", "disk", "time"), *(need.row for need in needs)]
    return f"{graph}\n\n{columns(rows)}"
