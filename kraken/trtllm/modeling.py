"""The model inside TensorRT-LLM's PyTorch backend: rank i of a tensor-parallel group of W ranks holds way i.

Everything of a layer is private to its rank, and the one all-reduce of a layer runs on a stream of its own beside the
attention, in prefill as in decoding:

    a   = x + Attn(LN1(x))                 main stream
    S   = all_reduce(x)                    side stream, in float32
    x'  = a + FFN(LN2(a + (S - x)))        after both; the first layer has no S and reads a alone

The baselines are split as tensor parallelism splits any Transformer, with their all-reduces in the way: `standard` two
a layer, `parallel` one. Importing this file imports TensorRT-LLM and registers the model; shape letters are those of
`kraken/model/architecture.py`, and T counts the tokens of all requests in the step, one after the other.

What looks odd here answers a behaviour of TensorRT-LLM:
* A linear in ROW mode drops its bias on ranks above 0, under Ray even where its group has one rank. Private linears
  therefore have no mode, and the attention's output bias is added here.
* Its helper for two streams overlaps only inside CUDA graphs, hence `SideStream`.
* One-shot all-reduces exist for few group sizes and aligned widths, hence `strategy_for`.
* Warm-up runs longer sequences than there are positions, hence the clamp.
* Parameters are made on the meta device, where any arithmetic silently falls back to a slow start; so constructors
  here only allocate.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kraken.config import ConfigError
from kraken.manifest import ArtefactError
from kraken.plan.cost import TENSORRT_LLM_HEAD_SIZES
from kraken.trtllm.compat import (
    ONESHOT_RANKS,
    AllReduce,
    AllReduceParams,
    AllReduceStrategy,
    Attention,
    DecoderLayer,
    DecoderModel,
    DecoderModelForCausalLM,
    Embedding,
    LayerNorm,
    Linear,
    ModelConfig,
    TensorParallelMode,
    register_auto_model,
)
from kraken.trtllm.compat import Mapping as RankMapping

Tensors = Mapping[str, Tensor]
ALIGNED_WIDTH = 8
"""One-shot all-reduces move 16 bytes at a time: eight numbers of two bytes."""


def require_supported(model_config: ModelConfig) -> None:
    """Refuse what this model cannot do, before TensorRT-LLM fails on it less politely.

    Raises:
        ConfigError: names the setting, its value and the way out.
    """
    shape, mapping = model_config.pretrained_config, model_config.mapping
    if getattr(shape, "num_token_ids", None) is None:
        raise ConfigError(
            "num_token_ids is missing in config.json, so that nobody knows which ids only pad the vocabulary and must "
            "have no probability; convert again"
        )
    if shape.architecture == "kraken_delayed":
        raise ConfigError(
            "architecture=kraken_delayed is not supported with TensorRT-LLM; serve this model with engine.kind=torch"
        )
    if shape.positions != "learned":
        raise ConfigError(
            f"positions={shape.positions} is not supported with TensorRT-LLM; serve this model with engine.kind=torch"
        )
    if shape.architecture == "kraken" and mapping.tp_size != shape.num_ways:
        raise ConfigError(
            f"tensor_parallel_size={mapping.tp_size}, but the model has num_ways={shape.num_ways} and every "
            f"rank holds one way; choose tensor_parallel_size={shape.num_ways}"
        )
    is_split = shape.architecture != "kraken"
    if is_split and (shape.num_attention_heads % mapping.tp_size or shape.intermediate_size % mapping.tp_size):
        raise ConfigError(
            f"tensor_parallel_size={mapping.tp_size} divides not both num_attention_heads={shape.num_attention_heads} "
            f"and intermediate_size={shape.intermediate_size}; choose a divisor of both"
        )
    if is_split and shape.activation == "swiglu" and mapping.tp_size > 1:
        raise ConfigError(
            f"activation=swiglu of architecture={shape.architecture} is not split over devices; choose "
            "tensor_parallel_size=1, or serve this model with engine.kind=torch"
        )
    for name in ("pp_size", "cp_size"):
        if getattr(mapping, name) != 1:
            raise ConfigError(f"{name}={getattr(mapping, name)} is not supported; choose 1")
    if mapping.enable_attention_dp:
        raise ConfigError("enable_attention_dp=True is not supported; choose False")
    for name in ("lora_config", "spec_config"):
        if getattr(model_config, name) is not None:
            raise ConfigError(f"{name} is set, but neither LoRA nor speculative decoding is supported; leave it out")
    if getattr(model_config.get_quant_config(), "quant_algo", None) is not None:
        raise ConfigError("a quantised checkpoint is not supported; convert to bfloat16 or float16")
    if shape.head_dim not in TENSORRT_LLM_HEAD_SIZES:
        raise ConfigError(
            f"head_dim={shape.head_dim} has no attention kernel (there are {TENSORRT_LLM_HEAD_SIZES}), and "
            "TensorRT-LLM would abort; convert again with padded heads"
        )


def varied(model_config: ModelConfig, **changes: Any) -> ModelConfig:
    """A copy of a frozen configuration with other attributes.

    `extra_attrs` stays the same dictionary: attention layers register themselves there and are looked up in the
    original.
    """
    copied = copy.copy(model_config)
    copied._frozen = False
    for name, value in changes.items():
        setattr(copied, name, value)
    copied._frozen = True
    return copied


def strategy_for(model_config: ModelConfig) -> AllReduceStrategy:
    """How to reduce: as configured, but NCCL where the one-shot kernels have no answer."""
    num_ranks, width = model_config.mapping.tp_size, model_config.pretrained_config.hidden_size
    if num_ranks in ONESHOT_RANKS and width % ALIGNED_WIDTH == 0:
        return model_config.allreduce_strategy
    return AllReduceStrategy.NCCL


def weight_shapes(shape: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a TensorRT-LLM folder, all ways; `shape` has the keys of its config.json."""
    W, D = shape.num_ways, shape.hidden_size
    inner = shape.num_attention_heads // W * shape.head_dim
    hidden = shape.intermediate_size * (2 if shape.activation == "swiglu" else 1)
    linears = {f"attn.{name}": (inner, D) for name in "qkv"}
    linears |= {"attn.o": (D, inner), "mlp.fc": (hidden, D), "mlp.proj": (D, shape.intermediate_size)}
    norms = {"ln_1": (D,)} if shape.architecture == "parallel" else {"ln_1": (D,), "ln_2": (D,)}
    biased: dict[str, tuple[int, ...]] = {"ln_f": (D,)}
    for way in range(W):
        for layer in range(shape.num_hidden_layers):
            biased |= {f"ways.{way}.layers.{layer}.{name}": size for name, size in (norms | linears).items()}
    if shape.architecture == "kraken":
        biased["conjunction"] = (D, W * D)
    shapes = {f"{name}.weight": size for name, size in biased.items()}
    shapes |= {f"{name}.bias": size[:1] for name, size in biased.items() if shape.bias}
    return shapes | {
        "embed_tokens.weight": (shape.vocab_size, D),
        "embed_positions.weight": (shape.max_position_embeddings, D),
    }


def require_same_weights(found: Tensors, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a folder with missing, unknown or misshapen tensors.

    Raises:
        ArtefactError: counts them and names the first.
    """
    names = set(found.keys())
    wrong = [
        *(f"{name} is missing" for name in sorted(expected.keys() - names)),
        *(f"{name} is unknown" for name in sorted(names - expected.keys())),
        *(
            f"{name} has shape {list(found[name].shape)} instead of {list(expected[name])}"
            for name in sorted(names & expected.keys())
            if tuple(found[name].shape) != expected[name]
        ),
    ]
    if wrong:
        raise ArtefactError(f"{len(wrong)} tensors do not fit config.json, first: {wrong[0]}; convert again")


def below(weights: Tensors, prefix: str) -> dict[str, Tensor]:
    """The weight, and the bias where there is one, of the module called `prefix`."""
    names = [name for name in ("weight", "bias") if f"{prefix}.{name}" in weights.keys()]  # noqa: SIM118
    return {name: weights[f"{prefix}.{name}"] for name in names}


def fill(module: nn.Module, tensors: Tensors) -> None:
    """Copy tensors into the parameters of the same names."""
    for name, tensor in tensors.items():
        getattr(module, name).data.copy_(tensor)


class SideStream:
    """Runs one function on a CUDA stream of its own beside another on the current stream.

    Eager or captured in a CUDA graph alike. Without CUDA, or when not `enabled`, one runs after the other: the
    baseline that an overlap is measured against.
    """

    def __init__(self, enabled: bool):
        self.stream = torch.cuda.Stream(priority=-1) if enabled and torch.cuda.is_available() else None
        if self.stream is not None:
            self.forked, self.done = torch.cuda.Event(), torch.cuda.Event()

    def run(self, aside: Callable[[], Tensor], main: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Results of both, ready on the current stream. `aside` is launched first, in the same order on every rank: it
        is one kernel, and launched after the attention it would start when most of that is over."""
        if self.stream is None:
            return aside(), main()
        current = torch.cuda.current_stream()
        self.forked.record(current)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.forked)
            result = aside()
            self.done.record(self.stream)
        main_result = main()
        current.wait_event(self.done)
        if not torch.cuda.is_current_stream_capturing():
            result.record_stream(current)  # else its memory could go to the next user of the side stream too early
        return result, main_result


class WayAttention(nn.Module):
    """Attention of this rank's heads over its own cache, output projection and bias included; no communication."""

    def __init__(self, model_config: ModelConfig, layer_index: int):
        super().__init__()
        shape = model_config.pretrained_config
        num_heads = shape.num_attention_heads // shape.num_ways
        # the scale of padded heads is folded into the weights of the queries
        self.inner = attention(varied(model_config, mapping=RankMapping()), layer_index, num_heads, out_bias=False)
        self.out_bias = None
        if shape.bias:
            self.out_bias = nn.Parameter(torch.empty(shape.hidden_size, dtype=model_config.torch_dtype), False)

    def forward(self, x_TD: Tensor, attn_metadata: Any) -> Tensor:
        out_TD = attend(self.inner, x_TD, attn_metadata, reduce=False)
        return out_TD if self.out_bias is None else out_TD + self.out_bias

    def load(self, weights: Tensors, prefix: str) -> None:
        self.inner.qkv_proj.load_weights(weights=[below(weights, f"{prefix}.{name}") for name in "qkv"])
        out = below(weights, f"{prefix}.o")
        if self.out_bias is not None:
            self.out_bias.data.copy_(out.pop("bias"))
        self.inner.o_proj.load_weights(weights=[out])


def attention(model_config: ModelConfig, layer_index: int, num_heads: int, out_bias: bool) -> Attention:
    """TensorRT-LLM's attention without positions of its own; it takes the head size from the pretrained config."""
    shape = model_config.pretrained_config
    return Attention(
        hidden_size=shape.hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=shape.max_position_embeddings,
        bias=shape.bias,
        pos_embd_params=None,
        layer_idx=layer_index,
        dtype=model_config.torch_dtype,
        dense_bias=out_bias,
        config=model_config,
    )


def attend(inner: Attention, x_TD: Tensor, attn_metadata: Any, reduce: bool) -> Tensor:
    """Attention of normalised input; `reduce` sums over the ranks of its own mapping."""
    return inner(
        position_ids=None,
        hidden_states=x_TD,
        attn_metadata=attn_metadata,
        # None sums, and is the only way to ask for it that a group of one rank accepts
        all_reduce_params=None if reduce else AllReduceParams(enable_allreduce=False),
    )


class FFN(nn.Module):
    """GELU, or SwiGLU with the gate's rows first; whole on every rank, or split over the ranks."""

    def __init__(self, model_config: ModelConfig, split: bool, reduce: bool):
        super().__init__()
        shape = model_config.pretrained_config
        self.gated = shape.activation == "swiglu"
        common = {
            "bias": shape.bias,
            "dtype": model_config.torch_dtype,
            "mapping": model_config.mapping if split else None,
            "skip_create_weights_in_init": model_config.skip_create_weights_in_init,
            "allreduce_strategy": strategy_for(model_config),
        }
        num_hidden = shape.intermediate_size * (2 if self.gated else 1)
        column, row = (TensorParallelMode.COLUMN, TensorParallelMode.ROW) if split else (None, None)
        self.fc = Linear(shape.hidden_size, num_hidden, tensor_parallel_mode=column, reduce_output=False, **common)
        self.proj = Linear(
            shape.intermediate_size, shape.hidden_size, tensor_parallel_mode=row, reduce_output=reduce, **common
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        hidden_TF = self.fc(x_TD)
        if self.gated:
            gate_TF, hidden_TF = hidden_TF.chunk(2, dim=-1)
            return self.proj(F.silu(gate_TF) * hidden_TF)
        return self.proj(F.gelu(hidden_TF, approximate="tanh"))

    def load(self, weights: Tensors, prefix: str) -> None:
        self.fc.load_weights(weights=[below(weights, f"{prefix}.fc")])
        self.proj.load_weights(weights=[below(weights, f"{prefix}.proj")])


def norm(model_config: ModelConfig) -> LayerNorm:
    """In float32: it makes its input float32, and without torch.compile refuses parameters of another type then."""
    shape = model_config.pretrained_config
    return LayerNorm(hidden_size=shape.hidden_size, eps=shape.layer_norm_eps, dtype=torch.float32, has_bias=shape.bias)


class KrakenLayer(DecoderLayer):
    """One way of one layer; see the equations at the top."""

    def __init__(self, model_config: ModelConfig, layer_index: int, all_reduce: AllReduce, side: SideStream):
        super().__init__()
        self.reads_others = layer_index > 0
        self.way = model_config.mapping.tp_rank
        self.ln_1, self.ln_2 = norm(model_config), norm(model_config)
        self.attn = WayAttention(model_config, layer_index)
        self.mlp = FFN(model_config, split=False, reduce=False)
        self.all_reduce, self.side = all_reduce, side

    def forward(self, x_TD: Tensor, attn_metadata: Any) -> Tensor:
        def attended() -> Tensor:
            return x_TD + self.attn(self.ln_1(x_TD), attn_metadata)

        if not self.reads_others:
            a_TD = seen_TD = attended()
        else:
            # in float32: a sum rounded to two bytes has lost what a small x of another way adds to a large one here
            sum_TD, a_TD = self.side.run(lambda: self.all_reduce(x_TD.float()), attended)
            seen_TD = (a_TD + (sum_TD - x_TD)).to(x_TD.dtype)
        return a_TD + self.mlp(self.ln_2(seen_TD))

    def load(self, weights: Tensors, layer_index: int) -> None:
        prefix = f"ways.{self.way}.layers.{layer_index}"
        fill(self.ln_1, below(weights, f"{prefix}.ln_1"))
        fill(self.ln_2, below(weights, f"{prefix}.ln_2"))
        self.attn.load(weights, f"{prefix}.attn")
        self.mlp.load(weights, f"{prefix}.mlp")


class SplitLayer(DecoderLayer):
    """One layer of a baseline, its heads and its FFN split over the ranks; biases after a sum come from rank 0."""

    def __init__(self, model_config: ModelConfig, layer_index: int, all_reduce: AllReduce):
        super().__init__()
        shape = model_config.pretrained_config
        self.parallel = shape.architecture == "parallel"
        self.ln_1 = norm(model_config)
        self.ln_2 = None if self.parallel else norm(model_config)
        reducing_config = varied(model_config, allreduce_strategy=strategy_for(model_config))
        self.attn = attention(reducing_config, layer_index, shape.num_attention_heads, out_bias=shape.bias)
        self.mlp = FFN(model_config, split=True, reduce=not self.parallel)
        self.all_reduce = all_reduce

    def forward(self, x_TD: Tensor, attn_metadata: Any) -> Tensor:
        normed_TD = self.ln_1(x_TD)
        out_TD = attend(self.attn, normed_TD, attn_metadata, reduce=not self.parallel)
        if self.ln_2 is None:
            return x_TD + self.all_reduce(out_TD + self.mlp(normed_TD))
        a_TD = x_TD + out_TD
        return a_TD + self.mlp(self.ln_2(a_TD))

    def load(self, weights: Tensors, layer_index: int) -> None:
        prefix = f"ways.0.layers.{layer_index}"
        fill(self.ln_1, below(weights, f"{prefix}.ln_1"))
        if self.ln_2 is not None:
            fill(self.ln_2, below(weights, f"{prefix}.ln_2"))
        self.attn.qkv_proj.load_weights(weights=[below(weights, f"{prefix}.attn.{name}") for name in "qkv"])
        self.attn.o_proj.load_weights(weights=[below(weights, f"{prefix}.attn.o")])
        self.mlp.load(weights, f"{prefix}.mlp")


class KrakenModel(DecoderModel):
    """Token ids [T] of all requests -> normalised states [T, D], the same on every rank."""

    def __init__(self, model_config: ModelConfig):
        super().__init__(model_config)
        shape, mapping, dtype = model_config.pretrained_config, model_config.mapping, model_config.torch_dtype
        W, D = shape.num_ways, shape.hidden_size
        # The base class ties this one to the head, split over the vocabulary. Reading it would take an all-reduce with
        # nothing beside it, so that tokens are looked up in a whole table.
        self.embed_tokens = Embedding(
            shape.vocab_size, D, dtype=dtype, mapping=mapping, tensor_parallel_mode=TensorParallelMode.COLUMN
        )
        self.token_table = Embedding(shape.vocab_size, D, dtype=dtype)
        self.position_table = Embedding(shape.max_position_embeddings, D, dtype=dtype)
        self.last_position = shape.max_position_embeddings - 1
        strategy = strategy_for(model_config)
        if shape.architecture == "kraken":
            all_reduce = AllReduce(mapping=mapping, strategy=strategy, dtype=torch.float32)
            side = SideStream(enabled=getattr(shape, "overlap_all_reduce", True))
            layers = [KrakenLayer(model_config, i, all_reduce, side) for i in range(shape.num_hidden_layers)]
            self.conjunction = Linear(
                W * D,
                D,
                bias=shape.bias,
                dtype=dtype,
                mapping=mapping,
                tensor_parallel_mode=TensorParallelMode.ROW,
                skip_create_weights_in_init=model_config.skip_create_weights_in_init,
                allreduce_strategy=strategy,
            )
        else:
            all_reduce = AllReduce(mapping=mapping, strategy=strategy, dtype=dtype)
            layers = [SplitLayer(model_config, i, all_reduce) for i in range(shape.num_hidden_layers)]
            self.conjunction = None
        self.layers: Any = nn.ModuleList(layers)
        self.norm = norm(model_config)
        self.rank, self.num_ranks = mapping.tp_rank, mapping.tp_size

    def forward(
        self,
        attn_metadata: Any,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`position_ids` is [1, T]. The rest of what TensorRT-LLM passes belongs to features that are refused."""
        assert position_ids is not None and (input_ids is None) != (inputs_embeds is None)
        x_TD = self.token_table(input_ids) if inputs_embeds is None else inputs_embeds
        x_TD = x_TD + self.position_table(position_ids.squeeze(0).clamp(max=self.last_position))
        for layer in self.layers:
            x_TD = layer(x_TD, attn_metadata)
        return self.norm(x_TD if self.conjunction is None else self.conjunction(x_TD))

    def load(self, weights: Tensors) -> None:
        tokens_VD = weights["embed_tokens.weight"]
        num_rows = -(-tokens_VD.shape[0] // self.num_ranks)
        own_VD = tokens_VD[self.rank * num_rows :][:num_rows]
        # Every rank has num_rows of them; those past the vocabulary are cut off the logits, but must not be NaN.
        self.embed_tokens.weight.data.zero_()
        self.embed_tokens.weight.data[: len(own_VD)].copy_(own_VD)
        fill(self.token_table, {"weight": tokens_VD})
        fill(self.position_table, below(weights, "embed_positions"))
        for index, layer in enumerate(self.layers):
            layer.load(weights, index)
        if self.conjunction is not None:
            self.conjunction.load_weights(weights=[below(weights, "conjunction")])
        fill(self.norm, below(weights, "ln_f"))


@register_auto_model("KrakenForCausalLM")
class KrakenForCausalLM(DecoderModelForCausalLM):
    """What TensorRT-LLM finds for `architectures: ["KrakenForCausalLM"]`.

    Raises:
        ConfigError: the configuration asks for something that this model cannot do.
    """

    def __init__(self, model_config: ModelConfig):
        require_supported(model_config)
        shape = model_config.pretrained_config
        super().__init__(
            KrakenModel(model_config), config=model_config, hidden_size=shape.hidden_size, vocab_size=shape.vocab_size
        )
        self.shape = shape

    def forward(
        self,
        attn_metadata: Any,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_context_logits: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """Logits in which padding ids cannot win: their rows of the table may be zeros, and 0 may be the largest."""
        logits_TV = super().forward(
            attn_metadata=attn_metadata,
            input_ids=input_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            return_context_logits=return_context_logits,
            **kwargs,
        )
        logits_TV[..., self.shape.num_token_ids :] = torch.finfo(logits_TV.dtype).min
        return logits_TV

    def infer_max_seq_len(self) -> int:
        """Longest sequence, to which TensorRT-LLM cuts `max_seq_len`: a context and the token after it, which a scored
        prompt of full length draws and which is never fed."""
        return self.shape.max_position_embeddings + 1

    def load_weights(self, weights: Tensors) -> None:
        """Take this rank's part of a TensorRT-LLM folder.

        Raises:
            ArtefactError: a tensor is missing, unknown or misshapen.
        """
        require_same_weights(weights, weight_shapes(self.shape))
        self.model.load(weights)
