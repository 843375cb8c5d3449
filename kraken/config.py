"""The configuration tree: frozen dataclasses, checked when built, JSON both ways.

A run is a preset (`kraken.presets`) varied by dotted overrides on the command line. Nothing here is written back
later, and no secret ever enters the tree: tokens and keys come from the environment.
"""

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import dacite

T = TypeVar("T")

EngineKind = Literal["auto", "torch", "tensorrt_llm"]
AllReduceSetting = Literal["auto", "nccl", "p2p"]
Quantization = Literal["none", "fp8"]

VOCAB_MULTIPLE = 64
"""Vocabularies are padded up to a multiple of this many ids: GPT-2's 50,257 become 50,304, as in nanoGPT."""

GPT2_NUM_IDS = 50_257

CONTINUE_FROM = re.compile(r"latest|[0-9a-f]{4,64}(@\d+)?")
"""What `RunConfig.continue_from` may be."""

MOST_WARMUP_STEPS = 2000
"""Longest warm-up that is chosen where none is given."""
DEFAULT_APPLICATION = "kraken"
RESERVED_ROUTES = ("v1", "health", "tokenize", "detokenize", "tokenizer_info")
"""First parts of the default application's URLs, which another application of these names would hide."""


class ConfigError(ValueError):
    """A setting that its user can mend; the message names the field, the value and the way out."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{section}.{name}={value} is not positive; choose a value above 0")


CORPUS_NEEDS = {"embedded": None, "files": "paths", "huggingface": "dataset", "nanogpt": "paths"}
"""Corpus -> the field without which it cannot be read."""

_DOCUMENT_FIELDS = frozenset({"text_field", "on_bad_document"})
_PIECE_FIELDS = frozenset({"validation_fraction", "bytes_per_piece", "tokenizer_training_bytes"})
CORPUS_FIELDS = {
    "embedded": _PIECE_FIELDS,
    "files": _PIECE_FIELDS | _DOCUMENT_FIELDS | {"paths"},
    "huggingface": _PIECE_FIELDS
    | _DOCUMENT_FIELDS
    | {"dataset", "dataset_config", "dataset_revision", "dataset_split"},
    "nanogpt": frozenset({"paths"}),
}
"""Corpus -> the fields that it reads, of those that not every corpus does."""


def pad_vocab(num_ids: int) -> int:
    """The padded vocabulary size V for a tokenizer of `num_ids` ids."""
    return -(-num_ids // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which text becomes which tokens."""

    corpus: Literal["embedded", "files", "huggingface", "nanogpt"] = "embedded"
    """Source of the documents. `embedded`: the Python standard library of the running interpreter, on every machine.
    `files`: JSONL, Parquet and text under `paths`. `huggingface`: `dataset`, streamed. `nanogpt`: the folder in `paths`
    with `train.bin` and `val.bin`, GPT-2's ids, used as they are."""
    paths: tuple[str, ...] = ()
    """Files, globs (`/data/**/*.jsonl`) or folders, absolute or as URIs that `pyarrow.fs` opens (`s3://...`). A path
    that exists exactly as given is no glob, and a file with several names or links is read once. The suffix decides:
    `.jsonl`, `.ndjson`, `.json` (one object a line; also `.gz`, `.zst`), `.parquet`, anything else is text. Of a folder
    the text files are `.txt`, `.md` and the like; for others give a glob."""
    dataset: str | None = None
    """Hugging Face id, `openwebtext` for Skylion007/openwebtext as Parquet, or the absolute path of a local folder."""
    dataset_config: str | None = None
    """Configuration of the data set; None takes its only one."""
    dataset_revision: str | None = None
    """Branch, tag or commit; None takes the newest. The commit that it means becomes part of the fingerprint."""
    dataset_split: str = "train"
    """The data set's own split to read; `validation_fraction` divides it."""
    text_field: str = "text"
    """Field of a JSON object, or column, that holds the text."""
    on_bad_document: Literal["stop", "skip"] = "stop"
    """What a document that cannot be used does: not UTF-8, not JSON, no text. `skip` leaves it out and counts it."""
    tokenizer: Literal["trained", "gpt2"] = "trained"
    """`trained`: byte pairs learnt from the training split. `gpt2`: OpenAI's GPT-2 ranks, which tiktoken downloads."""
    num_trained_ids: int = 4096
    """Byte-pair ids of a trained tokenizer, the 256 bytes included; `<|endoftext|>` comes on top."""
    tokenizer_training_bytes: int = 2**27
    """Bytes of the training split that a trained tokenizer learns from; of a larger split, evenly spread parts."""
    validation_fraction: float = 0.05
    """Share of the documents held out, chosen by a hash of each document's text: equal texts lie in the same split. A
    document is held out as a whole; each section of a long or lone text file counts as one."""
    bytes_per_piece: int = 2**23
    """Text, in bytes, that one task turns into a shard: what an interrupted run does again. Text of unknown size, such
    as a Hugging Face shard or a compressed file, is one piece. Decides how the tokens are cut into files."""

    def __post_init__(self) -> None:
        self._check_corpus()
        _require(
            256 < self.num_trained_ids <= 2**20,
            f"data.num_trained_ids={self.num_trained_ids} is outside 257..1048576; 4096 suits the embedded corpus",
        )
        _require(
            0.0 < self.validation_fraction < 0.5,
            f"data.validation_fraction={self.validation_fraction} is outside 0..0.5; 0.05 holds out a twentieth",
        )
        _require_positive("data", self, "tokenizer_training_bytes", "bytes_per_piece")

    def _check_corpus(self) -> None:
        """The corpus has what it needs, and nothing is set that it would ignore."""
        needs = CORPUS_NEEDS[self.corpus]
        _require(
            needs is None or bool(getattr(self, needs)),
            f"data.corpus={self.corpus} needs data.{needs}, which is not set; give --data.{needs}, or choose "
            "data.corpus=embedded, which needs nothing",
        )
        for field in dataclasses.fields(self):
            readers = [corpus for corpus, fields in CORPUS_FIELDS.items() if field.name in fields]
            value = getattr(self, field.name)
            _require(
                not readers or self.corpus in readers or value == field.default,
                f"data.{field.name}={value} is not read by data.corpus={self.corpus}; choose data.corpus from "
                f"{readers}, or leave data.{field.name} at {field.default!r}",
            )
        for path in (*self.paths, *filter(None, [self.dataset])):
            _require(
                not path.startswith((".", "~")) and (path == self.dataset or path.startswith("/") or "://" in path),
                f"data.{'dataset' if path == self.dataset else 'paths'}={path} is relative, and workers run in other "
                f"folders; give {os.path.abspath(os.path.expanduser(path))}",
            )
        if self.corpus == "nanogpt":
            _require(
                len(self.paths) == 1,
                f"data.paths={self.paths} are {len(self.paths)}; data.corpus=nanogpt reads one folder",
            )
            _require(
                self.tokenizer == "gpt2",
                f"data.corpus=nanogpt is GPT-2's ids, but data.tokenizer={self.tokenizer}; choose data.tokenizer=gpt2",
            )
        _require(
            self.dataset_revision is None or not (self.dataset or "").startswith("/"),
            f"data.dataset_revision={self.dataset_revision}, but data.dataset={self.dataset} is a local folder, which "
            "has no revisions; leave data.dataset_revision at None",
        )

    @property
    def num_ids(self) -> int:
        """Ids the tokenizer can produce, `<|endoftext|>` included."""
        return GPT2_NUM_IDS if self.tokenizer == "gpt2" else self.num_trained_ids + 1

    @property
    def vocab_size(self) -> int:
        """The padded vocabulary V that a model needs for these tokens."""
        return pad_vocab(self.num_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The shape of a model. Letters in brackets are the shape letters of `kraken/model/architecture.py`."""

    architecture: Literal["kraken", "kraken_delayed", "standard", "parallel"] = "kraken"
    """`kraken`: W ways, one sum a layer, as in the paper. `kraken_delayed`: W ways whose attention and FFN, side by
    side after one LayerNorm, read the other ways a layer later. `standard`: pre-LayerNorm Transformer, as GPT-2.
    `parallel`: attention and FFN side by side after one LayerNorm, as GPT-J and PaLM. The last two are the baselines
    and have one way."""
    num_layers: int
    """Layers; each holds `num_ways` independent sub-layers."""
    width: int
    """Embedding dimension of one way [D]."""
    num_heads: int
    """Attention heads over all ways together [W*N], as the published presets count them."""
    num_ways: int
    """Parallel sub-layers per layer, one per device at most [W]."""
    context_length: int
    """Longest sequence in tokens; learned positions end here."""
    vocab_size: int
    """Padded vocabulary [V]; ids past the tokenizer's own are never sampled."""
    ffn_multiple: int = 2
    """FFN hidden size as a multiple of the width [F = ffn_multiple * D]; the published presets use 2, GPT-2 uses 4."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """`gelu` (tanh form). `swiglu`: a gated FFN with three matrices and two thirds of the hidden size, so that it has
    as many parameters."""
    positions: Literal["learned", "rope"] = "learned"
    """`learned`: a table of `context_length` vectors. `rope`: queries and keys are rotated instead."""
    rope_base: float = 10_000.0
    """Longest wavelength of `rope` in positions, over 2 pi."""
    bias: bool = False
    """Whether linears and LayerNorms add a bias; no preset does."""

    def __post_init__(self) -> None:
        _require_positive(
            "model",
            self,
            *("num_layers", "width", "num_heads", "num_ways", "context_length", "vocab_size", "ffn_multiple"),
        )
        _require(
            self.rope_base > 1.0, f"model.rope_base={self.rope_base} is not above 1; 10000 is what most models use"
        )
        _require(
            self.is_kraken or self.num_ways == 1,
            f"model.num_ways={self.num_ways}, but model.architecture={self.architecture} has one way; choose "
            "model.num_ways=1, or model.architecture=kraken",
        )
        ways = [w for w in range(1, self.num_heads + 1) if self.num_heads % w == 0]
        _require(
            self.num_heads % self.num_ways == 0,
            f"model.num_heads={self.num_heads} is not divisible by model.num_ways={self.num_ways}; "
            f"choose num_ways from {ways}",
        )
        _require(
            self.width % self.heads_per_way == 0,
            f"model.width={self.width} is not divisible by the {self.heads_per_way} heads of a way "
            f"(model.num_heads={self.num_heads} / model.num_ways={self.num_ways}); "
            f"choose a width that is a multiple of {self.heads_per_way}",
        )
        _require(
            self.positions == "learned" or self.head_size % 2 == 0,
            f"model.positions=rope rotates pairs of channels, but the head size is {self.head_size} "
            f"(model.width={self.width} / {self.heads_per_way} heads of a way); choose a width that is a multiple of "
            f"{2 * self.heads_per_way}, or model.positions=learned",
        )
        _require(
            self.vocab_size % VOCAB_MULTIPLE == 0,
            f"model.vocab_size={self.vocab_size} is not a multiple of {VOCAB_MULTIPLE}; "
            f"choose {pad_vocab(self.vocab_size)}",
        )

    @property
    def is_kraken(self) -> bool:
        """Whether layers consist of independent ways, which the conjunction joins after the last layer."""
        return self.architecture in ("kraken", "kraken_delayed")

    @property
    def has_one_norm(self) -> bool:
        """Whether attention and FFN read one LayerNorm, side by side."""
        return self.architecture in ("kraken_delayed", "parallel")

    @property
    def heads_per_way(self) -> int:
        """Heads of one way [N]."""
        return self.num_heads // self.num_ways

    @property
    def head_size(self) -> int:
        """Channels of one head [H]."""
        return self.width // self.heads_per_way

    @property
    def ffn_size(self) -> int:
        """Hidden channels of one way's FFN [F]; a gated one's are rounded up to a multiple of 8."""
        if self.activation == "swiglu":
            return -(-2 * self.ffn_multiple * self.width // (3 * 8)) * 8
        return self.ffn_multiple * self.width


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Optimisation and its schedule. The number of workers is not here: it does not change the mathematics."""

    steps: int
    """Optimizer steps."""
    sequences_per_step: int
    """Global batch in sequences of the model's context length, over all workers and micro-batches."""
    sequences_per_microbatch: int = 8
    """Most sequences a worker runs through the model at once; the rest of its share is accumulated."""
    learning_rate: float = 2.5e-4
    """Peak learning rate."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`adamw` for everything. `muon`: hidden matrices by Muon at the same rate, its updates scaled to AdamW's size;
    embeddings, biases and gains by AdamW. `beta1` and `beta2` are AdamW's alone: Muon's momentum is 0.95."""
    final_learning_rate_fraction: float = 0.1
    """The cosine ends at this fraction of the peak."""
    warmup_steps: int | None = None
    """Linear warm-up from zero, in steps. None: a tenth of `steps`, 2000 at most."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; gains of LayerNorm have none."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global L2 norm."""
    seed: int = 1337
    """Seeds the initial weights and the global order of the training windows."""
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Compute type; master weights stay float32 (or float64). `auto`: bfloat16 where the device is fast at it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """`torch.compile` of the layers and the loss, on one GPU with CUDA graphs of forward and backward. `auto`: where it
    pays, see `kraken/training/step.py`."""
    recompute_activations: bool = False
    """Keep only each layer's input for the backward pass and run the layer again there: less memory, a third more
    arithmetic (activation checkpointing)."""
    trace_step: int = 0
    """Step that the torch profiler records, counted from 1; each process leaves `trace_rank_R.json` in the run's
    folder, for chrome://tracing or ui.perfetto.dev. 0: none."""
    log_every: int = 10
    """Steps between two reported metrics."""
    validate_every: int = 100
    """Steps between two validations; the last step always validates."""
    validation_windows: int = 64
    """Fixed windows of the validation split that a validation reads."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept on disk."""
    keep_best_checkpoint: bool = True
    """Keep the checkpoint with the lowest validation loss beside the newest ones; of those whose step validated."""
    checkpoint_in_background: bool = True
    """Write checkpoints beside the steps that follow, from a copy in the host's memory; otherwise training waits."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """What follows a step whose gradient is not finite, or whose loss jumped by more than `max_loss_spike`: `stop` ends
    training at the next report, `skip` leaves weights and optimizer as if the step's batch had not been there."""
    max_loss_spike: float = 0.0
    """Nats above the running mean of the loss from which on a step is bad; 0 judges only whether it is finite."""

    def __post_init__(self) -> None:
        _require_positive(
            "train",
            self,
            *("steps", "sequences_per_step", "sequences_per_microbatch", "learning_rate", "clip_norm"),
            *("log_every", "validate_every", "validation_windows", "checkpoint_every", "keep_checkpoints"),
        )
        _require(
            0 <= self.num_warmup_steps <= self.steps,
            f"train.warmup_steps={self.warmup_steps} is outside 0..train.steps={self.steps}; warm up for fewer steps, "
            "or leave it out for a tenth of them",
        )
        for name in ("beta1", "beta2", "final_learning_rate_fraction"):
            value = getattr(self, name)
            _require(0.0 <= value <= 1.0, f"train.{name}={value} is outside 0..1")
        _require(
            0 <= self.trace_step <= self.steps,
            f"train.trace_step={self.trace_step} is outside 0..train.steps={self.steps}; 0 records none",
        )
        _require(self.weight_decay >= 0.0, f"train.weight_decay={self.weight_decay} is negative; 0 switches it off")
        _require(
            self.max_loss_spike >= 0.0,
            f"train.max_loss_spike={self.max_loss_spike} is negative; 0 judges only whether the loss is finite",
        )

    @property
    def num_warmup_steps(self) -> int:
        """Steps of the warm-up, whether given or derived from `steps`."""
        return min(MOST_WARMUP_STEPS, self.steps // 10) if self.warmup_steps is None else self.warmup_steps


TENSORRT_LLM_BLOCKS = (16, 32, 64, 128)
"""Tokens of a cache block that TensorRT-LLM's attention kernels take."""
DEFAULT_COLLECTIVE_TIMEOUT_S = 60.0
DEFAULT_MAX_STEP_TOKENS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """The engine that runs a converted model."""

    kind: EngineKind = "auto"
    """`auto`: TensorRT-LLM where it imports, the model was converted for it and every way has a GPU; else `torch`."""
    startup_timeout_s: float = 900.0
    """TensorRT-LLM, or every device of the torch engine, must be ready within this, or everything started is ended."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is a GPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of weights and cache. `auto`: bfloat16 on CUDA, float32 on a CPU, where bfloat16 decodes about twice as fast
    but changes log-probabilities in the third digit, so that deployment needs an `evaluate.parity_tolerance` of about
    0.1."""
    quantization: Quantization = "none"
    """`fp8`: the layers' linears with weights and inputs in float8, scaled by output and by token: half the memory for
    weights and up to twice the speed, on a GPU of compute capability 8.9 or newer; log-probabilities change in the
    second digit, so that deployment needs an `evaluate.parity_tolerance` of about 0.3. On a CPU it computes the same,
    without being faster. In bfloat16 only."""
    num_threads: int = 0
    """CPU threads of a forward pass, divided among the devices; 0 takes every core this process may use."""
    num_devices: int = 1
    """Devices that share the model, a process each, which the engine starts: Kraken's ways are divided among them, and
    so are the heads and FFN columns of the baselines. Over TCP and gloo on a CPU; on CUDA see `all_reduce`."""
    overlap: Literal["overlapped", "blocking"] = "overlapped"
    """Kraken's all-reduces over several devices: in flight while attention computes, or waited for where they start."""
    all_reduce: AllReduceSetting = "auto"
    """All-reduce over several CUDA devices: `nccl`; `p2p`, by writing into the memory of the other devices, on one host
    whose GPUs reach each other over NVLink; `auto` times both when the engine starts and takes the faster for each
    number of tokens, or NCCL where the other does not work."""
    collective_timeout_s: float = DEFAULT_COLLECTIVE_TIMEOUT_S
    """Time that a device waits for the others before the engine fails and is unhealthy."""
    max_batch_size: int = 16
    """Requests decoded together."""
    max_step_tokens: int = DEFAULT_MAX_STEP_TOKENS
    """Most tokens of one step: one of each decoding request, the rest for prompts. A larger value speeds up prompts and
    delays the next token of decoding requests."""
    kv_cache_tokens: int = 0
    """Capacity of the KV cache in tokens, at least one context. 0 takes `max_batch_size` contexts, on CUDA at most what
    fits into nine tenths of the free memory. When the cache is full, the newest requests are preempted and recomputed
    later. TensorRT-LLM takes those nine tenths with 0, and with a number at most as many tokens."""
    tokens_per_block: int = 16
    """Tokens of a block, the unit in which the KV cache is allocated and reused."""
    prefix_reuse: bool = True
    """Whether prompts with an equal prefix share the prefix's cache blocks. The time to the first token then reveals
    whether another user's prompt began with the same prefix."""
    cuda_graphs: bool = True
    """On CUDA, capture decoding steps and whole prompts as graphs when the engine starts. That takes some seconds, and
    reduces the time per token to a fraction."""
    cuda_graph_sizes: tuple[int, ...] = ()
    """Prompt lengths for which graphs are captured, and batch sizes as far as they do not exceed `max_batch_size`. A
    step uses the next larger graph, or none if there is none. Empty: four sizes to each power of two. TensorRT-LLM
    captures batches only, and chooses their sizes itself when the tuple is empty."""
    max_queued_requests: int = 256
    """Requests that may wait for a place in the batch; further ones are refused."""

    def __post_init__(self) -> None:
        _require_positive("engine", self, "max_batch_size", "max_queued_requests", "startup_timeout_s")
        _require_positive("engine", self, "max_step_tokens", "tokens_per_block")
        _require_positive("engine", self, "num_devices", "collective_timeout_s")
        _require(
            self.max_step_tokens >= self.max_batch_size,
            f"engine.max_step_tokens={self.max_step_tokens} is below engine.max_batch_size={self.max_batch_size}, and "
            "every request of a batch needs one token a step; raise the first or lower the second",
        )
        _require(
            all(size > 0 for size in self.cuda_graph_sizes) and (self.cuda_graphs or not self.cuda_graph_sizes),
            f"engine.cuda_graph_sizes={self.cuda_graph_sizes} must be positive numbers of tokens, and needs "
            "engine.cuda_graphs; leave it out for sizes that suit every step",
        )
        _require(
            self.kv_cache_tokens >= 0,
            f"engine.kv_cache_tokens={self.kv_cache_tokens} is negative; 0 takes max_batch_size contexts",
        )
        _require(
            self.kind != "tensorrt_llm" or not self.refused_by_tensorrt_llm,
            f"{self.refused_by_tensorrt_llm} with engine.kind=tensorrt_llm; leave it out, or choose engine.kind=torch",
        )
        _require(
            self.quantization == "none" or self.dtype != "float32",
            f"engine.quantization={self.quantization} computes in bfloat16, but engine.dtype=float32; leave one out",
        )
        _require(
            self.all_reduce == "auto" or self.device != "cpu",
            f"engine.all_reduce={self.all_reduce} is for CUDA, but engine.device=cpu; leave one of the two out",
        )
        _require(
            self.all_reduce == "auto" or self.num_devices > 1,
            f"engine.all_reduce={self.all_reduce} has no effect with engine.num_devices=1; leave it out",
        )
        _require(self.num_threads >= 0, f"engine.num_threads={self.num_threads} is negative; 0 takes every core")

    @property
    def refused_by_tensorrt_llm(self) -> str:
        """The first setting that TensorRT-LLM cannot honour, with its value and the reason; empty where there is none.

        `kind=auto` then takes the torch engine, so that no setting is ever ignored.
        """
        refused = {
            "device": (self.device == "cpu", "TensorRT-LLM needs GPUs"),
            "quantization": (self.quantization != "none", "it has no effect"),
            "num_threads": (self.num_threads != 0, "it has no effect"),
            "num_devices": (self.num_devices != 1, "it has no effect, since TensorRT-LLM takes one GPU for each way"),
            "all_reduce": (self.all_reduce != "auto", "it has no effect"),
            "collective_timeout_s": (
                self.collective_timeout_s != DEFAULT_COLLECTIVE_TIMEOUT_S,
                "it has no effect, since no rank of TensorRT-LLM gives up",
            ),
            "max_step_tokens": (
                self.max_step_tokens != DEFAULT_MAX_STEP_TOKENS,
                "it has no effect, since a step of TensorRT-LLM has room for every prompt",
            ),
            "tokens_per_block": (
                self.tokens_per_block not in TENSORRT_LLM_BLOCKS,
                f"TensorRT-LLM has blocks of {TENSORRT_LLM_BLOCKS} tokens",
            ),
            "cuda_graph_sizes": (
                any(size > self.max_batch_size for size in self.cuda_graph_sizes),
                f"TensorRT-LLM records graphs of batches alone, up to engine.max_batch_size={self.max_batch_size}",
            ),
        }
        for name, (is_refused, reason) in refused.items():
            if is_refused:
                return f"engine.{name}={getattr(self, name)} is not possible ({reason})"
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """What a checkpoint is converted to, besides the exchange format."""

    tensorrt_llm: bool = False
    """Also write the folder that TensorRT-LLM reads, in bfloat16 and with heads padded to sizes that have kernels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Evaluation of a converted model through an engine."""

    max_windows: int | None = None
    """Validation windows to score; None scores the whole split."""
    parity_windows: int = 4
    """Windows on which the trainer's log-probabilities are compared with the engine's."""
    parity_tokens: int = 32
    """Greedy tokens decoded per parity window."""
    parity_tolerance: float = 1e-3
    """Largest absolute difference of log-probabilities in nats, over the tokenizer's ids, that passes; a larger one
    refuses deployment."""

    def __post_init__(self) -> None:
        _require_positive("evaluate", self, "parity_windows", "parity_tokens", "parity_tolerance")
        _require(
            self.max_windows is None or self.max_windows > 0,
            f"evaluate.max_windows={self.max_windows} is not positive; leave it out to score the whole split",
        )


GATES = ("fingerprint", "parity", "tokenizer", "perplexity", "latency")
"""Checks between evaluation and deployment, in the order in which they are made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GatesConfig:
    """What a model must pass before it is deployed. The champion is the model of the same registered name that was
    deployed last. Parity's threshold is `evaluate.parity_tolerance`."""

    max_perplexity_increase: float | None = 0.01
    """Largest increase of perplexity over the champion's, on the champion's validation data, as a fraction of it; None
    does not compare. With another tokenizer, nats of the same text per token of the champion's."""
    max_latency_increase: float | None = None
    """Largest increase of the median time of a completion over the champion's, as a fraction of it, both models
    measured in turn in one process. None, the default, does not compare: on shared cores a time depends on what else
    runs."""
    same_tokenizer: bool = True
    """Whether the tokenizer must be the champion's: clients that send or keep token ids depend on it."""
    force: tuple[str, ...] = ()
    """Gates whose failure does not stop the deployment, each as GATE=REASON; recorded with the model's version. On the
    command line also `--force`. All but `fingerprint` can be forced."""
    reason: str = ""
    """Why the model is deployed, for the registry's history."""

    def __post_init__(self) -> None:
        for name in ("max_perplexity_increase", "max_latency_increase"):
            value = getattr(self, name)
            _require(
                value is None or value >= 0.0,
                f"gates.{name}={value} is negative; give a fraction such as 0.01, or None to compare nothing",
            )
        for text in self.force:
            gate, _, reason = text.partition("=")
            _require(
                gate in GATES[1:] and bool(reason.strip()),
                f"gates.force={text} is no GATE=REASON; the gates are {', '.join(GATES[1:])}, and a reason is needed, "
                "for example perplexity='trained on newer text'",
            )

    @property
    def forced(self) -> dict[str, str]:
        """The gates whose failure does not stop the deployment, each with the reason that was given."""
        return {gate: reason.strip() for gate, _, reason in (text.partition("=") for text in self.force)}


REGISTERED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""What a model may be called in MLflow's registry so that `models:/NAME@champion` names it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """The endpoint."""

    name: str = DEFAULT_APPLICATION
    """Name of the Ray Serve application, which belongs to the pipeline (storage, experiment and run name) that deployed
    it. `kraken` is served at `/v1`, another name beside it at `/NAME/v1`."""
    replace: bool = False
    """Take the name over from another pipeline, whose endpoint then ends."""
    host: str = "127.0.0.1"
    """Address to listen on; loopback unless changed."""
    port: int = 8000
    """HTTP port."""
    model_name: str = "kraken"
    """Name that clients put into `model`."""
    api_keys_file: str = ""
    """A file with digests of further API keys, each with a name and a rate limit, beside the key in KRAKEN_API_KEY. The
    driver and every node with a replica read it, and again when it changes. `serve/api_key.py` says how to write it."""
    stream_interval_ms: float = 0.0
    """A stream writes at most so often: tokens that come within this time of a write share the next one. The first and
    the last token never wait."""
    registered_name: str | None = None
    """Name in MLflow's model registry, which has one champion: the model that was deployed last. None takes `name`."""
    num_replicas: int = 1
    """Engine replicas behind the endpoint."""
    cpus_per_replica: float = 0.0
    """Logical CPUs that a replica reserves; 0 shares the cores, so that an idle endpoint never blocks training."""
    gpus_per_replica: float = 0.0
    """GPUs that a replica reserves."""

    def __post_init__(self) -> None:
        _require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name) is not None and self.name not in RESERVED_ROUTES,
            f"serve.name={self.name} cannot be a route; give letters, digits, '_', '.' and '-', and none of "
            f"{', '.join(RESERVED_ROUTES)}",
        )
        _require(
            self.registered_name is None or REGISTERED_NAME.fullmatch(self.registered_name) is not None,
            f"serve.registered_name={self.registered_name} cannot be part of models:/NAME; give letters, digits, '_', "
            "'.' and '-'",
        )
        _require(0 < self.port < 65536, f"serve.port={self.port} is outside 1..65535; 8000 is the default")
        _require(bool(self.model_name.strip()), "serve.model_name is empty; give the name clients will use")
        _require_positive("serve", self, "num_replicas")
        _require(
            0 <= self.stream_interval_ms <= 1000,
            f"serve.stream_interval_ms={self.stream_interval_ms} is outside 0..1000; 0 writes every token at once",
        )
        for name in ("cpus_per_replica", "gpus_per_replica"):
            value = getattr(self, name)
            _require(value >= 0, f"serve.{name}={value} is negative; 0 reserves none")

    @property
    def route_prefix(self) -> str:
        """Where the application's URLs begin."""
        return "/" if self.name == DEFAULT_APPLICATION else f"/{self.name}"

    @property
    def registry_name(self) -> str:
        """Name in the model registry."""
        return self.registered_name or self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """What training asks of the Ray cluster. It changes how fast a result comes, never which."""

    num_workers: int = 2
    """Ray Train workers: `shard_size` x `way_size` x as many replicas as that leaves."""
    min_workers: int = 0
    """Workers that training goes on with when nodes are lost, at least: it shrinks to what there is room for, in whole
    replicas, and grows again when nodes come back. 0: always `num_workers`."""
    way_size: int = 1
    """Workers that share the ways of one model, and its vocabulary; neighbours, so that they share a node."""
    shard_size: int = 1
    """Workers that share parameters, gradients and optimizer state of one model (FSDP2)."""
    overlap: bool = True
    """Whether a layer's sum over the way axis is in flight while its attention computes, or waited for at once."""
    cpus_per_worker: int = 1
    """CPUs, and torch threads, of a worker."""
    gpus_per_worker: int = 0
    """GPUs of a worker: 0 trains on the CPU over gloo, 1 on CUDA over NCCL."""
    max_failures: int = 3
    """Restarts of the worker group from its last checkpoint before training fails."""
    collective_timeout_s: float = 600.0
    """A worker that has waited so long for the others gives up, and says which of them did not come."""

    def __post_init__(self) -> None:
        _require_positive("cluster", self, "num_workers", "cpus_per_worker", "way_size", "shard_size")
        _require_positive("cluster", self, "collective_timeout_s")
        group = self.way_size * self.shard_size
        _require(
            self.num_workers % group == 0,
            f"cluster.num_workers={self.num_workers} is not a multiple of cluster.shard_size={self.shard_size} times "
            f"cluster.way_size={self.way_size}; choose {group}, or a multiple of it",
        )
        _require(
            0 <= self.min_workers <= self.num_workers and self.min_workers % group == 0,
            f"cluster.min_workers={self.min_workers} is no multiple of {group} (cluster.shard_size times "
            f"cluster.way_size) up to cluster.num_workers={self.num_workers}; 0 never shrinks",
        )
        _require(
            self.gpus_per_worker in (0, 1),
            f"cluster.gpus_per_worker={self.gpus_per_worker} is neither 0 nor 1; add workers to use more GPUs",
        )
        _require(self.max_failures >= 0, f"cluster.max_failures={self.max_failures} is negative; 0 never restarts")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run of the pipeline, whole."""

    name: str
    """Name of the run; the preset's, unless changed."""
    model: ModelConfig
    train: TrainConfig
    data: DataConfig = DataConfig()
    convert: ConvertConfig = ConvertConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    engine: EngineConfig = EngineConfig()
    gates: GatesConfig = GatesConfig()
    serve: ServeConfig = ServeConfig()
    cluster: ClusterConfig = ClusterConfig()
    continue_from: str | None = None
    """Start training from an earlier run's newest good checkpoint instead of at step 0: the first characters of that
    run's fingerprint, or `latest`; `FINGERPRINT@STEP` names the checkpoint, too. Weights, optimizer, position in the
    data and history are the earlier run's, the schedule is this run's. Model, data, `train.seed`,
    `train.sequences_per_step` and `train.optimizer` must be the same. An interrupted run of the same settings continues
    without this."""
    storage: str = "storage"
    """Folder or URI (`s3://...`) that holds every artefact; a relative path counts from where the command is given."""
    experiment: str = "kraken"
    """MLflow experiment. The server comes from MLFLOW_TRACKING_URI, else it is a database in the storage folder."""

    def __post_init__(self) -> None:
        _require(bool(self.name.strip()), "name is empty; give the run a name")
        _require(
            self.continue_from is None or CONTINUE_FROM.fullmatch(self.continue_from) is not None,
            f"continue_from={self.continue_from} is no fingerprint; give the first characters of an earlier run's, "
            "FINGERPRINT@STEP, or latest",
        )
        _require(
            self.model.vocab_size == self.data.vocab_size,
            f"model.vocab_size={self.model.vocab_size} does not fit the {self.data.num_ids} ids of "
            f"data.tokenizer={self.data.tokenizer}; choose model.vocab_size={self.data.vocab_size}",
        )
        c = self.cluster
        num_data_ranks = c.num_workers // c.way_size
        _require(
            self.train.sequences_per_step % num_data_ranks == 0,
            f"train.sequences_per_step={self.train.sequences_per_step} is not divisible by the {num_data_ranks} parts "
            f"that cluster.num_workers={c.num_workers} / cluster.way_size={c.way_size} make of it; choose a multiple "
            f"of {num_data_ranks}",
        )
        min_data_ranks = c.min_workers // c.way_size
        _require(
            not min_data_ranks or self.train.sequences_per_step % min_data_ranks == 0,
            f"train.sequences_per_step={self.train.sequences_per_step} is not divisible by the {min_data_ranks} parts "
            f"that cluster.min_workers={c.min_workers} / cluster.way_size={c.way_size} make of it; choose another "
            "cluster.min_workers",
        )
        _require(
            self.model.num_ways % c.way_size == 0,
            f"cluster.way_size={c.way_size} does not divide model.num_ways={self.model.num_ways}; choose "
            f"{[size for size in range(1, self.model.num_ways + 1) if self.model.num_ways % size == 0]}",
        )
        _require(
            self.train.optimizer == "adamw" or c.shard_size == 1,
            f"train.optimizer={self.train.optimizer} needs whole matrices, and cluster.shard_size={c.shard_size} "
            "divides them; choose cluster.shard_size=1, or train.optimizer=adamw",
        )

    def resolved(self) -> "RunConfig":
        """The same run with every derived setting written out, which is what is recorded and compared."""
        return dataclasses.replace(
            self, train=dataclasses.replace(self.train, warmup_steps=self.train.num_warmup_steps)
        )


def to_dict(config: Any) -> dict[str, Any]:
    """Any section of the tree as plain JSON types."""
    return dataclasses.asdict(config)


def from_dict(config_class: type[T], values: dict[str, Any]) -> T:
    """Build a section from plain JSON types.

    Raises:
        ConfigError: an unknown key, a missing key, a value of the wrong type or one that fails the section's checks.
    """
    try:
        return dacite.from_dict(config_class, values, config=dacite.Config(strict=True, cast=[tuple]))
    except dacite.DaciteError as error:
        raise ConfigError(f"{config_class.__name__}: {error}") from error


def to_json(config: Any) -> str:
    """Canonical JSON of a section: keys sorted, so that equal configs have equal text."""
    return json.dumps(to_dict(config), sort_keys=True, indent=2)
